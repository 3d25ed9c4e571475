"""What a row of a data set is read as: one that can be used, or one that cannot and why."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    place: str
    """`file:row`, rows counted from 1, for messages."""
    problem: str
    """What is wrong with it, and what to do."""


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """A row as the data set has it, columns named as this package names them."""

    place: str
    """`file:row`, rows counted from 1, for messages."""
    id: str
    problem: str
    answer: str
    target: str | None = None
    images: list[bytes | str]
    """Encoded pictures, or paths below `image_root`."""
    image_root: Path | None
    """None: a path is an error."""
    saliency: list[bytes | str] | None = None
    """A saliency map per picture: files likewise; None where the row has none."""
    options: tuple[str, ...] = ()
    """Texts to choose from, A first."""
    problem_id: str | None = None
    """The same for rows of a set that show one problem; None: no other row does."""
    columns: tuple[str, ...] = ()
    """Names of all columns that the row has."""

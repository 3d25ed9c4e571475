"""What a training set and evaluation sets have in common: pictures by their pixels, problems by their text.

Benchmarks ask a question and say behind it how to answer; training data ask the question alone, or say so in other
words. So two texts are one problem if they are the same without the instruction at their end. Instructions are the
sentences that a prompt template adds behind the problem, and those that all rows of a set end with, as long as each of
them keeps one; whatever set they were found in, they are taken off every text.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_papo.config import DataConfig
from megatron_papo.data.problems import normalised
from megatron_papo.data.source_row import BadRow, SourceRow
from megatron_papo.errors import UserError
from megatron_papo.pictures.decode import decode_image
from megatron_papo.pictures.store import read_named

_SENTENCE = re.compile(r"(?<=[.?!:。？！：])\s+|\s*\n\s*")
"""What lies between two sentences: white space behind a stop, or a new line."""


@dataclass
class Contents:
    """What a set of rows shows; rows by number, from 0."""

    pictures: dict[bytes, set[int]] = field(default_factory=dict)
    """Digest of the pixels -> rows."""
    problems: dict[str, set[int]] = field(default_factory=dict)
    """Text, normalised -> rows."""
    pairs: dict[tuple[bytes, str], set[int]] = field(default_factory=dict)
    """A picture and the problem beside it -> rows."""
    rows: int = 0
    unreadable: int = 0
    """Rows and pictures that were left out."""
    common_end: list[str] | None = None
    """The sentences, normalised, that all problems end with, each of which keeps one; None: there was none yet."""

    def without(self, instructions: Collection[str]) -> "Contents":
        """Return the same with problems that lack the instructions at their ends."""
        short = {text: without_instructions(text, instructions) for text in self.problems}
        problems: dict[str, set[int]] = {}
        for text, rows in self.problems.items():
            problems.setdefault(short[text], set()).update(rows)
        pairs: dict[tuple[bytes, str], set[int]] = {}
        for (pixels, text), rows in self.pairs.items():
            pairs.setdefault((pixels, short[text]), set()).update(rows)
        return replace(self, problems=problems, pairs=pairs)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, normalised."""
    return [sentence for part in _SENTENCE.split(text) if (sentence := normalised(part))]


def without_instructions(problem: str, instructions: Collection[str]) -> str:
    """Return a normalised text without those of the instructions, one or several, that it ends with; one sentence
    stays."""
    while True:
        ends = [len(sentence) + 1 for sentence in instructions if problem.endswith(f" {sentence}")]
        if not ends:
            return problem
        problem = problem[: -max(ends)]


def contents_of(
    rows: Iterable[SourceRow | BadRow], config: DataConfig, name: str, seen: Callable[[], object]
) -> Contents:
    """Return what rows show. Raises UserError where none of the rows, or of their pictures, can be read: nothing could
    be found there.

    Args:
        rows: of a set.
        config: says what transparent pictures look like.
        name: of the set, for messages.
        seen: called at each row.
    """
    contents = Contents()
    known: dict[tuple[Path | None, str], bytes | UserError] = {}
    bad_row, bad_picture = "", ""
    for number, row in enumerate(rows):
        seen()
        contents.rows += 1
        if isinstance(row, BadRow):
            contents.unreadable += 1
            bad_row = bad_row or f"{row.place}: {row.problem}"
            continue
        text = normalised(row.problem)
        contents.problems.setdefault(text, set()).add(number)
        contents.common_end = _common_end(contents.common_end, sentences(row.problem))
        for picture in row.images:
            pixels = _digest_of_pixels(picture, row.image_root, config, known)
            if isinstance(pixels, UserError):
                contents.unreadable += 1
                bad_picture = bad_picture or f"{row.place}: {pixels}"
                continue
            contents.pictures.setdefault(pixels, set()).add(number)
            contents.pairs.setdefault((pixels, text), set()).add(number)
    if not contents.problems:
        raise UserError(
            f"{name}: none of its {contents.rows} rows can be read, the first: {bad_row}"
            if bad_row
            else f"{name}: no row in it: name another source, or download it again"
        )
    if bad_picture and not contents.pictures:
        raise UserError(f"{name}: none of its pictures can be read, the first: {bad_picture}")
    return contents


def _common_end(before: list[str] | None, own: list[str]) -> list[str]:
    """Return the sentences that both end with; the first of `own` is none of them."""
    own = own[1:]
    if before is None:
        return own
    same = 0
    while same < min(len(before), len(own)) and before[-1 - same] == own[-1 - same]:
        same += 1
    return own[len(own) - same :]


def _digest_of_pixels(
    picture: bytes | str, root: Path | None, config: DataConfig, known: dict[tuple[Path | None, str], bytes | UserError]
) -> bytes | UserError:
    """Return the digest of a picture's pixels, whatever format they are stored in, or why it cannot be read."""
    if isinstance(picture, str) and (root, picture) in known:
        return known[root, picture]
    try:
        content = picture if isinstance(picture, bytes) else read_named(picture, root)
        image = decode_image(content, "image", config.transparency).image
        digest: bytes | UserError = _digest(f"{image.width} {image.height} ".encode() + image.tobytes())
    except UserError as error:
        digest = error
    if isinstance(picture, str):
        known[root, picture] = digest
    return digest


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:16]


@dataclass(frozen=True)
class Shared:
    """What two sets have in common, counted in the second."""

    pictures: int
    """Different ones that are in both."""
    problems: int
    """Different texts, without instructions, that are in both; short ones ("Find x.") are so by chance."""
    records: int
    """Rows of the second set with such a picture."""
    records_with_both: int
    """Rows of the second set with a picture and a text that stand in one row of the first."""


def shared(first: Contents, second: Contents) -> Shared:
    """Return what two sets have in common."""
    pictures = first.pictures.keys() & second.pictures.keys()
    with_picture = {row for digest in pictures for row in second.pictures[digest]}
    with_both = {row for digest in first.pairs.keys() & second.pairs.keys() for row in second.pairs[digest]}
    return Shared(len(pictures), len(first.problems.keys() & second.problems.keys()), len(with_picture), len(with_both))

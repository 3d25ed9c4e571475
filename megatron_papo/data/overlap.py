"""What a training set and evaluation sets have in common: pictures by their pixels, problems by their text."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_papo.config import DataConfig
from megatron_papo.data.problems import normalised
from megatron_papo.data.source_row import BadRow, SourceRow
from megatron_papo.errors import UserError
from megatron_papo.pictures.decode import decode_image
from megatron_papo.pictures.store import read_named

Rows = dict[bytes, set[int]]
"""Digest -> the rows that show it, by number."""


@dataclass
class Contents:
    """What a set of rows shows: digests alone, so that large sets fit."""

    pictures: Rows = field(default_factory=dict)
    """By their pixels."""
    problems: Rows = field(default_factory=dict)
    """By their text, normalised."""
    pairs: Rows = field(default_factory=dict)
    """By both: a picture and the problem beside it."""
    rows: int = 0
    unreadable: int = 0
    """Rows and pictures that were left out."""


def contents_of(
    rows: Iterable[SourceRow | BadRow], config: DataConfig, instruction: str, seen: Callable[[], object]
) -> Contents:
    """Return what rows show.

    Args:
        rows: of a set.
        config: says what transparent pictures look like.
        instruction: left out where a problem ends with it.
        seen: called at each row.
    """
    contents = Contents()
    known: dict[tuple[Path | None, str], bytes | None] = {}
    for number, row in enumerate(rows):
        seen()
        contents.rows += 1
        if isinstance(row, BadRow):
            contents.unreadable += 1
            continue
        text = _digest(normalised(row.problem.rstrip().removesuffix(instruction.strip())).encode())
        contents.problems.setdefault(text, set()).add(number)
        for picture in row.images:
            pixels = _digest_of_pixels(picture, row.image_root, config, known)
            if pixels is None:
                contents.unreadable += 1
                continue
            contents.pictures.setdefault(pixels, set()).add(number)
            contents.pairs.setdefault(_digest(pixels + text), set()).add(number)
    return contents


def _digest_of_pixels(
    picture: bytes | str, root: Path | None, config: DataConfig, known: dict[tuple[Path | None, str], bytes | None]
) -> bytes | None:
    """Return the digest of a picture's pixels, whatever format they are stored in; None where it cannot be read."""
    if isinstance(picture, str) and (root, picture) in known:
        return known[root, picture]
    try:
        content = picture if isinstance(picture, bytes) else read_named(picture, root)
        image = decode_image(content, "image", config.transparency).image
        digest = _digest(f"{image.width} {image.height} ".encode() + image.tobytes())
    except UserError:
        digest = None
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
    """Different texts that are in both; short ones ("Find x.") are so by chance."""
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

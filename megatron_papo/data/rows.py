"""Rows of a data set, one at a time: JSONL, parquet, a directory of such files, or a Hugging Face data set.

The layout is that of PAPO_ViRL39K: a problem with `<image>` places, an answer, and a list of images, each a path, raw
bytes or {"bytes": ..., "path": ...}. Column names come from the data section of the configuration, or from the set's
own part of it; a column `id` is used where there is one. A row that cannot be used comes out as a BadRow, and the
reading goes on.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_papo.config import DataConfig, PromptSource
from megatron_papo.data.sources import converting, data_files, is_jsonl
from megatron_papo.errors import UserError
from megatron_papo.reading import in_short, reading, shown

if TYPE_CHECKING:
    import datasets
    import pyarrow

_PARQUET_BATCH = 32
"""Rows held in memory at once: each may carry megabytes of pictures."""
_HEAD = 1 << 16
"""Bytes of a file that tell whether it is text at all."""
_NO_TEXT = {
    b"\x1f\x8b": ("packed by gzip", "unpack it with gunzip"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "unpack it with unzstd"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"PAR1": ("a parquet file", "rename it to .parquet"),
    b"\xff\xfe": ("text of UTF-16", "convert it with iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("text of UTF-16", "convert it with iconv -f UTF-16 -t UTF-8"),
}
"""How other kinds of files begin -> what they are, and what to do."""
_CONVERSATIONS = ("conversations", "messages", "conversation")


@dataclass(frozen=True)
class Columns:
    """What the columns of a set are called."""

    problem: str
    answer: str
    images: str
    saliency: str
    target: str | None
    """None: the set needs no target."""

    @classmethod
    def of(cls, source: PromptSource, config: DataConfig, with_target: bool) -> "Columns":
        """Return the set's own names, and the data section's where it has none."""
        return cls(
            source.problem_key or config.problem_key,
            source.answer_key or config.answer_key,
            source.images_key or config.images_key,
            source.saliency_key or config.saliency_key,
            (source.target_key or config.target_key) if with_target else None,
        )


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


def read_rows(source: PromptSource, config: DataConfig, with_target: bool) -> Iterator[SourceRow | BadRow]:
    """Return the rows of a source in order, at most source.count of them.

    Raises UserError, naming the file, where a file as a whole cannot be read.
    """
    columns = Columns.of(source, config, with_target)
    rows = (
        row if isinstance(row, BadRow) else _parse(row, table, number, columns)
        for table in _tables(source, config, columns)
        for number, row in table.rows
    )
    return islice(rows, source.count)


@dataclass(frozen=True)
class _Table:
    name: str
    """For messages."""
    stem: str
    """What the ids of its rows begin with, where they have none of their own."""
    image_root: Path | None
    rows: Iterable[tuple[int, dict | BadRow]]
    """With their numbers, from 1."""


def _tables(source: PromptSource, config: DataConfig, columns: Columns) -> Iterator[_Table]:
    """Return the files of a source one after the other, or the Hugging Face data set."""
    files = data_files(source)
    base = Path(source.source)
    root = Path(config.image_root) if config.image_root else None
    if root is not None and not root.is_dir():
        raise UserError(f"data.image_root: {root}: no such directory: correct it")
    for file in files:
        stem = str(file.relative_to(base).with_suffix("")) if base.is_dir() else file.stem
        yield _Table(str(file), stem, root or file.parent, _rows_of(file, columns))
    if not files:
        table = undecoded(hub_data_set(source), columns.images, columns.saliency)
        name = f"{source.source} ({source.split})"
        yield _Table(name, source.split, root, _of_hub(table, name))


def _rows_of(file: Path, columns: Columns) -> Iterator[tuple[int, dict | BadRow]]:
    return _jsonl(file) if is_jsonl(file) else _parquet(file, columns)


def _jsonl(file: Path) -> Iterator[tuple[int, dict | BadRow]]:
    """Yield the rows of a file of JSON objects, one per line; empty lines are no rows."""
    _require_text(file)
    with reading(file, "correct its permissions or copy it again"):
        # What is not UTF-8 becomes lone surrogates, which are looked for line by line.
        stream = open(file, encoding="utf-8-sig", errors="surrogateescape")
    with stream:
        for number, line in enumerate(stream, 1):
            text, place = line.strip(), f"{file}:{number}"
            if number == 1 and (text.startswith("[") or text == "{"):
                raise UserError(
                    f"{place}: an array or JSON of several lines, not an object per line: {converting(file)}"
                )
            if text:
                yield number, _row_of_line(text, place)


def _require_text(file: Path) -> None:
    """Raise UserError where a file as a whole is no text of UTF-8, so that none of its lines need be read."""
    with reading(file, "correct its permissions or copy it again"), open(file, "rb") as stream:
        head = stream.read(_HEAD)
    for start, (kind, cure) in _NO_TEXT.items():
        if head.startswith(start):
            raise UserError(f"{file}: {kind}, not of JSON objects: {cure}")
    lines = [line for line in head.splitlines() if line.strip()]
    rows = [line for line in lines if line.startswith(b"{") and line.endswith(b"}") and _is_text(line)]
    if lines and not rows and not _is_text(lines[0]):
        raise UserError(f"{file}: not text of UTF-8: convert it with iconv -f ENCODING -t UTF-8, or copy it again")


def _is_text(line: bytes) -> bool:
    """Say whether a line is text of UTF-8; its end may be cut off."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return b"\0" not in line


def _row_of_line(text: str, place: str) -> dict | BadRow:
    try:
        _require_unicode(text, "the line")
        row = json.loads(text, object_pairs_hook=_object)
    except UserError as error:
        return BadRow(place, str(error))
    except (ValueError, RecursionError) as error:
        return BadRow(place, f"{in_short(error)}: the file is truncated or damaged")
    return row if isinstance(row, dict) else BadRow(place, "expected a JSON object with the columns of a row")


def _object(pairs: list[tuple[str, object]]) -> dict:
    """Return an object of JSON. Raises UserError where a key is there twice: either value may be the one meant."""
    entries: dict[str, object] = {}
    for key, value in pairs:
        if key in entries:
            raise UserError(f"{shown(key)} is there twice: correct or drop the row")
        entries[key] = value
    return entries


def _parquet(file: Path, columns: Columns) -> Iterator[tuple[int, dict | BadRow]]:
    """Yield rows with the columns that are used; the names of the others stand for None."""
    from pyarrow import parquet

    cure = "it cannot be read as parquet: the file is truncated or damaged: copy it again"
    with reading(file, cure):
        table = parquet.ParquetFile(file)
        schema = table.schema_arrow
    names, numbers = schema.names, _short_floats(schema)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{file}: two columns are called {shown(twice[0])}: rename or drop one")
    with reading(file, cure):
        used = [name for name in (*vars(columns).values(), "id") if name in names]
        batches = table.iter_batches(batch_size=_PARQUET_BATCH, columns=used)
    number = 0
    while True:
        with reading(file, cure):
            batch = next(batches, None)
        if batch is None:
            return
        for index in range(batch.num_rows):
            number += 1
            try:
                row = batch.slice(index, 1).to_pylist()[0]
                yield number, dict.fromkeys(names) | _with_shortest(row, numbers)
            except ValueError as error:  # text that is not UTF-8, dates out of range
                yield number, BadRow(f"{file}:{number}", f"{in_short(error)}: correct or drop the row")


def _short_floats(schema: "pyarrow.Schema") -> dict[str, str]:
    """Return the columns of floating-point numbers of fewer than 64 bits, and what numpy calls their type."""
    names = {"halffloat": "float16", "float": "float32"}
    return {field.name: names[str(field.type)] for field in schema if str(field.type) in names}


def _with_shortest(row: dict, types: dict[str, str]) -> dict:
    """Return a row whose numbers of these columns have no more digits than their types tell apart: 0.1 as float32 is
    0.1, and not 0.10000000149011612. Whole numbers stay what they are."""
    given = {name: row[name] for name in types if row.get(name) is not None}
    return row | {
        name: float(value) if float(value).is_integer() else float(str(np.dtype(types[name]).type(value)))
        for name, value in given.items()
    }


def hugging_face_fingerprint(source: PromptSource) -> str:
    """Return how the datasets library tells this data set and split from others: by name, configuration, version and
    the commit that was downloaded. Raises UserError where it cannot be loaded."""
    return hub_data_set(source)._fingerprint


def hub_data_set(source: PromptSource) -> "datasets.Dataset":
    """Return a data set of the Hugging Face hub, as load_from_hub does. Raises UserError where it cannot be loaded."""
    cure = (
        "check name, split and network, or give a directory; for a machine without a network: .venv/bin/python -m"
        " tools.prefetch --config FILE where there is one"
    )
    what = f"{source.source}: no such file, and the Hugging Face data set of this name cannot be loaded"
    with reading(what, cure):
        return load_from_hub(source)


def load_from_hub(source: PromptSource) -> "datasets.Dataset":
    """Return a data set of the Hugging Face hub: from the network into the libraries' cache, or from there alone where
    HF_HUB_OFFLINE is set. Whatever the libraries raise goes through."""
    import datasets

    return datasets.load_dataset(source.source, split=source.split)


def is_offline() -> bool:
    """Say whether the Hugging Face libraries were told to use no network."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _of_hub(table: "datasets.Dataset", name: str) -> Iterator[tuple[int, dict]]:
    numbers = _short_floats(table.features.arrow_schema)
    for number in range(len(table)):
        with reading(f"{name}:{number + 1}", "download the data set again"):
            row = table[number]
        yield number + 1, _with_shortest(row, numbers)


def undecoded(table: "datasets.Dataset", *picture_keys: str) -> "datasets.Dataset":
    """Return a table whose pictures, in the columns of these names, come as the bytes they were stored as."""
    import datasets

    for key in picture_keys:
        feature = table.features.get(key)
        if isinstance(feature, datasets.Image):
            table = table.cast_column(key, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(key, datasets.List(datasets.Image(decode=False)))
    return table


def _parse(row: dict, table: _Table, number: int, columns: Columns) -> SourceRow | BadRow:
    place = f"{table.name}:{number}"
    try:
        return SourceRow(
            place=place,
            id=_identity(row, table, number),
            problem=_text(row, columns.problem, "problem_key"),
            answer=_text(row, columns.answer, "answer_key"),
            target=None if columns.target is None else _text(row, columns.target, "target_key"),
            images=_pictures(row, columns.images) or [],
            image_root=table.image_root,
            saliency=_pictures(row, columns.saliency),
            columns=tuple(row),
        )
    except UserError as error:
        return BadRow(place, str(error))


def _identity(row: dict, table: _Table, number: int) -> str:
    value = row.get("id")
    name = f"{table.stem}-{number}" if value is None else str(value)
    _require_unicode(name, "id")
    return name


def _text(row: dict, column: str, key: str) -> str:
    _require_outermost(row, column)
    if column not in row:
        seen = ", ".join(shown(name) for name in row)
        if set(row) & set(_CONVERSATIONS):
            raise UserError(
                f"no column {column} (there are: {seen}): rows of conversations are not read: make one column of the"
                " problem, one of the answer and one of the pictures"
            )
        raise UserError(f"no column {column} (there are: {seen}): set data.{key}")
    value = row[column]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = value if isinstance(value, float) and not math.isfinite(value) else str(value)
    if isinstance(value, Decimal):
        value = f"{value:f}"
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{column} is {shown(repr(value))}, expected a text: correct or drop the row")
    _require_unicode(value, column)
    return value


def _require_unicode(text: str, what: str) -> None:
    """Raise UserError where half a surrogate pair stands in a text, which cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not valid Unicode (position {error.start}): correct or drop the row")


def _require_outermost(row: dict, column: str) -> None:
    """Raise UserError where the name of a column means one inside another."""
    outer, _, inner = column.partition(".")
    if inner and column not in row and outer in row:
        raise UserError(
            f"no column {column}: columns inside columns are not read: make {shown(inner)} of {shown(outer)} a column"
            " of its own"
        )


def _pictures(row: dict, column: str) -> list[bytes | str] | None:
    """Return the pictures of a column, a list of them or a single one; None where there is nothing at all."""
    _require_outermost(row, column)
    value = row.get(column)
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    return [_picture(item, f"{column}[{index}]") for index, item in enumerate(items)]


def _picture(item: object, place: str) -> bytes | str:
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if not isinstance(item, (bytes, str)) or not item:
        raise UserError(
            f"{place}: expected a path, bytes or {{bytes, path}}, got {shown(repr(item), 60)}: correct or drop the row"
        )
    return item

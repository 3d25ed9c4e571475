"""Rows of a data set, one at a time: JSONL, parquet, a directory of such files, or a Hugging Face data set.

The layout is that of PAPO_ViRL39K: a problem with `<image>` places, an answer, and a list of images, each a path, raw
bytes or {"bytes": ..., "path": ...}. Column names come from the data section of the configuration, or from the set's
own part of it; a column `id` is used where there is one. A row that cannot be used comes out as a BadRow, and the
reading goes on.
"""

import codecs
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_papo.config import BenchmarkConfig, DataConfig, PromptSource
from megatron_papo.data.cells import pictures_of, require_unicode, text_of
from megatron_papo.data.hub_files import files_here
from megatron_papo.data.problems import key_of, problem_column, with_problems
from megatron_papo.data.record_forms import FORMS, Item, read_item
from megatron_papo.data.set_files import has_known_names
from megatron_papo.data.source_row import BadRow, SourceRow
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


@dataclass(frozen=True)
class Columns:
    """What the columns of a set are called."""

    problem: str
    answer: str
    images: str
    saliency: str
    target: str | None
    """None: the set needs no target."""
    problem_id: str | None = None
    """None: no column says which rows show one problem."""

    @classmethod
    def of(cls, source: PromptSource, config: DataConfig, with_target: bool) -> "Columns":
        """Return the set's own names, and the data section's where it has none."""
        return cls(
            source.problem_key or config.problem_key,
            source.answer_key or config.answer_key,
            source.images_key or config.images_key,
            source.saliency_key or config.saliency_key,
            (source.target_key or config.target_key) if with_target else None,
            problem_column(source),
        )


def read_rows(source: PromptSource, config: DataConfig, with_target: bool) -> Iterator[SourceRow | BadRow]:
    """Return the rows of a source in order, at most source.count of them.

    Raises UserError, naming the file, where a file as a whole cannot be read.
    """
    columns = Columns.of(source, config, with_target)
    form = source.form if isinstance(source, BenchmarkConfig) else "columns"
    rows = (
        row if isinstance(row, BadRow) else _parse(row, table, number, columns, form)
        for table in _tables(source, config, columns)
        for number, row in table.rows
    )
    kept = islice(rows, source.count)
    return with_problems(kept, source.problem_by) if isinstance(source, BenchmarkConfig) else kept


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
    if has_known_names(source):
        yield from _tables_with_known_names(source, columns)
        return
    files = data_files(source)
    base = Path(source.source)
    root = Path(config.image_root) if config.image_root else None
    if root is not None and not root.is_dir():
        raise UserError(f"data.image_root: {root}: no such directory: correct it")
    for file in files:
        stem = str(file.relative_to(base).with_suffix("")) if base.is_dir() else file.stem
        yield _Table(str(file), stem, root or file.parent, _rows_of(file, (*vars(columns).values(), "id")))
    if not files:
        table = undecoded(hub_data_set(source), columns.images, columns.saliency)
        name = f"{source.source} ({source.split})"
        yield _Table(name, source.split, root, _of_hub(table, name))


def _tables_with_known_names(source: BenchmarkConfig, columns: Columns) -> Iterator[_Table]:
    """Return the files of a set whose publishers named them. Ids begin with the split's name, so that a set is the same
    in each kind of files."""
    files = files_here(source)
    used: tuple[str | None, ...] = (*vars(columns).values(), "id")
    if source.form != "columns":
        used = (*FORMS[source.form].columns, columns.problem_id)
    for index, file in enumerate(files.tables):
        stem = source.split if len(files.tables) == 1 else f"{source.split}-{index}"
        yield _Table(str(file), stem, files.image_root, _rows_of(file, used))


def _rows_of(file: Path, columns: Collection[str | None]) -> Iterator[tuple[int, dict | BadRow]]:
    """Return the rows of a file. columns: that are read; the others stand for None, or are there as well."""
    if file.suffix.lower() == ".json":
        return _json_array(file) if _begins_with(file, b"[") else _jsonl(file)
    return _jsonl(file) if is_jsonl(file) else _parquet(file, columns)


def _begins_with(file: Path, sign: bytes) -> bool:
    """Say whether the first character of a text, white space and byte order mark aside, is this one."""
    with reading(file, "correct its permissions or copy it again"), open(file, "rb") as stream:
        return stream.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip().startswith(sign)


def _json_array(file: Path) -> Iterator[tuple[int, dict | BadRow]]:
    """Yield the rows of a file that is one array of objects, as the authors' release has them, read as a whole."""
    with reading(file, "copy it again"):
        rows = json.loads(file.read_bytes().decode("utf-8-sig"), object_pairs_hook=_object_of_array)
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield number, row
        else:
            yield number, BadRow(f"{file}:{number}", "expected a JSON object with the columns of a row")


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
        require_unicode(text, "the line")
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


def _object_of_array(pairs: list[tuple[str, object]]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"an object has a key twice among {', '.join(shown(key) for key, _ in pairs)}")
    return dict(pairs)


def _parquet(file: Path, columns: Collection[str | None]) -> Iterator[tuple[int, dict | BadRow]]:
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
        used = [name for name in names if name in columns]
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


def _parse(row: dict, table: _Table, number: int, columns: Columns, form: str) -> SourceRow | BadRow:
    place = f"{table.name}:{number}"
    try:
        problem_id = None if columns.problem_id is None else key_of(row, columns.problem_id)
        if form != "columns":
            return _of_item(read_item(form, row), table, number, problem_id, tuple(row))
        return SourceRow(
            place=place,
            id=_identity(row, table, number),
            problem=text_of(row, columns.problem, "problem_key"),
            answer=text_of(row, columns.answer, "answer_key"),
            target=None if columns.target is None else text_of(row, columns.target, "target_key"),
            images=pictures_of(row, columns.images) or [],
            image_root=table.image_root,
            saliency=pictures_of(row, columns.saliency),
            problem_id=problem_id,
            columns=tuple(row),
        )
    except UserError as error:
        return BadRow(place, str(error))


def _of_item(item: Item, table: _Table, number: int, problem_id: str | None, columns: tuple[str, ...]) -> SourceRow:
    return SourceRow(
        place=f"{table.name}:{number}",
        id=f"{table.stem}-{number}",
        problem=item.problem,
        answer=item.answer,
        images=list(item.images),
        image_root=table.image_root,
        options=tuple(item.options),
        problem_id=problem_id,
        columns=columns,
    )


def _identity(row: dict, table: _Table, number: int) -> str:
    value = row.get("id")
    name = f"{table.stem}-{number}" if value is None else str(value)
    require_unicode(name, "id")
    return name

"""Rows of a data set, one at a time: JSONL, parquet, a directory of such files, or a Hugging Face data set.

The layout is that of PAPO_ViRL39K: a problem with `<image>` places, an answer, and a list of images, each a path, raw
bytes or {"bytes": ..., "path": ...}. Column names come from the data section of the configuration; a column `id` is
used where there is one.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_papo.config import DataConfig, PromptSource
from megatron_papo.errors import UserError

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".parquet")
_PARQUET_BATCH = 32
"""Rows held in memory at once: each may carry megabytes of pictures."""


@dataclass(frozen=True)
class RowPictures:
    """The pictures of a row and the saliency maps that go with them."""

    place: str
    """`file:row`, rows counted from 1, for messages."""
    images: list[bytes | str]
    """Encoded pictures, or paths below `image_root`."""
    image_root: Path | None
    """None: a path is an error."""
    saliency: list[bytes | str] | None = None
    """A saliency map per picture: files likewise; None where the row has none."""


@dataclass(frozen=True, kw_only=True)
class SourceRow(RowPictures):
    """A row as the data set has it, columns named as this package names them."""

    id: str
    problem: str
    answer: str
    target: str | None


def data_files(source: str) -> list[Path]:
    """Return the files that a source stands for, sorted; [] if it is the name of a Hugging Face data set. Raises
    UserError."""
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{path}: no {' or '.join(SUFFIXES)} file in this directory: name another data source")
        return files
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: expected {' or '.join(SUFFIXES)}: convert the file")
        return [path]
    if path.suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such file or directory: correct the data source")
    return []


def read_rows(source: PromptSource, config: DataConfig, with_target: bool) -> Iterator[SourceRow]:
    """Return the rows of a source in order, at most source.count of them. Raises UserError naming file and row at the
    first bad one."""
    columns = [config.problem_key, config.answer_key, config.images_key, config.saliency_key, "id"]
    if with_target:
        columns.append(config.target_key)
    rows = (
        _parse(row, table, number, config, with_target)
        for table in _tables(source, config, columns)
        for number, row in enumerate(table.rows, 1)
    )
    return islice(rows, source.count)


def read_pictures(source: PromptSource, config: DataConfig) -> Iterator[RowPictures]:
    """Return the pictures of the rows of read_rows, without a look at the other columns."""
    rows = (
        _parse_pictures(row, f"{table.name}:{number}", table.image_root, config)
        for table in _tables(source, config, [config.images_key, config.saliency_key])
        for number, row in enumerate(table.rows, 1)
    )
    return islice(rows, source.count)


@dataclass(frozen=True)
class _Table:
    name: str
    """For messages."""
    stem: str
    """What the ids of its rows begin with, where they have none of their own."""
    image_root: Path | None
    rows: Iterable[dict]


def _tables(source: PromptSource, config: DataConfig, columns: list[str]) -> Iterator[_Table]:
    """Return the files of a source one after the other, or the Hugging Face data set."""
    files = data_files(source.source)
    base = Path(source.source)
    root = Path(config.image_root) if config.image_root else None
    for file in files:
        stem = str(file.relative_to(base).with_suffix("")) if base.is_dir() else file.stem
        rows = _jsonl(file) if file.suffix == ".jsonl" else _parquet(file, columns)
        yield _Table(str(file), stem, root or file.parent, rows)
    if not files:
        table = undecoded(_hugging_face(source), config.images_key, config.saliency_key)
        yield _Table(f"{source.source} ({source.split})", source.split, root, table)


def _jsonl(file: Path) -> Iterator[dict]:
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}:{number}: not JSON ({error}): the file is truncated or damaged")
            if not isinstance(row, dict):
                raise UserError(f"{file}:{number}: expected a JSON object with the columns of a row")
            yield row


def _parquet(file: Path, columns: list[str]) -> Iterator[dict]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        present = [name for name in columns if name in table.schema_arrow.names]
        for batch in table.iter_batches(batch_size=_PARQUET_BATCH, columns=present):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: cannot be read as parquet ({' '.join(str(error).split())}): the file is truncated or damaged"
        )


def hugging_face_fingerprint(source: PromptSource) -> str:
    """Return how the datasets library tells this data set and split from others: by name, configuration, version and
    the commit that was downloaded. Raises UserError where it cannot be loaded."""
    return _hugging_face(source)._fingerprint


def _hugging_face(source: PromptSource) -> "datasets.Dataset":
    import datasets

    try:
        return datasets.load_dataset(source.source, split=source.split)
    # Whatever is wrong (no network, no such name, no such split), datasets raises one of a dozen types.
    except Exception as error:
        raise UserError(
            f"{source.source}: no such file, and the Hugging Face data set of this name cannot be loaded"
            f" ({type(error).__name__}: {' '.join(str(error).split())[:200]}): check name, split and network, or give"
            " a directory"
        )


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


def _parse(row: dict, table: _Table, number: int, config: DataConfig, with_target: bool) -> SourceRow:
    place = f"{table.name}:{number}"
    identity = row.get("id")
    return SourceRow(
        id=f"{table.stem}-{number}" if identity is None else str(identity),
        problem=_text(row, config.problem_key, "problem_key", place),
        answer=_text(row, config.answer_key, "answer_key", place),
        target=_text(row, config.target_key, "target_key", place) if with_target else None,
        **vars(_parse_pictures(row, place, table.image_root, config)),
    )


def _parse_pictures(row: dict, place: str, root: Path | None, config: DataConfig) -> RowPictures:
    return RowPictures(
        place=place,
        images=_pictures(row.get(config.images_key), f"{place}: {config.images_key}") or [],
        image_root=root,
        saliency=_pictures(row.get(config.saliency_key), f"{place}: {config.saliency_key}"),
    )


def _text(row: dict, column: str, key: str, place: str) -> str:
    if column not in row:
        raise UserError(f"{place}: no column {column} (there are: {', '.join(map(str, row))}): set data.{key}")
    value = row[column]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: {column} is {value!r}, expected a text: correct or drop the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {column} is not valid Unicode (position {error.start}): correct or drop the row")
    return value


def _pictures(value: object, place: str) -> list[bytes | str] | None:
    """Return the pictures of a column, a list of them or a single one; None where there is nothing at all."""
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    return [_picture(item, f"{place}[{index}]") for index, item in enumerate(items)]


def _picture(item: object, place: str) -> bytes | str:
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if not isinstance(item, (bytes, str)) or not item:
        raise UserError(
            f"{place}: expected a path, bytes or {{bytes, path}}, got {str(item)[:60]!r}: correct or drop the row"
        )
    return item

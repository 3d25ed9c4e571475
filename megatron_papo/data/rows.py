"""Rows of a data set, one at a time: JSONL, parquet, a directory of such files, or a Hugging Face data set.

The layout is that of PAPO_ViRL39K: a problem with `<image>` places, an answer, and a list of images, each a path, raw
bytes or {"bytes": ..., "path": ...}. Column names come from the data section of the configuration; a column `id` is
used where there is one.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_papo.config import DataConfig, PromptSource
from megatron_papo.errors import UserError

SUFFIXES = (".jsonl", ".parquet")
_PARQUET_BATCH = 32
"""Rows held in memory at once: each may carry megabytes of pictures."""


@dataclass(frozen=True)
class Row:
    where: str
    """`file:row`, rows counted from 1, for messages."""
    id: str
    problem: str
    answer: str
    images: list[bytes | str]
    """Encoded pictures, or paths below `image_root`."""
    image_root: Path | None
    target: str | None
    saliency: list[bytes | str] | None = None
    """A saliency map per picture: files likewise; None where the row has none."""


def data_files(source: str) -> list[Path]:
    """The files that a source stands for, sorted; [] if it is the name of a Hugging Face data set. Raises UserError."""
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


def read_rows(source: PromptSource, config: DataConfig, with_target: bool) -> Iterator[Row]:
    """The rows of a source in order, at most source.count of them. Raises UserError naming file and row at the first
    bad one."""
    rows = _rows(source, config, with_target)
    for _, row in zip(range(source.count), rows) if source.count else enumerate(rows):
        yield row


def _rows(source: PromptSource, config: DataConfig, with_target: bool) -> Iterator[Row]:
    files = data_files(source.source)
    columns = [config.problem_key, config.answer_key, config.images_key, config.saliency_key, "id"] + with_target * [
        config.target_key
    ]
    base = Path(source.source)
    for file in files:
        stem = str(file.relative_to(base).with_suffix("")) if base.is_dir() else file.stem
        table = _jsonl(file) if file.suffix == ".jsonl" else _parquet(file, columns)
        root = Path(config.image_root) if config.image_root else file.parent
        yield from _parse_table(table, str(file), stem, root, config, with_target)
    if not files:
        root = Path(config.image_root) if config.image_root else None
        table = _hugging_face(source, config.images_key, config.saliency_key)
        yield from _parse_table(table, f"{source.source} ({source.split})", source.split, root, config, with_target)


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


def _hugging_face(source: PromptSource, *picture_keys: str) -> Iterable[dict]:
    import datasets

    try:
        table = datasets.load_dataset(source.source, split=source.split)
    # Whatever is wrong (no network, no such name, no such split), datasets raises one of a dozen types.
    except Exception as error:
        raise UserError(
            f"{source.source}: no such file, and the Hugging Face data set of this name cannot be loaded"
            f" ({type(error).__name__}: {' '.join(str(error).split())[:200]}): check name, split and network, or give"
            " a directory"
        )
    return undecoded(table, *picture_keys)


def undecoded(table, *picture_keys: str) -> Iterable[dict]:
    """A datasets.Dataset whose pictures, in the columns of these names, come as the bytes they were stored as."""
    import datasets

    for key in picture_keys:
        feature = table.features.get(key)
        if isinstance(feature, datasets.Image):
            table = table.cast_column(key, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(key, datasets.List(datasets.Image(decode=False)))
    return table


def _parse_table(
    table: Iterable[dict], where: str, stem: str, root: Path | None, config: DataConfig, with_target: bool
) -> Iterator[Row]:
    for number, row in enumerate(table, 1):
        yield _parse(row, f"{where}:{number}", f"{stem}-{number}", root, config, with_target)


def _parse(row: dict, where: str, default_id: str, root: Path | None, config: DataConfig, with_target: bool) -> Row:
    identity = row.get("id")
    return Row(
        where=where,
        id=default_id if identity is None else str(identity),
        problem=_text(row, config.problem_key, "problem_key", where),
        answer=_text(row, config.answer_key, "answer_key", where),
        images=_images(row.get(config.images_key), f"{where}: {config.images_key}") or [],
        image_root=root,
        target=_text(row, config.target_key, "target_key", where) if with_target else None,
        saliency=_images(row.get(config.saliency_key), f"{where}: {config.saliency_key}"),
    )


def _text(row: dict, column: str, key: str, where: str) -> str:
    if column not in row:
        raise UserError(f"{where}: no column {column} (there are: {', '.join(map(str, row))}): set data.{key}")
    value = row[column]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {column} is {value!r}, expected a text: correct or drop the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {column} is not valid Unicode (position {error.start}): correct or drop the row")
    return value


def _images(value, where: str) -> list[bytes | str] | None:
    """A list, one picture, or nothing at all: None."""
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    return [_image(item, f"{where}[{index}]") for index, item in enumerate(items)]


def _image(item, where: str) -> bytes | str:
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if not isinstance(item, (bytes, str)) or not item:
        raise UserError(
            f"{where}: expected a path, bytes or {{bytes, path}}, got {str(item)[:60]!r}: correct or drop the row"
        )
    return item

"""Which files of a directory, or of a data set on the Hugging Face hub, an evaluation set is made of: its table and its
pictures, under the names that their publishers gave them.

The authors' release calls one split by several names: its parquet file, the JSON that its downloader writes, the JSON
that its own list of files asks for, and the archive of its pictures agree up to - and _, or not even so. All are taken.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from megatron_papo.config import BenchmarkConfig, PromptSource
from megatron_papo.data.sources import data_files
from megatron_papo.errors import UserError
from megatron_papo.pictures.archive import is_archive
from megatron_papo.reading import reading, shown

KINDS = (".parquet", ".jsonl", ".json")
"""Endings of table files; where a split has several kinds, the first is read."""
_NAME = re.compile(r"(?P<stem>.+?)(-(?P<index>\d+)-of-(?P<total>\d+)(-[0-9a-f]+)?)?(?P<kind>\.parquet|\.jsonl|\.json)")
_OF_ARCHIVE = re.compile(r"(_images)?\.zip$", re.IGNORECASE)
_UNPACKED = "images"
"""The folder that an archive of the release unpacks to."""


@dataclass(frozen=True)
class SetFiles:
    """What is there of an evaluation set, and what is not."""

    tables: list[Path]
    image_root: Path | None
    """Archive, or directory, that the paths of pictures start from; None: none of the set's own."""
    missing: list[str]
    """A line for each thing that is not there, with what to do."""


def has_known_names(source: PromptSource) -> TypeGuard[BenchmarkConfig]:
    """Say whether a source is a set whose files have the names of its publishers, and not any."""
    return isinstance(source, BenchmarkConfig) and (source.form != "columns" or source.image_archive is not None)


def is_hub_name(source: PromptSource) -> bool:
    """Say whether a source is called like a data set on the Hugging Face hub, and nothing on this machine is."""
    name = source.source
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def files_of(source: PromptSource) -> SetFiles:
    """Return the files of a source on this machine, no tables where it is the name of a data set on the hub. Raises
    UserError, a line each, for what is not there."""
    files = set_files(source)
    if files.missing:
        raise UserError(*files.missing)
    return files


def set_files(source: PromptSource) -> SetFiles:
    """Return what files_of returns, with a line for each thing that is not there. Raises UserError where the source as
    a whole is not, or is none that can be read."""
    if not has_known_names(source):
        return SetFiles(data_files(source), None, [])
    if is_hub_name(source):
        return SetFiles([], None, [])
    place = Path(source.source)
    with reading(place, "correct the source of the evaluation set"):
        if not place.exists():
            raise UserError(
                f"{shown(place)}: no such file or directory: correct the source of the evaluation set, or download it:"
                f" .venv/bin/python -m tools.suite fetch --suite FILE --source {shlex.quote(shown(place))}"
            )
        if not place.is_dir():
            return _with_pictures(source, [place], [], [place.parent, place.parent.parent])
        if source.form == "columns":
            return _with_pictures(source, data_files(source), [], [place])
        names = [path.relative_to(place).as_posix() for path in (*place.iterdir(), *place.glob("*/*"))]
        names = [name for name in names if not name.startswith((".", f"{_UNPACKED}/")) and (place / name).is_file()]
    tables, missing = tables_of(names, source, str(place))
    folders = [place, *dict.fromkeys((place / name).parent for name in tables)]
    return _with_pictures(source, [place / name for name in tables], missing, folders)


def tables_of(names: Iterable[str], source: BenchmarkConfig, place: str) -> tuple[list[str], list[str]]:
    """Return which of the names are the tables of a set's split, in order, and a line for each thing that is missing or
    could be two things.

    Args:
        names: of files, with / between folders.
        source: its split is a name, or FOLDER/NAME where several folders have it.
        place: where they are, for messages.
    """
    folder, _, split = source.split.rpartition("/")
    stems = {_alike(split), *([_alike(_OF_ARCHIVE.sub("", source.image_archive))] if source.image_archive else [])}
    found: dict[str, dict[str, list[tuple[int, int, str]]]] = {}
    for name in sorted(names):
        parent, _, last = name.rpartition("/")
        match = _NAME.fullmatch(last)
        if match is not None and _alike(match["stem"]) in stems and (not folder or parent == folder):
            shard = (int(match["index"] or 0), int(match["total"] or 1), name)
            found.setdefault(match["kind"], {}).setdefault(parent, []).append(shard)
    kind = next((kind for kind in KINDS if kind in found), None)
    if kind is None:
        wanted = f"{shown(source.split)}-00000-of-00001.parquet or {shown(source.split)}.json"
        return [], [f"{place}: no table of split {shown(source.split)} ({wanted}): download it, or set split"]
    if len(found[kind]) > 1:
        ways = " and ".join(shown(f"{parent or '.'}/{split}") for parent in found[kind])
        return [], [f"{place}: split {shown(source.split)} is there as {ways}: set split to FOLDER/{shown(split)}"]
    [shards] = found[kind].values()
    shards.sort()
    [first, *_], total = shards, shards[0][1]
    if [shard[:2] for shard in shards] != [(index, total) for index in range(total)]:
        return [], [
            f"{place}: {len(shards)} files like {shown(first[2])} where {total} belong together: download them again,"
            " and move others out"
        ]
    return [name for _, _, name in shards], []


def archive_among(names: Iterable[str], source: BenchmarkConfig) -> str | None:
    """Return which of the names is the archive of a set's pictures; None: none of them."""
    if source.image_archive is None:
        return None
    alike = sorted(name for name in names if _alike(Path(name).name) == _alike(source.image_archive))
    exact = [name for name in alike if Path(name).name == source.image_archive]
    return next(iter(exact or alike), None)


def _with_pictures(
    source: BenchmarkConfig, tables: list[Path], missing: list[str], folders: Sequence[Path]
) -> SetFiles:
    """Return the files of a set with the archive of its pictures, or the directory that it was unpacked to.

    Args:
        source: the set.
        tables: that are there.
        missing: what to say of others.
        folders: that archive or directory may lie in.
    """
    if source.image_archive is None:
        return SetFiles(tables, tables[0].parent if tables else None, missing)
    with reading(folders[0], "correct its permissions"):
        archives = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if is_archive(path)]
        chosen = archive_among([str(path) for path in archives if path.is_file()], source)
        if chosen is not None:
            return SetFiles(tables, Path(chosen), missing)
        for folder in (*folders, folders[0] / "data"):
            if (folder / _UNPACKED).is_dir():
                return SetFiles(tables, folder, missing)
    line = f"{folders[0]}: no archive {shown(source.image_archive)}, and no folder {_UNPACKED}/ that it unpacks to:"
    return SetFiles(tables, None, [*missing, f"{line} download it, or correct image_archive"])


def _alike(name: str) -> str:
    return name.replace("-", "_")

"""Where the rows of a source are: its files, told apart by split and kind, and what to do about what is none."""

import os
import re
from pathlib import Path

from megatron_papo.config import PromptSource
from megatron_papo.errors import UserError
from megatron_papo.reading import in_short, reading, shown

SUFFIXES = (".jsonl", ".parquet")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What files and folders of a split are called, as the datasets library reads them too."""
_CONVERTED = {".json": "json", ".csv": "csv", ".tsv": "csv", ".gz": "json", ".zst": "json"}
"""Ending of a file that is not read -> how the datasets library reads it."""
_SAVED_TO_DISK = ("dataset_info.json", "dataset_dict.json", "state.json")


def data_files(source: PromptSource) -> list[Path]:
    """Return the files that a source stands for, sorted; [] if it is the name of a Hugging Face data set.

    Of a directory: all .jsonl and .parquet files below it, but for those whose name, or a folder's, begins with a dot;
    where names tell splits, those of source.split. Raises UserError for anything else that is there, or is not.
    """
    path = Path(source.source)
    with reading(path, "correct the data source"):
        if path.is_dir():
            return _of_directory(path, source.split)
        if path.is_file():
            return [_readable(path)]
    name = source.source
    if _is_table(path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "://" in name:
        raise UserError(f"{shown(name)}: no such file or directory: correct the data source")
    return []


def _of_directory(directory: Path, split: str) -> list[Path]:
    files = _all_files(directory)
    others = [file for file in files if file.suffix.lower() in _CONVERTED]
    files = [file for file in files if _is_table(file)]
    if not files:
        if any((directory / name).exists() for name in _SAVED_TO_DISK):
            raise UserError(
                f"{directory}: made by save_to_disk, which is not read: write it as parquet:"
                f' .venv/bin/python -c "import datasets;'
                f" datasets.load_from_disk('{directory}').to_parquet('{directory}.parquet')\" (of a DatasetDict, one"
                " split of it)"
            )
        hint = converting(others[0]) if others else "name another data source"
        raise UserError(f"{directory}: no {' or '.join(SUFFIXES)} file in this directory: {hint}")
    for file in files:
        with reading(file, "its name is not UTF-8: rename it"):
            str(file).encode()
    return _of_split(files, directory, split)


def _all_files(directory: Path) -> list[Path]:
    """Return all files below a directory, sorted, links followed, each folder once. Raises UserError for what may hold
    rows and is not read: a link to nothing, a closed folder, and a second name of a folder with data files."""
    files, again, seen = [], [], {directory.resolve()}
    for folder, folders, names in os.walk(directory, followlinks=True, onerror=_refuse_folder):
        below = [Path(folder, name) for name in sorted(folders) if not name.startswith(".")]
        folders.clear()
        for path in below:
            if path.resolve() in seen:
                again.append(path)
            else:
                seen.add(path.resolve())
                folders.append(path.name)
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    for file in files:
        if file.is_symlink() and not file.exists() and (_is_table(file) or not file.suffix):
            raise UserError(f"{file}: a link to nothing: copy the data again, links followed, or remove it")
        if _is_table(file) and not file.is_file():
            raise UserError(f"{file}: not a file: copy the data again, or remove it")
    homes = {file.parent.resolve() for file in files if _is_table(file)} if again else set()
    for path in again:
        if any(home.is_relative_to(path.resolve()) for home in homes):
            raise UserError(f"{path}: its data files are read under another name too: remove the link to this folder")
    return sorted(files)


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{shown(error.filename)}: {in_short(error)}: correct its permissions, or name another data source")


def _of_split(files: list[Path], directory: Path, split: str) -> list[Path]:
    """Return the files of a split; all of them where no name tells one."""
    splits = {file: _split_of(file, directory) for file in files}
    named = sorted({name for name in splits.values() if name is not None})
    if not named:
        return files
    unnamed = [file for file, name in splits.items() if name is None]
    if unnamed:
        raise UserError(
            f"{directory}: {unnamed[0].relative_to(directory)} belongs to no split, other files to {', '.join(named)}:"
            " name a single file as the source, or move the others out"
        )
    wanted = next((name for name, words in SPLITS.items() if split.lower() in words), split)
    chosen = [file for file, name in splits.items() if name == wanted]
    if not chosen:
        raise UserError(
            f"{directory}: no file of split {split}, only of {', '.join(named)} (as {files[0].relative_to(directory)}"
            " is called): set split to one of them, or name the file itself as the data source"
        )
    return chosen


def _split_of(file: Path, directory: Path) -> str | None:
    """Return the split that a file's name, or else that of the nearest folder, tells: train, validation, test, or what
    stands before the numbers of name-00000-of-00009. Raises UserError where a name tells two of them."""
    name = file.relative_to(directory)
    for part in (name.stem, *(parent.name for parent in name.parents)):
        words = re.split(r"[^a-z]+", part.lower())
        told = [split for split, aliases in SPLITS.items() if not set(words).isdisjoint(aliases)]
        if len(told) > 1:
            raise UserError(
                f"{file}: {shown(part)} tells two splits, {' and '.join(told)}: rename it by the one that it is, or"
                " name a single file as the data source"
            )
        if told:
            return told[0]
    shard = re.match(r"(.+)-\d+-of-\d+", name.stem)
    return None if shard is None else shard[1]


def _is_table(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def is_jsonl(file: Path) -> bool:
    """Say whether a data file has a row per line; the others are parquet."""
    return file.suffix.lower() == ".jsonl"


def _readable(file: Path) -> Path:
    if not _is_table(file):
        raise UserError(f"{file}: expected {' or '.join(SUFFIXES)}: {converting(file)}")
    return file


def converting(file: Path) -> str:
    """Say how a file becomes one that is read."""
    kind = _CONVERTED.get(file.suffix.lower(), "json" if is_jsonl(file) else "")
    if not kind:
        return "convert the file"
    target = file.with_name(file.name.split(".")[0] + "_converted.jsonl")
    arguments = f"'{kind}', data_files='{file}', split='train'" + (", sep='\\t'" if file.suffix == ".tsv" else "")
    return (
        f"convert it: .venv/bin/python -c \"import datasets; datasets.load_dataset({arguments}).to_json('{target}')\""
    )

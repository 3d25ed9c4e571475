"""Evaluation sets that lie on the Hugging Face hub under names of their own: the files of a set, and no others, come
into the libraries' cache, or from there alone where HF_HUB_OFFLINE is set."""

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_papo.config import BenchmarkConfig, PromptSource
from megatron_papo.data.set_files import (
    SetFiles,
    archive_among,
    files_of,
    has_known_names,
    is_hub_name,
    set_files,
    tables_of,
)
from megatron_papo.errors import UserError
from megatron_papo.reading import reading, shown

_CURE = (
    "check name, split and network, or give a local copy with --set evaluation.source=DIR; for a machine without a"
    " network: .venv/bin/python -m tools.suite fetch where there is one"
)


@dataclass(frozen=True)
class Wanted:
    """Files of a data set on the hub that an evaluation set is made of."""

    sizes: dict[str, int]
    """Name -> bytes."""
    missing: list[str]
    """A line for each thing that the hub does not have."""


def wanted_files(source: BenchmarkConfig, sizes: Mapping[str, int]) -> Wanted:
    """Return the files of a set among those of its data set. sizes: name -> bytes."""
    place = f"{shown(source.source)} on the hub"
    tables, missing = tables_of(sizes, source, place)
    archive = archive_among(sizes, source)
    if source.image_archive is not None and archive is None:
        missing = [*missing, f"{place}: no archive {shown(source.image_archive)}: correct image_archive"]
    names = tables if archive is None else [*tables, archive]
    return Wanted({name: sizes[name] for name in names}, missing)


def sizes_on_hub(name: str) -> dict[str, int]:
    """Return the files of a data set on the hub and their bytes. Whatever the libraries raise goes through."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    entries = HfApi().list_repo_tree(name, recursive=True, repo_type="dataset")
    return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


def download(name: str, files: Mapping[str, int], directory: Path | None = None) -> Path:
    """Download files of a data set, what is there already not again, and return the directory that they are in.
    Whatever the libraries raise goes through.

    Args:
        name: on the hub.
        files: by their names.
        directory: where to; None: the libraries' cache.
    """
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(file) for file in files]
    return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns, local_dir=directory))


def files_here(source: PromptSource) -> SetFiles:
    """Return the files of a source on this machine; those of a set with known names come from the hub where its source
    is called like a data set there. Raises UserError, a line each, for what is not there, or does not come."""
    if has_known_names(source) and is_hub_name(source):
        return _from_hub(source)
    return files_of(source)


def _from_hub(source: BenchmarkConfig) -> SetFiles:
    name = source.source
    what = f"{name}: no such directory, and the Hugging Face data set of this name cannot be loaded"
    try:
        with reading(what, _CURE):
            if is_offline():
                raise ConnectionError("HF_HUB_OFFLINE is set")
            wanted = wanted_files(source, sizes_on_hub(name))
            if wanted.missing:
                raise UserError(*wanted.missing)
            here = source.model_copy(update={"source": str(download(name, wanted.sizes))})
    except UserError:
        cached = in_cache(source)
        if cached is None or set_files(cached).missing:
            raise
        here = cached
    return files_of(here)


def is_offline() -> bool:
    """Say whether the Hugging Face libraries were told to use no network."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def in_cache(source: BenchmarkConfig) -> BenchmarkConfig | None:
    """Return a set of the hub as one that lies in the libraries' cache; None: nothing of its data set does."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    none: list[str] = []  # of the data set's files must be there: those of other sets may be missing
    try:
        directory = snapshot_download(source.source, repo_type="dataset", local_files_only=True, allow_patterns=none)
    except LocalEntryNotFoundError:
        return None
    return source.model_copy(update={"source": directory})


def there_already(name: str, file: str, size: int, directory: Path | None) -> bool:
    """Say whether a file of a data set is on this machine. As `download`; size: of the file on the hub, in bytes."""
    from huggingface_hub import try_to_load_from_cache

    if directory is not None:
        return (directory / file).is_file() and (directory / file).stat().st_size == size
    return isinstance(try_to_load_from_cache(name, file, repo_type="dataset"), str)

"""What comes from outside a run, told apart by its content; hashed once, and again when a file's size or time
changes."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter

from megatron_papo.errors import UserError
from megatron_papo.reading import reading
from megatron_papo.run.room import replace_file

MEMORY = ".outside.json"


def remembered_fingerprint(root: Path | None, path: Path, fingerprint: Callable[[Path], str]) -> str:
    """Return the fingerprint of a file or directory, from the run's memory where nothing in it has changed.

    Args:
        root: Run directory that remembers; None: hash it.
        path: File or directory from outside.
        fingerprint: Hashes its content.
    """
    if root is None or not root.is_dir():
        return fingerprint(path)
    memory = _read(root / MEMORY)
    key, stamps = str(path.resolve()), _stamps(path)
    known = memory.get(key)
    if known is None or known.stamps != stamps:
        known = _Known(stamps=stamps, fingerprint=fingerprint(path))
        _write(root / MEMORY, memory | {key: known})
    return known.fingerprint


def _stamps(path: Path) -> str:
    """Return a hash of the names, sizes and times of the files of `path`."""
    with reading(path, "copy it again, or correct its permissions"):
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        rows = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class _Known(BaseModel):
    model_config = ConfigDict(strict=True)
    stamps: str
    fingerprint: str


_MEMORY = TypeAdapter(dict[str, _Known])


def _read(path: Path) -> dict[str, _Known]:
    """Return what is remembered; a memory that cannot be read is none: everything is hashed again."""
    try:
        return _MEMORY.validate_json(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _write(path: Path, memory: dict[str, _Known]) -> None:
    with suppress(UserError):  # a read-only run, or a full disk: hashed again next time
        replace_file(path, json.dumps({key: known.model_dump() for key, known in memory.items()}, indent=1))

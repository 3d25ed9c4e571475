"""What comes from outside a run, told apart by its content; hashed once, and again when a file's size or time
changes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

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
    known = memory.get(key, {})
    if known.get("stamps") != stamps:
        known = {"stamps": stamps, "fingerprint": fingerprint(path)}
        _write(root / MEMORY, memory | {key: known})
    return known["fingerprint"]


def _stamps(path: Path) -> str:
    """Return a hash of the names, sizes and times of the files of `path`."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    rows = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read(path: Path) -> dict[str, dict[str, str]]:
    """Return what is remembered; a memory that cannot be read is none: everything is hashed again."""
    try:
        memory = json.loads(path.read_text())
        return {key: dict(value) for key, value in memory.items() if set(value) == {"stamps", "fingerprint"}}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(path: Path, memory: dict[str, dict[str, str]]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(memory, indent=1))
        partial.replace(path)
    except OSError:  # a read-only run: hashed again next time
        partial.unlink(missing_ok=True)

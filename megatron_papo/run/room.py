"""Room on disks: asked for before work that needs it, and what to say where a disk refuses."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from megatron_papo.errors import UserError

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""No space, no more of a quota, mounted read-only, a file too large: never the fault of what was to be written."""


def require_room(path: Path, num_bytes: int, what: str = "") -> None:
    """Raise UserError where a disk has less room than is needed; a quota may still refuse later.

    Args:
        path: File or directory to make.
        num_bytes: How much it will hold.
        what: What takes so much, for the message.
    """
    place = existing_parent(path)
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise UserError(
            f"{path}: needs {num_bytes / 1e9:,.1f} GB{what and f' ({what})'}, {place} has {free / 1e9:,.1f} GB free:"
            " free space there or choose another place"
        )


def existing_parent(path: Path) -> Path:
    """Return the nearest directory on the way to a path that is there."""
    return next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.is_dir())


def refusal(error: BaseException | None) -> str | None:
    """Return why a disk refused to take more, where that is what an exception says or was caused by; else None.

    Libraries that write by themselves raise exceptions of their own, with the system's words in them.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSALS:
            return os.strerror(error.errno)
        for code in _REFUSALS[:2]:
            if os.strerror(code) in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


def cannot_write(path: object, why: str) -> UserError:
    """Return what to say where a disk refused."""
    return UserError(f"{path}: cannot write ({why}): free space there, or choose another place")


def replace_file(path: Path, text: str) -> None:
    """Write a small file that is there whole, or as it was before. Raises UserError where the disk refuses."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise cannot_write(path, error.strerror or str(error))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. File systems that cannot (CIFS, FUSE, Ceph say EINVAL or ENOTSUP) do it
    by themselves, or not at all."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)

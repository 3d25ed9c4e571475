"""Pictures that lie in a zip archive are read from there: nothing is unpacked, so that no name in it can reach another
place, and no member takes more memory than a picture may."""

import functools
import io
import zipfile
from pathlib import Path, PurePosixPath

from megatron_papo.errors import UserError
from megatron_papo.reading import reading, shown

LARGEST = 64 << 20
"""Bytes of one member, unpacked."""
LARGEST_LIST = 16 << 20
"""Bytes of an archive's list of members, enough for a hundred thousand: it is read as a whole."""
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Ways of packing that zipfile unpacks piece by piece; of the others a small member may fill the memory at once."""
_ENCRYPTED = 0x1
"""Bit of a member's flags."""
_CHUNK = 1 << 20
_AGAIN = "download it again"


def is_archive(path: Path) -> bool:
    """Say whether a path is that of a zip archive, by its name."""
    return path.suffix.lower() == ".zip"


def read_member(archive: Path, name: str, what: str = "image") -> bytes:
    """Return the content of a member. Raises UserError for one that is not there or cannot be trusted: called like
    another, encrypted, damaged, or larger than LARGEST, whatever its header says.

    Args:
        archive: zip file.
        name: of the member, as a path from the root of the archive on.
        what: to call it in messages.
    """
    member = require_member(archive, name, what)
    place = _place(archive, name, what)
    with reading(place, _AGAIN), _archive(archive)[0].open(member) as stream:
        return _read_at_most(stream, place)


def require_member(archive: Path, name: str, what: str = "image") -> zipfile.ZipInfo:
    """Return what the archive's list says of a member. Raises UserError as read_member, but does not read it."""
    place = _place(archive, name, what)
    members = _archive(archive)[1].get(_plain(name, place), [])
    if not members:
        raise UserError(f"{place}: not in this archive: {_AGAIN}, or drop the row")
    if len(members) > 1:
        raise UserError(f"{place}: {len(members)} members of the archive have this name: {_AGAIN}")
    [member] = members
    if member.flag_bits & _ENCRYPTED:
        raise UserError(f"{place}: encrypted: unpack the archive, and remove it from beside the data")
    if member.compress_type not in _BOUNDED:
        raise UserError(f"{place}: packed in a way that is not read: pack the archive again, with zip's own deflate")
    if member.file_size > LARGEST:
        raise _too_large(place)
    return member


def _place(archive: Path, name: str, what: str) -> str:
    return f"{archive}: {what} {shown(name)}"


def _read_at_most(stream, place: str) -> bytes:
    """Return what a member unpacks to, without unpacking more than LARGEST and a chunk of it."""
    pieces, size = [], 0
    while piece := stream.read(_CHUNK):
        size += len(piece)
        if size > LARGEST:
            raise _too_large(place)
        pieces.append(piece)
    return b"".join(pieces)


def _too_large(place: str) -> UserError:
    return UserError(f"{place}: more than {LARGEST >> 20} MiB, too large for a picture: replace it or drop the row")


def _plain(name: str, place: str) -> str:
    """Return a name without its dots. Raises UserError for one that leads out of the archive."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise UserError(f"{place}: a name that leads out of the archive: correct it or drop the row")
    return "/".join(parts)


def _archive(archive: Path) -> tuple[zipfile.ZipFile, dict[str, list[zipfile.ZipInfo]]]:
    """Return an open archive and its files by their names. Raises UserError where it is none."""
    with reading(archive, f"{_AGAIN}: it is no whole zip archive"):
        state = archive.stat()
        return _open(archive, state.st_mtime_ns, state.st_size)


class _File(io.BufferedReader):
    """A file that gives no more at once than a list of members may take. zipfile reads that in one piece, as long as
    the archive says it is, and everything else in smaller ones."""

    def read(self, size: int | None = -1, /) -> bytes:
        most = LARGEST_LIST + 1
        content = super().read(most if size is None or size < 0 else min(size, most))
        if len(content) > LARGEST_LIST:
            raise ValueError(f"its list of members takes more than {LARGEST_LIST >> 20} MiB")
        return content


@functools.lru_cache(maxsize=4)
def _open(archive: Path, mtime_ns: int, size: int) -> tuple[zipfile.ZipFile, dict[str, list[zipfile.ZipInfo]]]:
    """Open an archive once; one that was changed is another."""
    opened = zipfile.ZipFile(_File(io.FileIO(archive)))
    members: dict[str, list[zipfile.ZipInfo]] = {}
    for member in opened.infolist():
        parts = PurePosixPath(member.filename).parts
        if not member.is_dir() and ".." not in parts and not member.filename.startswith("/"):
            members.setdefault("/".join(parts), []).append(member)
    return opened, members

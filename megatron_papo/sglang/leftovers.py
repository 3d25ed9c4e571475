"""What a server leaves behind when it is killed, and how it is cleared away: shared memory, sockets, temporary files.

SGLang ends its own processes by SIGKILL, so none of them tidies up. Its temporary files and sockets get a directory of
their own; what it makes in /dev/shm is found while it runs, by what its processes have mapped, and is on record in
server.json.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
LONGEST_SOCKET = 100
"""Characters of the path of a Unix socket, of which the system allows 107."""


def temporary_directory(server_dir: Path) -> Path:
    """Make the directory for sockets and temporary files of a new server, empty, and return it.

    It is tmp/ in the server directory, unless sockets cannot be there (a long path, a network file system); then it is
    one in the system's temporary directory.
    """
    inside = server_dir / "tmp"
    shutil.rmtree(inside, ignore_errors=True)
    inside.mkdir(mode=0o700, parents=True)
    if _holds_sockets(inside):
        return inside
    shutil.rmtree(inside, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix="sglang-"))


def _holds_sockets(directory: Path) -> bool:
    path = directory / "socket"
    if len(os.fsencode(path)) > LONGEST_SOCKET:
        return False
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def shared_memory_of(pids: Iterable[int]) -> list[str]:
    """Return the files in /dev/shm that processes have mapped, or have put their number in the name of."""
    pids = list(pids)
    mapped = {inode for pid in pids for inode in _mapped(pid)}
    numbers = [f"_{pid}_" for pid in pids]
    found = []
    with suppress(OSError):
        for entry in os.scandir(SHARED_MEMORY):
            with suppress(OSError):
                if entry.inode() in mapped or any(number in entry.name for number in numbers):
                    found.append(entry.path)
    return sorted(found)


def _mapped(pid: int) -> set[int]:
    """Return the inodes of /dev/shm that a process has mapped; a named semaphore has lost the name that it was made
    by."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {int(line.split(maxsplit=5)[4]) for line in lines if f" {SHARED_MEMORY}/" in line}


def clear(temporary: str, shared_memory: Iterable[str]) -> None:
    """Remove what a server has left that has ended."""
    shutil.rmtree(temporary, ignore_errors=True)
    for name in shared_memory:
        if Path(name).parent == SHARED_MEMORY:
            with suppress(OSError):
                os.unlink(name)

"""One writer per output: a lock file beside it, which the operating system lets go of when its holder dies, however it
dies."""

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from megatron_papo.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
"""What flock says on a file system without it."""


def file_system(path: Path) -> str:
    """Return type and mount point of the file system that a directory lies on, as the kernel names them."""
    place, name = str(path.resolve()), "it lies on"
    with suppress(OSError):
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines()]
        around = [(point, kind) for point, kind in mounts if Path(place).is_relative_to(point)]
        point, kind = max(around, key=lambda mount: len(mount[0]))
        name = f"{kind} at {point}"
    return name


class OutputLock:
    """Holds `<output>.lock`, an empty file, until release().

    One that a killed process left is taken over. Raises UserError if another process has it, or where a file of that
    name is somebody's own.
    """

    def __init__(self, output: Path):
        self.path = output.with_name(output.name + ".lock")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._acquire()
        except BlockingIOError:
            raise UserError(
                f"{output}: another process is making it ({self.path} is locked): wait for it or choose another"
                " --output"
            )
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise UserError(
                    f"{self.path}: the file system {file_system(output.parent)} has no locks ({error.strerror}), which"
                    " keep two processes from making one output: mount it with them (Lustre: -o flock; NFS: its lock"
                    " service), or choose a place on another file system"
                )
            raise UserError(f"{self.path}: cannot create: {error.strerror}")

    def _acquire(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            try:
                if not _is_empty_file(file):
                    raise UserError(
                        f"{self.path}: is in the way, and not of this pipeline's making (a lock file is empty): choose"
                        " another --output, or move it"
                    )
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_open_as(file):
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # its last holder removed it between open and flock: there is a new one

    def release(self) -> None:
        if self._is_open_as(self._file) and _is_empty_file(self._file):  # nobody has put a file of their own there
            self.path.unlink(missing_ok=True)
        os.close(self._file)

    def _is_open_as(self, descriptor: int) -> bool:
        """Say whether the file at the path is the one that is open."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.lstat(self.path), os.fstat(descriptor))
        return False


def _is_empty_file(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return stat.S_ISREG(status.st_mode) and status.st_size == 0

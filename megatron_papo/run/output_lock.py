"""One writer per output: a lock file beside it, which the operating system lets go of when its holder dies, however it
dies."""

import fcntl
import os
from pathlib import Path

from megatron_papo.errors import UserError


class OutputLock:
    """Holds `<output>.lock` until release(). Raises UserError if another process has it."""

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
            raise UserError(f"{self.path}: cannot create: {error.strerror}")

    def _acquire(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.exists(self.path) and os.stat(self.path).st_ino == os.fstat(file).st_ino:
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # its last holder removed it between open and flock: there is a new one

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._file)

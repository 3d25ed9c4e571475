"""Two stages that stay up side by side and wait for each other's outputs."""

import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from megatron_papo.errors import UserError
from megatron_papo.reading import shown
from megatron_papo.run.describing import describes
from megatron_papo.run.end_request import EndedEarly, EndRequest
from megatron_papo.run.manifest import MANIFEST

POLL_SECONDS = 0.2
FIRST_WORD_SECONDS, NEXT_WORD_SECONDS = 10.0, 60.0
"""When a stage says that it waits. Plain lines: two stages write to the same terminal."""
NOBODY = EndRequest(None)


class Follower:
    """One of two stages that work on the same run directory at the same time.

        with Follower(run.root, "stage4_rollout", "stage5_train", speaks) as follower:
            follower.wait_for(run.exported(1))

    A stage that fails leaves <stage>.failed in the run directory, and the one that waits for it ends, too. One that was
    asked to end leaves nothing: the other waits for the next one that goes on.
    """

    def __init__(self, root: Path, stage: str, other: str, speaks: bool = True):
        """speaks: whether this process (the first of its stage) shows the waiting and leaves the mark."""
        self.stage, self.other, self.speaks = stage, other, speaks
        self.mark, self.mark_of_other = (Path(root) / f"{name}.failed" for name in (stage, other))

    def __enter__(self) -> "Follower":
        self.old_mark = _identity(self.mark_of_other)
        if self.speaks:
            self.mark.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        has_failed = kind is not None and kind is not EndedEarly
        if has_failed and self.speaks and self.mark.parent.is_dir():
            with describes(self.mark):
                self.mark.write_text(
                    f"{error}\n" if isinstance(error, UserError) else f"{type(error).__name__}: {error}\n"
                )

    def wait_for(self, output: Path, request: EndRequest = NOBODY) -> None:
        """Return once a stage has published `output`, or this process sees a request to end. Raises UserError if the
        other stage failed since this one started."""
        started = time.monotonic()
        next_word = FIRST_WORD_SECONDS
        while not (output / MANIFEST).is_file() and not request.is_there():
            self._end_with_the_other(output)
            waited = time.monotonic() - started
            if waited > next_word and self.speaks:
                print(f"{self.stage}: waits for {output}, {waited:.0f} s so far", flush=True)
                next_word += NEXT_WORD_SECONDS
            time.sleep(POLL_SECONDS)

    def _end_with_the_other(self, output: Path) -> None:
        mark = _identity(self.mark_of_other)
        if mark is not None and mark != self.old_mark:
            reason = "it left no reason"
            with suppress(OSError):
                reason = shown(self.mark_of_other.read_text(errors="replace").strip(), limit=0)
            raise UserError(f"{self.other} failed while {self.stage} waited for {output}: {reason}")


def _identity(mark: Path) -> tuple[int, int] | None:
    """Return what tells a mark from an earlier one, whatever the clock says; None where there is none."""
    try:
        status = mark.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns

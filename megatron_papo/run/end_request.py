"""A request that training end soon: it ends the optimizer step in progress, saves, and leaves with status 75.

The request is a file in the run directory (RunDirectory.end_request), so it reaches training through any launcher and
on any node. run_all.sh makes it when it gets SIGUSR1, which SLURM sends before a time limit; anybody may, with `touch`.
The same command goes on where training ended.
"""

from typing import NoReturn

from megatron_papo.distributed import collectives, process_groups
from megatron_papo.run.run_directory import RunDirectory

ENDED_EARLY = 75
"""The exit status, that of sysexits.h for "try again": run_all.sh and stages/submit.slurm know it."""


class EndedEarly(Exception):
    """Says, on one line, where the work has ended because somebody asked for it."""


class EndRequest:
    """Whether somebody wants training to end. Outside of a run nobody can ask."""

    def __init__(self, run: RunDirectory | None):
        self._file = None if run is None else run.end_request

    def is_there(self) -> bool:
        """Say whether this process sees the request; another one may see it earlier or later."""
        return self._file is not None and self._file.exists()

    def is_agreed(self) -> bool:
        """Say on all ranks alike whether one of them sees the request. Collective."""
        return self._file is not None and any(collectives.gather(self.is_there()))

    def answer(self, what: str) -> NoReturn:
        """Raise EndedEarly, on all ranks; the request is taken away.

        Args:
            what: Where the work has ended, for the line that says so.
        """
        if self._file is not None and process_groups.is_main_rank():
            self._file.unlink(missing_ok=True)
        raise EndedEarly(f"{what}, as asked: the same command goes on from there")

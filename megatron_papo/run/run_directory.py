"""Where run_all.sh puts what the stages of a run make, and waiting for it: what stages 4 and 5 go by with --follow."""

import time
from pathlib import Path

from megatron_papo.config import Config
from megatron_papo.errors import UserError
from megatron_papo.run.stage_output import MANIFEST

POLL_SECONDS = 0.2
FIRST_WORD_SECONDS, NEXT_WORD_SECONDS = 10.0, 60.0
"""When a stage says that it waits. Plain lines: two stages write to the same terminal."""


class RunDirectory:
    """runs/NAME: the paths that run_all.sh gives to the stages, by the number of the iteration."""

    def __init__(self, root: Path, config: Config):
        self.root, self.config = Path(root), config
        self.data, self.reference, self.server = self.root / "data", self.root / "reference", self.root / "server"
        self.iterations = self.root / "iterations"

    def rollouts(self, number: int) -> Path:
        """Of iteration 1, 2, ..."""
        return self._iteration(number) / "rollouts"

    def trained(self, number: int) -> Path:
        """The Megatron checkpoint that iteration `number` ends with; 0: the one that training starts from."""
        return self.reference if number == 0 else self._iteration(number) / "megatron"

    def exported(self, number: int) -> Path:
        """The Hugging Face checkpoint that iteration `number` ends with; 0: the one that training starts from."""
        if number > 0:
            return self._iteration(number) / "hf"
        if self.config.sft is not None:
            return self.root / "sft"
        return self.data / "model" if self.config.model.path is None else Path(self.config.model.path)

    def rollback(self, number: int) -> Path | None:
        """The checkpoint that the hacking guard of iteration `number` may go back to; None: the one the iteration
        starts from."""
        back = self.config.hacking_guard.rollback_iterations
        return self.trained(max(number - 1 - back, 0)) if back > 0 and number > 1 else None

    def sampled_by(self, number: int) -> int:
        """The iteration whose weights sample the rollouts of iteration `number`: the one before, or with max_staleness
        one earlier."""
        return max(number - 1 - self.config.rollout.max_staleness, 0)

    def _iteration(self, number: int) -> Path:
        return self.iterations / f"{number:04}"


class Follower:
    """One of two stages that work on the same run directory at the same time, waiting for each other's outputs.

        with Follower(run.root, "stage4_rollout", "stage5_train", speaks) as follower:
            follower.wait_for(run.exported(1))

    A stage that fails leaves <stage>.failed in the run directory, and the one that waits for it ends, too. speaks:
    whether this process (the first of its stage) shows the waiting and leaves the mark.
    """

    def __init__(self, root: Path, stage: str, other: str, speaks: bool = True):
        self.stage, self.other, self.speaks = stage, other, speaks
        self.mark, self.mark_of_other = (Path(root) / f"{name}.failed" for name in (stage, other))

    def __enter__(self):
        self.started = time.time()
        if self.speaks:
            self.mark.unlink(missing_ok=True)
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None and self.speaks and self.mark.parent.is_dir():
            self.mark.write_text(f"{error}\n" if isinstance(error, UserError) else f"{kind.__name__}: {error}\n")
        return False

    def wait_for(self, output: Path) -> None:
        """Returns once a stage has published `output`. Raises UserError if the other stage has failed since this one
        started."""
        started = time.monotonic()
        next_word = FIRST_WORD_SECONDS
        while not (output / MANIFEST).is_file():
            self._end_with_the_other(output)
            waited = time.monotonic() - started
            if waited > next_word and self.speaks:
                print(f"{self.stage}: waits for {output}, {waited:.0f} s so far", flush=True)
                next_word += NEXT_WORD_SECONDS
            time.sleep(POLL_SECONDS)

    def _end_with_the_other(self, output: Path) -> None:
        try:
            if self.mark_of_other.stat().st_mtime > self.started:
                raise UserError(
                    f"{self.other} failed while {self.stage} waited for {output}:"
                    f" {self.mark_of_other.read_text().strip()}"
                )
        except FileNotFoundError:
            pass

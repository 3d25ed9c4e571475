"""Where the stages of a run put what they make: the only place where a path of a run is made."""

import hashlib
from pathlib import Path

from megatron_papo.config import Config
from megatron_papo.run.manifest import MANIFEST


class RunDirectory:
    """runs/NAME, by what stands in it."""

    def __init__(self, root: Path, config: Config):
        self.root, self.config = Path(root), config
        self.data = self.root / "data"
        """Stage 1: training prompts and pictures, rows for stage 2, the tiny model where the configuration names
        none."""
        self.sft, self.reference = self.root / "sft", self.root / "reference"
        self.iterations = self.root / "iterations"
        self.server = self.root / "server"
        self.log, self.summary, self.metrics = (
            self.root / name for name in ("log.txt", "summary.json", "metrics.jsonl")
        )
        self.end_request = self.root / "stage5_train.end"
        """While it is there, training ends after the step in progress (run/end_request.py)."""
        self.tensorboard, self.best = self.root / "tensorboard", self.root / "best.json"

    @property
    def base(self) -> Path:
        """The Hugging Face checkpoint that the run starts from: the user's, or the tiny model of stage 1."""
        return self.data / "model" if self.config.model.path is None else Path(self.config.model.path)

    def evaluation_data(self, name: str) -> Path:
        """Return the directory of the prompts and pictures of an evaluation set (stage 1)."""
        return self.root / "evaluation" / "sets" / name

    def evaluated(self, number: int, name: str) -> Path:
        """Return the directory of stage 7's output for iteration `number`, 0 before training, on an evaluation set."""
        return self.root / "evaluation" / f"iteration_{number:04}" / name

    def rollouts(self, number: int) -> Path:
        """Return the directory of stage 4's output for iteration `number`, counted from 1."""
        return self._iteration(number) / "rollouts"

    def trained(self, number: int) -> Path:
        """Return the Megatron checkpoint that iteration `number` ends with; of 0, the one that training starts from."""
        return self.reference if number == 0 else self._iteration(number) / "megatron"

    def exported(self, number: int) -> Path:
        """Return the Hugging Face checkpoint of iteration `number`; of 0, the one that training starts from."""
        if number > 0:
            return (self.in_memory(number) or self._iteration(number)) / "hf"
        return self.base if self.config.sft is None else self.sft

    @property
    def memory(self) -> Path | None:
        """The directory below export_directory that belongs to this run; None without one."""
        if self.config.export_directory is None:
            return None
        root = self.root.resolve()  # one place, however the run's path is spelled
        distinct = hashlib.sha256(str(root).encode()).hexdigest()[:12]
        return Path(self.config.export_directory).absolute() / f"{root.name}-{distinct}"

    def in_memory(self, number: int) -> Path | None:
        """Return where iteration `number` is exported to if not into the run: between two whole checkpoints, where
        nothing evaluates it and it does not lie in the run already."""
        if self.memory is None or self.is_checkpoint(number) or number in self.evaluated_iterations():
            return None
        is_here = (self._iteration(number) / "hf" / MANIFEST).exists()
        return None if is_here else self.memory / f"{number:04}"

    def weights_to_export(self, number: int) -> Path:
        """Return the Megatron checkpoint, weights alone, that iteration `number` is exported from where `trained` does
        not hold them (yet): it is there as long as that takes."""
        return self.exported(number).with_name("weights")

    def holds(self, path: Path) -> bool:
        """Say whether a path is the run's own, in its directory or in memory."""
        return path.is_relative_to(self.root) or (self.memory is not None and path.is_relative_to(self.memory))

    def rollback(self, number: int) -> Path | None:
        """Return the checkpoint that the guard of iteration `number` may go back to; None: the one it starts from."""
        back = self.config.hacking_guard.rollback_iterations
        return self.trained(max(number - 1 - back, 0)) if back > 0 and number > 1 else None

    def sampled_by(self, number: int) -> int:
        """Return the iteration whose weights sample iteration `number`: the one before, or with max_staleness one
        earlier."""
        return max(number - 1 - self.config.rollout.max_staleness, 0)

    def evaluated_iterations(self) -> list[int]:
        """Return the iterations that stage 7 evaluates: 0, every evaluate_every, and the last."""
        last, every = self.config.iterations, self.config.evaluate_every
        between = [] if every is None else range(every, last, every)
        return [0, *between, last]

    def evaluated_sets(self, number: int) -> list[str]:
        """Return the names of the evaluation sets that are run on iteration `number`, one of evaluated_iterations."""
        during = self.config.evaluation.during_training
        names = list(self.config.evaluation_sets)
        if during is None or number in (0, self.config.iterations):
            return names
        return [name for name in names if name in during]

    def is_checkpoint(self, number: int) -> bool:
        """Say whether a resident run writes the Megatron checkpoint of iteration `number` with its optimizer."""
        return number % self.config.checkpoint_every == 0 or number == self.config.iterations

    def _iteration(self, number: int) -> Path:
        return self.iterations / f"{number:04}"

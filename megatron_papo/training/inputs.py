"""The paths of one training iteration. No torch here: a command line reads them before anything heavy is imported."""

from dataclasses import dataclass
from pathlib import Path

from megatron_papo.config import Config
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import Task
from megatron_papo.run.records import Rollout, read_jsonl


@dataclass(frozen=True)
class TrainInputs:
    """What one iteration of training reads, and where its checkpoint goes."""

    iteration: int
    """Number of the iteration, from 1."""
    data: Path
    """Stage 1's output: the pictures lie there."""
    rollouts: Path
    """Stage 4's output of this iteration."""
    megatron: Path
    """The checkpoint to continue from: weights, optimizer, step."""
    reference: Path | None
    """The checkpoint of the frozen reference of KL_ref; None where kl_ref_coef is 0."""
    rollback: Path | None
    """The checkpoint that the hacking guard may go back to; None: `megatron`."""
    output: Path
    """The directory that will hold the new checkpoint."""

    @classmethod
    def of(cls, task: Task) -> "TrainInputs":
        """Return the paths of a turn of stage 5."""
        return cls(
            iteration=task.iteration,
            data=task.path("data"),
            rollouts=task.path("rollouts"),
            megatron=task.path("megatron"),
            reference=task.paths.get("reference"),
            rollback=task.paths.get("rollback"),
            output=task.output,
        )

    @property
    def rollouts_file(self) -> Path:
        return self.rollouts / "rollouts.jsonl"

    @property
    def rollback_checkpoint(self) -> Path:
        return self.rollback or self.megatron


def read_rollouts(inputs: TrainInputs, config: Config) -> list[Rollout]:
    """Return the rollouts. Raises UserError for older ones than rollout.max_staleness allows."""
    rollouts = read_jsonl(inputs.rollouts_file, Rollout)
    oldest, allowed = max(rollout.staleness for rollout in rollouts), config.rollout.max_staleness
    if oldest > allowed:
        raise UserError(
            f"{inputs.rollouts_file}: rollouts by weights {oldest} iteration(s) old, rollout.max_staleness is"
            f" {allowed}:"
            " sample them again, or raise it"
        )
    return rollouts

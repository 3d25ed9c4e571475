"""The paths of one training iteration. No torch here: a command line reads them before anything heavy is imported."""

from dataclasses import dataclass
from pathlib import Path


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

    @property
    def rollouts_file(self) -> Path:
        return self.rollouts / "rollouts.jsonl"

    @property
    def rollback_checkpoint(self) -> Path:
        return self.rollback or self.megatron

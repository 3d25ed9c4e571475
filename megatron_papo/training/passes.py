"""What one iteration of PAPO does on a model: sweeps without gradient over its rollouts, then one update per step.

Nothing here reads a file, prints or looks at a command line: stage 5 calls it to train, a tool may call it to measure.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_papo.config import Config, ObjectiveConfig
from megatron_papo.distributed import collectives, process_groups
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.objective.papo_loss import StepCounts, finish_metrics
from megatron_papo.training import accounting
from megatron_papo.training.collator import Collator, Kind
from megatron_papo.training.forward_step import PassSettings, PerRollout, Seen, papo_step, sweep
from megatron_papo.training.layouts import layout_of
from megatron_papo.training.loss_recipe import LossRecipe, counts_of, denominators_of
from megatron_papo.training.optimizer import set_learning_rate
from megatron_papo.training.policy import Policy
from megatron_papo.training.rows import TrainingRollout


@dataclass(frozen=True)
class StepRows:
    """The rollouts of one optimizer step."""

    all: list[TrainingRollout]
    """Those of all data-parallel ranks, in the order of the file."""
    own: list[TrainingRollout]
    """This rank's share."""
    denominators: list[StepCounts]
    """What each rollout of this rank's share is divided by in the loss."""
    place: slice
    """Where this rank's share lies among its rollouts of the whole iteration."""


def split_into_steps(rows: Sequence[TrainingRollout], config: Config, rank: int, ranks: int) -> list[StepRows]:
    """Cut an iteration's rollouts into optimizer steps, and each of them over the data-parallel ranks.

    Args:
        rows: the rollouts of the iteration, all ranks', group after group.
        config: global_batch_size, group_size, layout and average are read.
        rank, ranks: this process's data-parallel rank, and their number.
    """
    size = config.training.global_batch_size * config.rollout.group_size
    steps: list[StepRows] = []
    first = 0
    for start in range(0, len(rows), size):
        of_step = list(rows[start : start + size])
        denominators = denominators_of([counts_of(row) for row in of_step], config.objective)
        own = layout_of(config.training).split_over_ranks(of_step, ranks)[rank]
        place = slice(first, first + len(own))
        steps.append(StepRows(of_step, [of_step[i] for i in own], [denominators[i] for i in own], place))
        first += len(own)
    return steps


@dataclass(frozen=True)
class PassPlan:
    """Which passes over the rollouts an iteration makes. Each one is a forward pass over every rollout, or more."""

    reference: bool
    """One sweep with the reference's weights, before the first step."""
    at_start: tuple[Kind, ...]
    """The pictures with which the policy sweeps over all rollouts before the first step."""
    before_each_step: tuple[Kind, ...]
    """The pictures with which it sweeps over the rollouts of each step, before that step."""

    @classmethod
    def of(cls, objective: ObjectiveConfig, num_steps: int) -> "PassPlan":
        at_start: list[Kind] = []
        before_each_step: list[Kind] = []
        if num_steps > 1:  # with one step the update itself says what the old policy was
            at_start.append("original")
        if objective.uses_masked_image and objective.masked_branch == "cached":
            at_start.append("masked")
        if objective.uses_masked_image and objective.masked_branch != "cached" and not objective.masked_rows_ride:
            before_each_step.append("masked")
        return cls(objective.uses_reference, tuple(at_start), tuple(before_each_step))

    @property
    def sweeps_at_start(self) -> list[Kind]:
        """The pictures of every sweep before the first step, the reference's first."""
        of_reference: list[Kind] = ["original"] if self.reference else []
        return [*of_reference, *self.at_start]

    @property
    def count_of_steps(self) -> int:
        """How often the optimizer steps go over the rollouts: the update, and what is swept before it."""
        return 1 + len(self.before_each_step)

    @property
    def count(self) -> int:
        """How often the whole iteration goes over the rollouts."""
        return len(self.sweeps_at_start) + self.count_of_steps


@dataclass(frozen=True)
class Update:
    """What one optimizer step said."""

    metrics: dict[str, float]
    """papo_loss's metrics of the whole step, on every rank."""
    gradient_norm: float
    seen: Seen
    """What the policy said about this rank's rollouts, with the weights before the step."""


@dataclass(frozen=True)
class Passes:
    """The passes over the rollouts of an iteration. All ranks call the methods together, in the same order."""

    config: Config
    hf: HFConfig
    steps: list[StepRows]
    plan: PassPlan
    collator: Collator
    progress: Callable[[int], None]
    """Gets the number of rollouts that a pass has just gone over."""

    @property
    def rows(self) -> list[TrainingRollout]:
        """This rank's rollouts of the iteration."""
        return [row for step in self.steps for row in step.own]

    def sweep(
        self,
        model: torch.nn.Module,
        rows: Sequence[TrainingRollout],
        kinds: Sequence[Kind],
        forbidden: Sequence[int] = (),
    ) -> dict[Kind, Seen]:
        """Return what the model says about the rows' responses with each kind of pictures, without gradient."""
        size = self.config.training.log_prob_micro_batch_size
        settings = PassSettings(size, self.config.rollout.temperature, self.progress)
        return sweep(model, self.collator, rows, settings, kinds, forbidden)

    def sweep_reference(self, policy: Policy) -> PerRollout:
        """Return ref_log_probs of this rank's rollouts; nothing where the plan has no reference."""
        if not self.plan.reference:
            return {}
        with policy.as_reference() as model:
            return {"ref_log_probs": self.sweep(model, self.rows, ["original"])["original"].log_probs}

    def sweep_policy(self, model: torch.nn.Module, forbidden: Sequence[int] = ()) -> tuple[PerRollout, Seen | None]:
        """Sweep with the policy's weights as they are before the first step.

        Args:
            model: the policy.
            forbidden: token ids that the rollout engine never samples, where its log-probs are to be compared.

        Returns constants of the loss while the policy trains (old_log_probs, the masked-image branch,
        rollout_log_probs: what the plan and the objective ask for), and what the old policy said about this rank's
        rollouts, None where the plan does not sweep it.
        """
        constants: PerRollout = {}
        swept = self.sweep(model, self.rows, self.plan.at_start, forbidden)
        if "original" in swept:
            constants["old_log_probs"] = swept["original"].log_probs
        if "masked" in swept:
            constants |= masked_branch(swept["masked"])
        if self.config.objective.importance_sampling_cap is not None and process_groups.is_last_stage():
            constants["rollout_log_probs"] = [
                torch.tensor(row.rollout.rollout_log_probs, device=process_groups.device()) for row in self.rows
            ]
        return constants, swept.get("original")

    def update(
        self, policy: Policy, step: StepRows, constants: PerRollout, recipe: LossRecipe, learning_rate: float
    ) -> Update:
        """Make one optimizer step: what is swept before it, forward and backward, all-reduce, clipping, AdamW.

        Args:
            policy: its model and optimizer are changed, its state is not.
            step: the rollouts.
            constants: what sweep_reference and sweep_policy returned for the whole iteration.
            recipe: the loss of this step.
            learning_rate: of this step.

        Raises UserError where the loss or the gradient is not finite.
        """
        of_step = {name: values[step.place] for name, values in constants.items()}
        swept = self.sweep(policy.model, step.own, self.plan.before_each_step)
        if "masked" in swept:
            of_step |= masked_branch(swept["masked"])
        set_learning_rate(policy.optimizer, learning_rate)
        policy.model.zero_grad_buffer()
        policy.optimizer.zero_grad()
        settings = PassSettings(self.config.training.micro_batch_size, self.config.rollout.temperature, self.progress)
        contributions, seen = papo_step(
            policy.model, self.collator, step.own, of_step, settings, recipe, step.denominators
        )
        _, gradient_norm, _ = policy.optimizer.step()
        metrics = finish_metrics(collectives.sum_from_last_stage(contributions))
        if not (math.isfinite(metrics["loss"]) and math.isfinite(gradient_norm)):
            raise UserError(
                f"optimizer step {policy.state['step'] + 1}: loss {metrics['loss']}, gradient norm {gradient_norm}:"
                " nothing was saved; lower optimizer.learning_rate or objective.kl_prcp_coef"
            )
        return Update(metrics, float(gradient_norm), seen)

    def account_sweeps(self, seconds: float) -> dict[str, float]:
        """Return what the sweeps before the first step computed in so many seconds, `sweep_` before each name."""
        passes = accounting.sweeps(self.plan.sweeps_at_start, self.config.training)
        if not passes:
            return {}
        metrics = self._account([step.all for step in self.steps], passes, seconds)
        return {f"sweep_{name}": value for name, value in metrics.items()}

    def account_step(self, step: StepRows, seconds: float) -> dict[str, float]:
        """Return what one update, with the sweep before it if there is one, computed in so many seconds."""
        passes = accounting.sweeps(self.plan.before_each_step, self.config.training)
        passes.append(accounting.update(self.config.objective, self.config.training))
        return self._account([step.all], passes, seconds)

    def _account(
        self, steps: list[list[TrainingRollout]], passes: Sequence[accounting.Pass], seconds: float
    ) -> dict[str, float]:
        peak = accounting.peak_memory()
        if not collectives.is_reporting_rank():
            return peak
        device = accounting.device_name()
        return accounting.step_accounting(steps, self.config, self.hf, passes, seconds, device) | peak


def masked_branch(seen: Seen) -> PerRollout:
    """Return the loss's constants of the masked-image branch, from a sweep with masked pictures."""
    return {"masked_image_log_probs": seen.log_probs, "masked_image_entropy": seen.entropy}


def step_statistics(rows: Sequence[TrainingRollout]) -> dict[str, float]:
    """Return means over the rollouts of one optimizer step: rewards, response length, how many were cut off."""
    size = len(rows)
    return {
        "reward": sum(row.rollout.rewards.overall for row in rows) / size,
        "accuracy": sum(row.rollout.rewards.accuracy for row in rows) / size,
        "format": sum(row.rollout.rewards.format for row in rows) / size,
        "response_tokens": sum(row.response_length for row in rows) / size,
        "cut_off": sum(row.rollout.finish_reason == "length" for row in rows) / size,
    }

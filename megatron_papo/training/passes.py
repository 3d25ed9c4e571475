"""What one iteration of PAPO does on a model: sweeps without gradient over its rollouts, then one update per step.

Nothing here reads a file, prints or looks at a command line: stage 5 calls it to train, a tool may call it to measure.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from megatron_papo.config import Config, ObjectiveConfig, TrainingConfig
from megatron_papo.distributed import collectives, process_groups
from megatron_papo.distributed.transfer import to_device
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.objective.papo_loss import StepCounts, finish_metrics
from megatron_papo.training import accounting
from megatron_papo.training.collator import Collator, Pictures
from megatron_papo.training.forward_step import PassSettings, PerRollout, Seen, papo_step, sweep
from megatron_papo.training.layouts import layout_of
from megatron_papo.training.loss_recipe import LossRecipe, counts_of, denominators_of
from megatron_papo.training.optimizer import set_learning_rate
from megatron_papo.training.policy import Policy
from megatron_papo.training.rows import Grid, TrainingRollout
from megatron_papo.training.weighing import sensitivities, weigh


@dataclass(frozen=True)
class StepRows:
    """The rollouts of one optimizer step."""

    all: list[TrainingRollout]
    """Those of all data-parallel ranks, in the order of the file."""
    own: list[TrainingRollout]
    """This rank's share."""
    denominators: list[StepCounts]
    """What each rollout of this rank's share is divided by in the loss."""
    places: list[int]
    """Where each rollout of this rank's share stands in `all`."""


def split_into_steps(rows: Sequence[TrainingRollout], config: Config, rank: int, ranks: int) -> list[StepRows]:
    """Cut an iteration's rollouts into optimizer steps, and each of them over the data-parallel ranks.

    Args:
        rows: the rollouts of the iteration, all ranks', group after group.
        config: global_batch_size, group_size, layout and average are read.
        rank, ranks: this process's data-parallel rank, and their number.
    """
    size = config.training.global_batch_size * config.rollout.group_size
    steps: list[StepRows] = []
    for start in range(0, len(rows), size):
        of_step = list(rows[start : start + size])
        denominators = denominators_of([counts_of(row) for row in of_step], config.objective)
        own = layout_of(config.training).split_over_ranks(of_step, ranks)[rank]
        steps.append(StepRows(of_step, [of_step[i] for i in own], [denominators[i] for i in own], own))
    return steps


@dataclass(frozen=True)
class PassPlan:
    """Which passes over the rollouts an iteration makes: forward passes, and in the update a backward pass."""

    reference: bool
    """One sweep with the reference's weights over all rollouts, before the first step."""
    of_first_step: tuple[Pictures, ...]
    """The pictures with which the policy sweeps over the rollouts of the first step, before it."""
    of_later_steps: tuple[Pictures, ...]
    """The pictures with which it sweeps over the rollouts of the other steps, before the first one."""
    before_each_step: tuple[Pictures, ...]
    """The pictures with which it sweeps over the rollouts of each step, before that step."""

    @classmethod
    def of(cls, objective: ObjectiveConfig) -> "PassPlan":
        """Return the passes that an objective needs. No sweep for the old policy of the first step, which is the policy
        that makes it: its update says that."""
        of_first: set[Pictures] = set()
        in_step: set[Pictures] = {"original"} if objective.uses_step_entropy else set()
        pairs = objective.uses_sensitivity and objective.sensitivity.needs_both_logits
        if objective.uses_sensitivity:
            views: tuple[Pictures, ...] = ("both",) if pairs else ("original", "masked")
            (of_first if objective.sensitivity.weights == "old" else in_step).update(views)
        if objective.trains_on_masked_image and not objective.masked_rows_ride:
            (of_first if objective.masked_branch == "cached" else in_step).add("masked")
        order: tuple[Pictures, ...] = ("original", "masked", "both")
        first, later, before = (
            tuple(kind for kind in order if kind in kinds) for kinds in (of_first, of_first | {"original"}, in_step)
        )
        return cls(objective.uses_reference, first, later, before)

    @property
    def count_of_steps(self) -> int:
        """How often the optimizer steps go over the rollouts: the update, and what is swept before it."""
        return 1 + len(self.before_each_step)

    def count_at_start(self, number: int) -> int:
        """Return how often the sweeps before the first step go over the rollouts of step 0, 1, ..."""
        return self.reference + len(self.of_later_steps if number else self.of_first_step)

    def passes_at_start(self, num_steps: int, training: TrainingConfig) -> list[accounting.Pass]:
        """Return the sweeps before the first of so many steps."""
        passes = accounting.sweeps(["original"] if self.reference else [], training)
        passes += accounting.sweeps(self.of_first_step, training, slice(0, 1))
        if num_steps > 1:
            passes += accounting.sweeps(self.of_later_steps, training, slice(1, None))
        return passes

    def passes_of_step(self, config: Config) -> list[accounting.Pass]:
        """Return the passes of one optimizer step."""
        passes = accounting.sweeps(self.before_each_step, config.training)
        return [*passes, accounting.update(config.objective, config.training)]


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

    @property
    def later_rows(self) -> list[TrainingRollout]:
        """Those of all steps but the first."""
        return [row for step in self.steps[1:] for row in step.own]

    def sweep(
        self,
        model: torch.nn.Module,
        rows: Sequence[TrainingRollout],
        kinds: Sequence[Pictures],
        forbidden: Sequence[int] = (),
    ) -> dict[Pictures, Seen]:
        """Return what the model says about the rows' responses with each kind of pictures, without gradient."""
        size = self.config.training.log_prob_micro_batch_size
        settings = PassSettings(size, self.config.rollout.temperature, self.progress)
        return sweep(model, self.collator, rows, settings, kinds, forbidden)

    def sweep_reference(self, policy: Policy) -> list[PerRollout]:
        """Return ref_log_probs of this rank's rollouts, step by step; nothing where the plan has no reference."""
        if not self.plan.reference:
            return [{} for _ in self.steps]
        with policy.as_reference() as model:
            seen = self.sweep(model, self.rows, ["original"])["original"]
        return [{"ref_log_probs": of_step.log_probs} for of_step in self._by_step(seen, self.steps)]

    def sweep_policy(
        self, model: torch.nn.Module, forbidden: Sequence[int] = ()
    ) -> tuple[list[PerRollout], Seen | None]:
        """Sweep with the policy's weights as they are before the first step.

        Args:
            model: the policy.
            forbidden: token ids that the rollout engine never samples, where its log-probs are to be compared.

        Returns constants of the loss while the policy trains, for each step (old_log_probs with old_entropy, the
        masked-image branch, old_sensitivity, rollout_log_probs: what the plan and the objective ask for), and what the
        old policy said about `later_rows`, None where there are none.
        """
        first = self.sweep(model, self.steps[0].own, self.plan.of_first_step)
        later = self.sweep(model, self.later_rows, self.plan.of_later_steps, forbidden)
        constants: list[PerRollout] = [{} for _ in self.steps]
        for of_step, old in zip(constants[1:], self._by_step(later["original"], self.steps[1:]), strict=True):
            of_step |= {"old_log_probs": old.log_probs, "old_entropy": old.entropy}
        objective = self.config.objective
        by_step = {kind: [first[kind], *self._by_step(later[kind], self.steps[1:])] for kind in first}
        if "masked" in first and objective.masked_branch == "cached":
            for of_step, masked in zip(constants, by_step["masked"], strict=True):
                of_step |= masked_branch(masked)
        if objective.uses_sensitivity and objective.sensitivity.weights == "old":
            for number, (of_step, step) in enumerate(zip(constants, self.steps, strict=True)):
                seen = {kind: of_steps[number] for kind, of_steps in by_step.items()}
                of_step["old_sensitivity"] = sensitivities(objective, step.own, seen)
        if objective.importance_sampling_cap is not None and process_groups.is_last_stage():
            for of_step, step in zip(constants, self.steps, strict=True):
                of_step["rollout_log_probs"] = [
                    to_device(torch.tensor(row.rollout.rollout_log_probs), process_groups.device()) for row in step.own
                ]
        return constants, later["original"] if len(self.steps) > 1 else None

    def _by_step(self, seen: Seen, steps: Sequence[StepRows]) -> list[Seen]:
        """Cut what a sweep said about this rank's rollouts of these steps into the steps."""
        ends = list(accumulate((len(step.own) for step in steps), initial=0))
        return [seen.part(start, end) for start, end in pairwise(ends)]

    def update(
        self, policy: Policy, step: StepRows, constants: PerRollout, recipe: LossRecipe, learning_rate: float
    ) -> Update:
        """Make one optimizer step: what is swept before it, forward and backward, all-reduce, clipping, AdamW.

        Args:
            policy: its model and optimizer are changed, its state is not.
            step: the rollouts.
            constants: what sweep_reference and sweep_policy returned for this step.
            recipe: the loss of this step.
            learning_rate: of this step.

        Raises UserError where the loss or the gradient is not finite.
        """
        of_step = self.constants_of_step(policy, step, constants)
        set_learning_rate(policy.optimizer, learning_rate)
        policy.model.zero_grad_buffer()
        policy.optimizer.zero_grad()
        settings = PassSettings(self.config.training.micro_batch_size, self.config.rollout.temperature, self.progress)
        contributions, seen = papo_step(
            policy.model, self.collator, step.own, of_step, settings, recipe, step.denominators
        )
        _, gradient_norm, _ = policy.optimizer.step()
        metrics = self.read_metrics(contributions)
        if not (math.isfinite(metrics["loss"]) and math.isfinite(gradient_norm)):
            raise UserError(
                f"optimizer step {policy.state['step'] + 1}: loss {metrics['loss']}, gradient norm {gradient_norm}:"
                " nothing was saved; lower optimizer.learning_rate or objective.kl_prcp_coef"
            )
        return Update(metrics, float(gradient_norm), seen)

    def constants_of_step(self, policy: Policy, step: StepRows, constants: PerRollout) -> PerRollout:
        """Return the loss's constants of a step: those given, and what the sweeps before it say."""
        of_step, objective = dict(constants), self.config.objective
        swept = self.sweep(policy.model, step.own, self.plan.before_each_step)
        if "masked" in swept and objective.masked_branch == "recompute":
            of_step |= masked_branch(swept["masked"])
        if not objective.weighs_tokens:
            return of_step
        values: dict[str, Sequence[torch.Tensor]] = {}
        old_sensitivity = of_step.pop("old_sensitivity", None)
        if old_sensitivity is not None:
            values["sensitivity"] = old_sensitivity
        elif objective.uses_sensitivity:
            values["sensitivity"] = sensitivities(objective, step.own, swept)
        if objective.uses_step_entropy:
            values["entropy"] = swept["original"].entropy
        return of_step | weigh(objective, step.all, step.places, values)

    def read_metrics(self, contributions: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return a step's metrics, from what this rank contributes to them."""
        return finish_metrics(collectives.sum_from_last_stage(contributions))

    def account_sweeps(self, seconds: float) -> dict[str, float]:
        """Return what the sweeps before the first step computed in so many seconds, `sweep_` before each name."""
        passes = self.plan.passes_at_start(len(self.steps), self.config.training)
        if not passes:
            return {}
        metrics = self._account([step.all for step in self.steps], passes, seconds)
        return {f"sweep_{name}": value for name, value in metrics.items()}

    def account_step(self, step: StepRows, seconds: float) -> dict[str, float]:
        """Return what one update, with the sweep before it if there is one, computed in so many seconds."""
        passes = self.plan.passes_of_step(self.config)
        return self._account([step.all], passes, seconds)

    def _account(
        self, steps: list[list[TrainingRollout]], passes: Sequence[accounting.Pass], seconds: float
    ) -> dict[str, float]:
        peak, encoded = accounting.peak_memory(), self._encoded_meanwhile()
        if not collectives.is_reporting_rank():
            return peak
        device = accounting.device_name()
        return accounting.step_accounting(steps, self.config, self.hf, passes, seconds, device, encoded) | peak

    def _encoded_meanwhile(self) -> list[Grid]:
        """Return the pictures that a frozen vision tower has encoded since the call before, on all data-parallel
        ranks."""
        if self.collator.encoded is None:
            return []
        own = self.collator.encoded.take_encoded()
        speaks = process_groups.is_first_stage() and process_groups.tp_group().rank() == 0
        return [grid for of_rank in collectives.gather(own if speaks else []) for grid in of_rank]


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

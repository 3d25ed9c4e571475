"""Rollouts through the pipeline: log-probs of their response tokens without gradient, or as part of the PAPO loss."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_papo.distributed import process_groups
from megatron_papo.distributed.transfer import to_device
from megatron_papo.model.log_probs import TokenStatistics
from megatron_papo.model.qwen2_5_vl import Responses
from megatron_papo.objective.papo_loss import (
    Averages,
    MaskedImageTokens,
    ResponseTokens,
    StepCounts,
    papo_loss,
    stacked,
)
from megatron_papo.training.collator import Collator, MicroBatch, Pictures, pad_responses
from megatron_papo.training.loss_recipe import LossRecipe, Twins
from megatron_papo.training.rows import TrainingRollout

PerRollout = dict[str, list[Tensor]]
"""Constants of the loss by their names there (old_log_probs, ref_log_probs, rollout_log_probs, masked_image_log_probs,
masked_image_entropy, policy_weights, kl_prcp_weights, contrast_weights), old_entropy, for checks of the rollouts, and
old_sensitivity: one fp32 [response_length] for each of this rank's rollouts of an optimizer step, in order; none before
the last pipeline stage."""


def no_progress(rollouts: int) -> None:
    pass


@dataclass(frozen=True)
class PassSettings:
    """What every pass over rollouts wants to know."""

    micro_batch_size: int
    """Rollouts in a micro-batch of the plain layout."""
    temperature: float
    """The temperature that the rollouts were sampled at."""
    progress: Callable[[int], None] = no_progress
    """Gets the number of rollouts that have just gone through."""


@dataclass(frozen=True)
class Seen:
    """What a pass said about the responses: one fp32 [response_length] per rollout; nothing before the last stage."""

    log_probs: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    allowed_log_probs: list[Tensor] = field(default_factory=list)
    """Both over the tokens that are not forbidden; empty where nothing is."""
    allowed_entropy: list[Tensor] = field(default_factory=list)
    other_log_probs: list[Tensor] = field(default_factory=list)
    """These three of a sweep over pairs: of the masked-image twins, and [3, response_length] divergences."""
    other_entropy: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)

    def add(self, statistics: TokenStatistics, rows: Sequence[TrainingRollout]) -> None:
        """Take in what the last stage says about these rollouts; twins that follow them are left out."""
        lengths = [row.response_length for row in rows]
        for values, of_rows in (
            (self.log_probs, statistics.log_probs),
            (self.entropy, statistics.entropy),
            (self.allowed_log_probs, statistics.allowed_log_probs),
            (self.allowed_entropy, statistics.allowed_entropy),
        ):
            if of_rows is not None:
                values += of_rows.detach()[: sum(lengths)].split(lengths)
        if statistics.divergences is not None:
            self.other_log_probs.extend(statistics.log_probs.detach()[sum(lengths) :].split(lengths))
            self.other_entropy.extend(statistics.entropy.detach()[sum(lengths) :].split(lengths))
            self.divergences.extend(statistics.divergences.split(lengths, dim=1))

    def part(self, start: int, end: int) -> "Seen":
        """Return what was said about some of the rollouts."""
        return Seen(
            self.log_probs[start:end],
            self.entropy[start:end],
            self.allowed_log_probs[start:end],
            self.allowed_entropy[start:end],
            self.other_log_probs[start:end],
            self.other_entropy[start:end],
            self.divergences[start:end],
        )


def _run(
    model: torch.nn.Module,
    batches: Iterable[MicroBatch],
    num_micro_batches: int,
    ask: Callable[[MicroBatch], Responses],
    on_output: Callable,
    forward_only: bool,
) -> list:
    """Send micro-batches through the pipeline schedule.

    Args:
        model: this rank's stage.
        batches: num_micro_batches of them.
        ask: what the last stage is asked about a micro-batch.
        on_output: gets each micro-batch with the last stage's answer; what it returns is collected.
        forward_only: without gradient.
    """

    def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[object, Callable]:
        batch = next(iterator)
        output = model(
            batch.input_ids, batch.position_ids, batch.pixel_values, batch.image_grids,
            encoded_pictures=batch.encoded_pictures, pictures=batch.pictures, num_image_tokens=batch.num_image_tokens,
            groups=batch.groups, responses=ask(batch),
        )  # fmt: skip
        return output, partial(on_output, batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=num_micro_batches,
        seq_length=0,  # shapes travel with each micro-batch (variable_seq_lengths)
        micro_batch_size=0,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def sweep(
    model: torch.nn.Module,
    collator: Collator,
    rows: Sequence[TrainingRollout],
    settings: PassSettings,
    kinds: Sequence[Pictures] = ("original",),
    forbidden: Sequence[int] = (),
) -> dict[Pictures, Seen]:
    """Return what the model says about the rows' responses with each kind of pictures, without gradient.

    Args:
        model: this rank's stage.
        collator: makes the micro-batches.
        rows: this rank's rollouts.
        settings: micro-batch size, temperature, progress.
        kinds: the rows go through with the pictures of every kind, one after the other; both: in pairs, which gives
            their divergences.
        forbidden: token ids that the rollout engine never samples; Seen.allowed_... are over the others.

    Collective over the model-parallel group.
    """
    seen: dict[Pictures, Seen] = {kind: Seen() for kind in kinds}
    if not rows or not kinds:
        return seen

    def ask(batch: MicroBatch) -> Responses:
        return Responses(
            batch.response_positions,
            batch.response_tokens,
            settings.temperature,
            forbidden=tuple(forbidden),
            divergences=batch.has_twins,
        )

    def collect(batch: MicroBatch, statistics: TokenStatistics, non_loss_data: bool) -> None:
        seen["both" if batch.has_twins else batch.kinds[0]].add(statistics, batch.rows)
        settings.progress(len(batch.rows))

    with torch.no_grad():
        for kind in kinds:
            plan = collator.plan(collator.rows_as_seen(rows, kind), settings.micro_batch_size, kind)
            collator.expect(plan, kind)
            batches = (collator.collate(part, kind) for part in plan)
            _run(model, batches, len(plan), ask, collect, forward_only=True)
    return seen


def papo_step(
    model: torch.nn.Module,
    collator: Collator,
    rows: Sequence[TrainingRollout],
    constants: PerRollout,
    settings: PassSettings,
    recipe: LossRecipe,
    denominators: Sequence[StepCounts],
) -> tuple[dict[str, Tensor], Seen]:
    """Make forward and backward of one optimizer step over this rank's rows; gradients end in the DDP buffers.

    Args:
        model: this rank's stage in its data-parallel wrapper.
        collator: makes the micro-batches.
        rows: this rank's rollouts of the step.
        constants: of the same rollouts. Without old_log_probs the policy is its own old policy, as it is in the first
            step after sampling: the ratio is 1, with its gradient.
        settings: micro-batch size, temperature, progress.
        recipe: the loss.
        denominators: of the same rollouts in the loss of the whole step: denominators_of.

    Returns this rank's contributions to the metrics ({} before the last stage), and what the policy said.
    """
    pictures: Pictures = "original" if recipe.twins is None else recipe.twins.pictures
    plan = collator.plan(rows, settings.micro_batch_size, pictures)
    collator.expect(plan, pictures)
    # The schedule divides by the number of micro-batches and DDP by the data-parallel size; the loss's own weights hold
    # the denominators of the whole step already.
    schedule_divisor = len(plan) * process_groups.dp_group().size()
    seen = Seen()

    def ask(batch: MicroBatch) -> Responses:
        return responses_with_twins(batch, settings.temperature, recipe.twins)

    def loss(batch: MicroBatch, statistics: TokenStatistics) -> tuple[Tensor, dict[str, Tensor]]:
        seen.add(statistics, batch.rows)
        tokens = response_tokens(batch, statistics, recipe.twins)
        assert batch.denominators is not None  # given in batches(), on the last stage
        averages = Averages(batch.denominators, recipe.of_loss)
        value, metrics = papo_loss(tokens, averages, recipe.coefficients, recipe.formulas)
        settings.progress(len(batch.rows))
        return value * schedule_divisor, metrics

    def batches() -> Iterator[MicroBatch]:
        first = 0
        for part in plan:
            batch = collator.collate(part, pictures)
            if process_groups.is_last_stage():
                place = slice(first, first + len(part))
                batch.constants = {
                    name: pad_responses(values[place], batch.response_mask) for name, values in constants.items()
                }
                batch.denominators = stacked(denominators[place], batch.response_mask.device)
            first += len(part)
            yield batch

    per_batch = _run(model, batches(), len(plan), ask, loss, forward_only=False)
    if not per_batch:
        return {}, seen
    return {name: sum(metrics[name] for metrics in per_batch) for name in per_batch[0]}, seen


def responses_with_twins(batch: MicroBatch, temperature: float, twins: Twins | None) -> Responses:
    """Return what the last stage is asked about a micro-batch of the update."""
    if twins is None:
        return Responses(batch.response_positions, batch.response_tokens, temperature)
    return Responses(
        batch.response_positions,
        batch.response_tokens,
        temperature,
        kl_of_halves=twins.exact_kl,
        second_half_gradient=twins.with_gradient,
    )


def response_tokens(batch: MicroBatch, statistics: TokenStatistics, twins: Twins | None) -> ResponseTokens:
    """Return the loss's tensors [B, T] of a micro-batch: the last stage's answer, and the micro-batch's constants."""
    device, mask, constants = batch.response_mask.device, batch.response_mask, batch.constants
    count = batch.num_response_tokens
    log_probs = pad_responses([statistics.log_probs[:count]], mask)
    counted = to_device(torch.tensor([[float(row.counts)] for row in batch.rows]), device)
    masked_image = kept_image = None
    if twins is not None:
        masked_image = _twins_tokens(statistics, slice(count, 2 * count), mask, twins)
        if twins.pictures == "all":
            kept_image = _twins_tokens(statistics, slice(2 * count, None), mask, twins)
    elif "masked_image_log_probs" in constants:
        masked_image = MaskedImageTokens(constants["masked_image_log_probs"], constants.get("masked_image_entropy"))
    return ResponseTokens(
        log_probs=log_probs,
        old_log_probs=constants.get("old_log_probs", log_probs.detach()),
        advantages=to_device(torch.tensor([[row.advantage] for row in batch.rows]), device),
        mask=mask * counted,
        correct=to_device(torch.tensor([[float(row.is_correct)] for row in batch.rows]), device),
        entropy=pad_responses([statistics.entropy[:count]], mask),
        ref_log_probs=constants.get("ref_log_probs"),
        rollout_log_probs=constants.get("rollout_log_probs"),
        masked_image=masked_image,
        policy_weights=constants.get("policy_weights"),
        kl_prcp_weights=constants.get("kl_prcp_weights"),
        kept_image=kept_image,
        contrast_weights=constants.get("contrast_weights"),
    )


def _twins_tokens(statistics: TokenStatistics, place: slice, mask: Tensor, twins: Twins) -> MaskedImageTokens:
    log_probs = pad_responses([statistics.log_probs[place]], mask)
    entropy = pad_responses([statistics.entropy[place]], mask)
    exact_kl = None if statistics.kl is None else pad_responses([statistics.kl], mask)
    if not twins.with_gradient:
        log_probs, entropy = log_probs.detach(), entropy.detach()
    return MaskedImageTokens(log_probs, entropy, exact_kl)

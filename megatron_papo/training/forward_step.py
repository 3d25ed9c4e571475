"""One micro-batch through the pipeline: log-probs of the response tokens, without gradient or as part of the PAPO
loss."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_papo.config import ObjectiveConfig
from megatron_papo.distributed import process_groups
from megatron_papo.model.log_probs import TokenStatistics
from megatron_papo.model.qwen2_5_vl import Responses
from megatron_papo.objective.papo_loss import annealed_kl_prcp_coef, papo_loss
from megatron_papo.training.collator import Collator, MicroBatch, Pictures, pad_responses
from megatron_papo.training.rows import TrainingRollout

LOSS_OPTIONS = (
    "clip_ratio_low",
    "clip_ratio_high",
    "clip_ratio_dual",
    "ratio_level",
    "importance_sampling_cap",
    "kl_ref_coef",
    "kl_ref_estimator",
    "kl_prcp_estimator",
    "kl_prcp_clip",
    "kl_prcp_top_p",
    "entropy_estimator",
    "sft_coef",
)
"""Fields of ObjectiveConfig that papo_loss takes as they are."""


@dataclass(frozen=True)
class StepTotals:
    """Denominators of an optimizer step: counts over all data-parallel ranks and micro-batches."""

    tokens: int
    sequences: int
    correct_tokens: int

    @classmethod
    def of(cls, rows: Sequence[TrainingRollout]) -> "StepTotals":
        counted = [row for row in rows if row.counts]
        correct = sum(row.response_length for row in counted if row.is_correct)
        return cls(sum(row.response_length for row in counted), len(counted), correct)


def loss_settings(objective: ObjectiveConfig, step: int, kl_prcp_scale: float = 1.0) -> dict:
    """papo_loss's options at an optimizer step of the run (0, 1, ...): annealing and the hacking guard's scale applied
    to gamma."""
    settings = {name: getattr(objective, name) for name in LOSS_OPTIONS}
    annealing, factor = objective.kl_prcp_annealing, 1.0
    if annealing is not None:
        factor = (
            annealed_kl_prcp_coef(step, objective.kl_prcp_coef, annealing.end, annealing.steps) / objective.kl_prcp_coef
        )
    return settings | {
        "average": "sequence" if objective.average == "sequence" else "token",
        "kl_prcp_coef": objective.kl_prcp_coef * factor * kl_prcp_scale,
        "entropy_coef": objective.entropy_coef * factor,
        "masked_image_entropy_coef": objective.masked_image_entropy_coef * factor,
    }


def what_to_ask(batch: MicroBatch, temperature: float, objective: ObjectiveConfig | None) -> Responses:
    """Of the model's last stage. objective: decides about the twins; None: there are none."""
    exact = batch.has_twins and objective.kl_prcp_estimator == "exact"
    with_gradient = not batch.has_twins or objective.masked_branch == "recompute_with_grad"
    return Responses(batch.response_positions, batch.response_tokens, temperature, exact, with_gradient)


def response_statistics(
    statistics: TokenStatistics, batch: MicroBatch, with_gradient: bool = True
) -> dict[str, Tensor]:
    """TokenStatistics of a micro-batch -> per-token tensors [B, T] by papo_loss's names, zeros on padding.

    with_gradient: of the twins.
    """
    here = int(batch.response_mask.sum())
    found = {"log_probs": statistics.log_probs[:here], "entropy": statistics.entropy[:here]}
    if batch.has_twins:
        masked = {
            "masked_image_log_probs": statistics.log_probs[here:],
            "masked_image_entropy": statistics.entropy[here:],
        }
        found |= masked if with_gradient else {name: values.detach() for name, values in masked.items()}
    if statistics.kl is not None:
        found["exact_kl_prcp"] = statistics.kl
    return {name: pad_responses([values], batch.response_mask) for name, values in found.items()}


def _run(
    model,
    batches: Iterable[MicroBatch],
    num_micro_batches: int,
    temperature: float,
    objective,
    on_output: Callable,
    forward_only: bool,
) -> list:
    def forward_step(iterator: Iterator[MicroBatch], model):
        batch = next(iterator)
        output = model(
            batch.input_ids, batch.position_ids, batch.pixel_values, batch.image_grids,
            pictures=batch.pictures, groups=batch.groups, responses=what_to_ask(batch, temperature, objective),
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
    model,
    collator: Collator,
    rows: Sequence[TrainingRollout],
    micro_batch_size: int,
    temperature: float,
    progress: Callable[[int], None],
    kinds: Sequence[Pictures],
) -> dict[Pictures, dict[str, list[Tensor]]]:
    """One sweep over the rows without gradient, each micro-batch in turn with the pictures of every kind: {kind:
    log_probs and entropy}.

    One fp32 [response_length] per row; no rows before the last stage. Collective over the model-parallel group.
    """

    def collect(batch: MicroBatch, statistics: TokenStatistics, non_loss_data: bool):
        tables = response_statistics(statistics, batch)
        progress(len(batch.rows))
        return [
            {name: values[i, : row.response_length] for name, values in tables.items()}
            for i, row in enumerate(batch.rows)
        ]

    collected = []
    if rows and kinds:
        plan = collator.plan(rows, micro_batch_size, kinds[0])
        batches = (collator.collate(part, kind) for part in plan for kind in kinds)
        with torch.no_grad():
            collected = _run(model, batches, len(plan) * len(kinds), temperature, None, collect, forward_only=True)
    found = {
        kind: [row for batch in collected[place :: len(kinds)] for row in batch] for place, kind in enumerate(kinds)
    }
    return {
        kind: {name: [row[name] for row in each] for name in ("log_probs", "entropy")} for kind, each in found.items()
    }


def compute_log_probs(
    model,
    collator: Collator,
    rows: Sequence[TrainingRollout],
    micro_batch_size: int,
    temperature: float,
    progress: Callable[[int], None],
    pictures: Pictures = "original",
) -> dict[str, list[Tensor]]:
    """sweep() with one kind of pictures: log_probs and entropy of every row's response."""
    return sweep(model, collator, rows, micro_batch_size, temperature, progress, [pictures])[pictures]


def papo_step(
    model,
    collator: Collator,
    rows: Sequence[TrainingRollout],
    cached: dict[str, list[Tensor]],
    micro_batch_size: int,
    temperature: float,
    objective: ObjectiveConfig,
    *,
    totals: StepTotals,
    settings: dict,
    progress: Callable[[int], None],
    seen: dict[str, list[Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Forward and backward of one optimizer step over this rank's rows; gradients end in the DDP buffers.

    cached: per-row tensors [response_length] by papo_loss's names (old_log_probs, ref_log_probs, ...), on the last
    stage. Without old_log_probs the policy is its own old policy, as it is in the first step after sampling: the ratio
    is 1, with its gradient. totals: of the whole step. settings: loss_settings of this step. seen: gets log_probs and
    entropy of every row, as sweep() gives them. Returns this rank's contributions to the metrics ({} before the last
    stage).
    """
    pictures = "both" if objective.masked_rows_ride else "original"
    plan = collator.plan(rows, micro_batch_size, pictures)
    # the schedule divides by the number of micro-batches and DDP by the data-parallel size; the weights of the loss
    # already hold both
    scale = len(plan) * process_groups.dp_group().size()

    def loss(batch: MicroBatch, statistics: TokenStatistics):
        device = batch.response_mask.device
        counted = torch.tensor([[float(row.counts)] for row in batch.rows], device=device)
        here = totals
        if objective.average == "micro_batch":  # its own counts, as if every micro-batch of the step had as many
            own = StepTotals.of(batch.rows)
            here = StepTotals(own.tokens * scale, own.sequences * scale, own.correct_tokens * scale)
        tables = response_statistics(statistics, batch, objective.masked_branch == "recompute_with_grad")
        if seen is not None:
            for name, values in seen.items():
                values += [tables[name][i, : row.response_length].detach() for i, row in enumerate(batch.rows)]
        tables = {"old_log_probs": tables["log_probs"].detach()} | batch.cached | tables
        value, metrics = papo_loss(
            advantages=torch.tensor([[row.advantage] for row in batch.rows], device=device),
            response_mask=batch.response_mask * counted,
            correct=torch.tensor([[float(row.is_correct)] for row in batch.rows], device=device),
            num_tokens=here.tokens,
            num_sequences=here.sequences,
            num_correct_tokens=here.correct_tokens,
            **tables,
            **settings,
        )
        progress(len(batch.rows))
        return value * scale, metrics

    def batches() -> Iterator[MicroBatch]:
        first = 0
        for part in plan:
            batch = collator.collate(part, pictures)
            here = slice(first, first + len(batch.rows))
            first = here.stop
            if process_groups.is_last_stage():
                batch.cached = {
                    name: pad_responses(values[here], batch.response_mask) for name, values in cached.items()
                }
            yield batch

    per_batch = _run(model, batches(), len(plan), temperature, objective, loss, forward_only=False)
    return {name: sum(metrics[name] for metrics in per_batch) for name in per_batch[0]} if per_batch else {}

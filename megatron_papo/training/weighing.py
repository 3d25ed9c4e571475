"""What the tokens of a step are weighed by in the loss, over the rollouts of all data-parallel ranks: from what the
sweeps before the step said."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_papo.config import ObjectiveConfig
from megatron_papo.distributed import collectives, process_groups
from megatron_papo.objective.sensitivity import TwoViews
from megatron_papo.objective.token_weights import StepTokens
from megatron_papo.training.collator import Pictures
from megatron_papo.training.forward_step import PerRollout, Seen
from megatron_papo.training.loss_recipe import contrast_weights_of, sensitivity_of, token_weights_of
from megatron_papo.training.rows import TrainingRollout


def sensitivities(
    objective: ObjectiveConfig, rows: Sequence[TrainingRollout], seen: dict[Pictures, Seen]
) -> list[Tensor]:
    """Return the sensitivity of each rollout's tokens, [response_length]; none before the last pipeline stage.

    Of a rollout without pictures it is 0, whatever the rounding of two passes over the same prompt is.

    Args:
        objective: its formula.
        rows: the rollouts.
        seen: what one policy said about them with the picture and with the masked one, in pairs where the formula needs
            both logits.
    """
    if objective.sensitivity.needs_both_logits:
        pairs = seen["both"]
        views = [
            TwoViews(*of_rollout)
            for of_rollout in zip(
                pairs.log_probs,
                pairs.other_log_probs,
                pairs.entropy,
                pairs.other_entropy,
                pairs.divergences,
                strict=True,
            )
        ]
    else:
        first, second = seen["original"], seen["masked"]
        views = [
            TwoViews(*of_rollout)
            for of_rollout in zip(first.log_probs, second.log_probs, first.entropy, second.entropy, strict=True)
        ]
    values = []
    for row, of_rollout in zip(rows if views else (), views, strict=True):
        sensitivity = sensitivity_of(objective, of_rollout).float()
        values.append(sensitivity if row.grids else torch.zeros_like(sensitivity))
    return values


def weigh(
    objective: ObjectiveConfig,
    rows: Sequence[TrainingRollout],
    places: Sequence[int],
    values: dict[str, Sequence[Tensor]],
) -> PerRollout:
    """Return policy_weights, kl_prcp_weights and contrast_weights of this rank's rollouts of a step, as far as there
    are any.

    A rollout that does not count in the loss is in no statistic either.

    Args:
        objective: its selections, shapings and contrast.
        rows: the rollouts of the step, all ranks'.
        places: where this rank's stand among them.
        values: sensitivity and entropy of this rank's rollouts, as far as they are needed: StepTokens by name.

    Collective over the data-parallel ranks of the last pipeline stage; the others return {}.
    """
    if not process_groups.is_last_stage():
        return {}
    own = {place: {name: of_rows[i].cpu() for name, of_rows in values.items()} for i, place in enumerate(places)}
    of_step = {place: found for of_rank in collectives.gather_data_parallel(own) for place, found in of_rank.items()}
    empty = torch.zeros(0)
    of_rows = {name: [of_step[i][name] if row.counts else empty for i, row in enumerate(rows)] for name in values}
    weights = token_weights_of(objective, StepTokens(**of_rows))
    if objective.contrast is not None:
        any_values = [torch.zeros(row.response_length if row.counts else 0) for row in rows]
        advantages = [row.advantage for row in rows]
        weights["contrast_weights"] = contrast_weights_of(objective, of_rows.get("sensitivity", any_values), advantages)
    device = process_groups.device()
    return {
        name: [
            of_step_rows[i].float().to(device)
            if rows[i].counts
            else torch.zeros(rows[i].response_length, device=device)
            for i in places
        ]
        for name, of_step_rows in weights.items()
    }

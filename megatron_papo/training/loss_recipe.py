"""The configured objective in the words of papo_loss: the one place where options choose formulas."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from megatron_papo.config import ObjectiveConfig, TokenSelectionConfig
from megatron_papo.objective.contrast import contrast, contrast_weights, detected
from megatron_papo.objective.dealt_average import deal, dealt_denominators
from megatron_papo.objective.papo_loss import (
    ClipRatios,
    Coefficients,
    EstimatedKL,
    Formulas,
    StepCounts,
    TruncatedImportanceWeights,
    annealed_kl_prcp_coef,
    exact_entropy,
    exact_kl_prcp,
    kl_abs,
    kl_k1,
    kl_k2,
    kl_k3,
    sampled_entropy,
    sequence_average,
    sequence_log_ratios,
    token_average,
    token_log_ratios,
    total,
)
from megatron_papo.objective.sensitivity import (
    TwoViews,
    abs_sensitivity,
    entropy_gap,
    exact_kl,
    hellinger,
    jensen_shannon,
    k3_sensitivity,
    vepo_score,
)
from megatron_papo.objective.token_weights import (
    Deal,
    PolicyWeights,
    ResponseShaping,
    StepTokens,
    TokenSelection,
    TokenShaping,
    TrajectoryShaping,
)
from megatron_papo.training.rows import TrainingRollout

SENSITIVITIES: dict[str, Callable[[TwoViews], Tensor]] = {
    "k3": k3_sensitivity,
    "abs": abs_sensitivity,
    "entropy_gap": entropy_gap,
    "exact": exact_kl,
    "jsd": jensen_shannon,
    "hellinger": hellinger,
    "vepo": vepo_score,
}
KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "abs": kl_abs, "k2": kl_k2, "k3": kl_k3}


@dataclass(frozen=True)
class Twins:
    """What the update wants of the masked-image twins that ride in its micro-batches."""

    with_gradient: bool
    """False: they are constants, there for their logits."""
    exact_kl: bool
    """Whether the KL of the two branches is summed over the whole vocabulary."""
    pictures: Literal["both", "all"] = "both"
    """all: and twins with kept images."""


@dataclass(frozen=True)
class LossRecipe:
    """The loss of one optimizer step."""

    coefficients: Coefficients
    formulas: Formulas
    of_loss: Callable[[Tensor, StepCounts], Tensor]
    """token_average or sequence_average."""
    twins: Twins | None
    """None: no twins ride."""


def loss_recipe(objective: ObjectiveConfig, step: int, kl_prcp_scale: float = 1.0) -> LossRecipe:
    """Return the loss of an optimizer step.

    Args:
        objective: the configuration.
        step: 0, 1, ... of the run, for the annealing of gamma.
        kl_prcp_scale: what the hacking guard multiplies gamma by.
    """
    twins = None
    if objective.masked_rows_ride:
        twins = Twins(
            objective.masked_branch == "recompute_with_grad",
            objective.kl_prcp_estimator == "exact",
            "all" if objective.uses_kept_image else "both",
        )
    return LossRecipe(
        coefficients_at(objective, step, kl_prcp_scale),
        formulas_of(objective),
        sequence_average if objective.average == "sequence" else token_average,
        twins,
    )


def coefficients_at(objective: ObjectiveConfig, step: int, kl_prcp_scale: float) -> Coefficients:
    """Return the weights of the terms at a step. Annealing acts on gamma and, by the same factor, on both entropies."""
    annealing, factor = objective.kl_prcp_annealing, 1.0
    if annealing is not None:
        annealed = annealed_kl_prcp_coef(step, objective.kl_prcp_coef, annealing.end, annealing.steps)
        factor = annealed / objective.kl_prcp_coef
    return Coefficients(
        kl_ref=objective.kl_ref_coef,
        kl_prcp=objective.kl_prcp_coef * factor * kl_prcp_scale,
        entropy=objective.entropy_coef * factor,
        masked_image_entropy=objective.masked_image_entropy_coef * factor,
        sft=objective.sft_coef,
        kl_kept=objective.kl_kept_coef,
        contrast=0.0 if objective.contrast is None else objective.contrast.coefficient,
    )


def formulas_of(objective: ObjectiveConfig) -> Formulas:
    """Return the formulas that the options name."""
    cap, estimator = objective.importance_sampling_cap, objective.kl_prcp_estimator
    return Formulas(
        ClipRatios(objective.clip_ratio_low, objective.clip_ratio_high, objective.clip_ratio_dual),
        log_ratios=sequence_log_ratios if objective.ratio_level == "sequence" else token_log_ratios,
        importance_weights=None if cap is None else TruncatedImportanceWeights(cap),
        kl_ref=KL_ESTIMATORS[objective.kl_ref_estimator],
        kl_prcp=exact_kl_prcp if estimator == "exact" else EstimatedKL(KL_ESTIMATORS[estimator]),
        kl_prcp_top_p=objective.kl_prcp_top_p,
        kl_prcp_clip=objective.kl_prcp_clip,
        entropy=exact_entropy if objective.entropy_estimator == "exact" else sampled_entropy,
        contrast=None if objective.contrast is None else partial(contrast, temperature=objective.contrast.temperature),
    )


def counts_of(row: TrainingRollout) -> StepCounts:
    """Return what a rollout adds to the denominators: nothing where it is left out of the loss."""
    tokens = row.response_length if row.counts else 0
    return StepCounts(tokens, int(row.counts), tokens if row.is_correct else 0)


def denominators_of(rollouts: Sequence[StepCounts], objective: ObjectiveConfig) -> list[StepCounts]:
    """Return what each rollout of an optimizer step is divided by in the loss.

    Args:
        rollouts: counts_of each of the whole step, all data-parallel ranks', in the order of the file.
        objective: its average.
    """
    if objective.average == "micro_batch":
        return dealt_denominators(rollouts, objective.average_ranks, objective.average_micro_batch_size)
    return [total(rollouts)] * len(rollouts)


def sensitivity_of(objective: ObjectiveConfig, views: TwoViews) -> Tensor:
    """Return the configured sensitivity of response tokens."""
    return SENSITIVITIES[objective.sensitivity.formula](views)


def token_weights_of(
    objective: ObjectiveConfig, tokens: StepTokens, dealt: Deal | None = None
) -> dict[str, list[Tensor]]:
    """Return what tokens are multiplied by in the loss: policy_weights, kl_prcp_weights, where there are any.

    Args:
        objective: its selections and shapings.
        tokens: of all rollouts of the step, in its order.
        dealt: over which rollouts the statistics of trajectory_shaping are, where it is not the objective that says so.
    """
    weights = {}
    policy = policy_weights_of(objective)
    if policy != PolicyWeights():
        if objective.trajectory_shaping is not None and objective.trajectory_shaping.statistics == "dealt":
            rollouts = len(tokens.sensitivity or [])
            dealt = deal(rollouts, objective.average_ranks, objective.average_micro_batch_size)
        weights["policy_weights"] = policy(tokens, dealt)
    if objective.kl_prcp_tokens is not None:
        weights["kl_prcp_weights"] = _selection(objective.kl_prcp_tokens)(tokens)
    return weights


def contrast_weights_of(
    objective: ObjectiveConfig, sensitivity: Sequence[Tensor], advantages: Sequence[float]
) -> list[Tensor]:
    """Return the weight of each token of a step in objective.contrast.

    Args:
        objective: its contrast.
        sensitivity: one tensor [T] per rollout of the step, in its order; of any values where contrast.share is null.
        advantages: of the rollouts.
    """
    config = objective.contrast
    assert config is not None
    selected = []
    for of_response, advantage in zip(sensitivity, advantages, strict=True):
        kept = torch.ones(len(of_response)).double() if config.share is None else detected(of_response, config.share)
        selected.append(kept * float(advantage > 0 or not config.positive_advantages))
    if config.average == "step":
        return contrast_weights(selected)
    return contrast_weights(selected, objective.average_ranks, objective.average_micro_batch_size)


def policy_weights_of(objective: ObjectiveConfig) -> PolicyWeights:
    """Return how the options weigh the policy loss of tokens."""
    selection, trajectory = objective.policy_tokens, objective.trajectory_shaping
    tokens, responses = objective.token_shaping, objective.response_shaping
    return PolicyWeights(
        None if selection is None else _selection(selection),
        None if trajectory is None else TrajectoryShaping(trajectory.lowest),
        None if tokens is None else TokenShaping(tokens.threshold, tokens.boost),
        None if responses is None else ResponseShaping(responses.strength, responses.share),
    )


def _selection(selection: TokenSelectionConfig) -> TokenSelection:
    return TokenSelection(
        selection.sensitivity_share,
        selection.entropy_share,
        over_step=selection.per == "step",
        sensitivity_only_weight=selection.sensitivity_only_weight,
        renormalise=selection.average == "selected",
    )

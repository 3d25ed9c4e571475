"""The PAPO objective (arXiv 2507.06448, section 3), as pure functions of per-token tensors.

    L =   L_clip                                   clipped policy gradient (GRPO / DAPO / GSPO)
        + kl_ref_coef               * KL_ref       beta
        - kl_prcp_coef              * KL_prcp      gamma: MAXIMISE the divergence from the masked-image policy
        + entropy_coef              * H            eta_1 \\  double entropy loss
        + masked_image_entropy_coef * H_mask       eta_2 /
        + sft_coef                  * -log pi      of correct rollouts
        + kl_kept_coef              * KL_kept      from the policy with a third view, the kept picture
        + contrast.coefficient      * softplus((KL_kept - KL_prcp) / temperature)

Every per-token tensor is [B, T]: B rollouts, T response positions (padded); response_mask is 1.0 on response tokens.
Averages are weighted sums whose weights already hold the denominators of the whole optimizer step, so that
contributions of micro-batches and data-parallel ranks simply add up: the same loss and gradient for any split.

Differs: the authors average inside each micro-batch and then over micro-batches, so their result depends on which
rollouts share one. A caller who wants that (`average: micro_batch`) gives each rollout the denominator of the
micro-batch that it would have been in (objective/dealt_average.py), in whatever micro-batch it is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
KL_LIMIT = 10.0
LOWEST_LOG_PROB = -1e4
"""A forbidden token's -inf becomes this, so that -inf - -inf is no nan; far below the log of any probability that fp32
can hold."""


@dataclass(frozen=True)
class MaskedImageTokens:
    """What the policy says about the response tokens when it sees the masked picture. Tensors [B, T]."""

    log_probs: Tensor
    entropy: Tensor | None = None
    """Over the whole vocabulary."""
    exact_kl: Tensor | None = None
    """KL(pi_theta || pi_mask) over the whole vocabulary, for the formula exact_kl_prcp."""


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of a micro-batch of B rollouts. Tensors [B, T]; what stands on padding does not matter.

    Gradient flows into whatever requires it: a cached masked-image branch does not.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    """[B, T], or [B, 1] where all tokens of a rollout share one."""
    mask: Tensor
    """1.0 on the response tokens that count."""
    correct: Tensor | None = None
    """[B, 1] of 0 and 1: rollouts whose answer is right; for Coefficients.sft."""
    entropy: Tensor | None = None
    """Over the whole vocabulary."""
    ref_log_probs: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    """As the rollout engine said; for Formulas.importance_weights."""
    masked_image: MaskedImageTokens | None = None
    policy_weights: Tensor | None = None
    """What each token's policy loss is multiplied by, a constant (objective/token_weights.py); None: 1."""
    kl_prcp_weights: Tensor | None = None
    """What each token's KL_prcp is multiplied by, a constant; None: 1."""
    kept_image: MaskedImageTokens | None = None
    """The same with the kept picture, a third view; for Coefficients.kl_kept and contrast."""
    contrast_weights: Tensor | None = None
    """Of Formulas.contrast, a constant: sum(weight * contrast) is its average over the step."""


@dataclass(frozen=True)
class StepCounts:
    """Denominators: counts over a whole optimizer step, all its micro-batches and data-parallel ranks.

    Numbers, or tensors [B, 1] where each rollout has its own.
    """

    tokens: float | Tensor
    """Response tokens."""
    sequences: float | Tensor
    """Rollouts."""
    correct_tokens: float | Tensor = 0
    """Response tokens of correct rollouts."""


def total(rollouts: Sequence[StepCounts], times: int = 1) -> StepCounts:
    """Return the counts of several rollouts together, times a number."""
    return StepCounts(
        times * sum(counts.tokens for counts in rollouts),
        times * sum(counts.sequences for counts in rollouts),
        times * sum(counts.correct_tokens for counts in rollouts),
    )


def stacked(rollouts: Sequence[StepCounts], device: torch.device) -> StepCounts:
    """Return the denominators of B rollouts, given as numbers, as tensors [B, 1]."""
    rows = [[counts.tokens, counts.sequences, counts.correct_tokens] for counts in rollouts]
    counts = torch.tensor(rows, dtype=torch.float32).to(device, non_blocking=True)
    return StepCounts(*counts.split(1, dim=1))


def token_average(response_mask: Tensor, counts: StepCounts) -> Tensor:
    """Return weights w with sum(w * x) = the mean of x over the step's response tokens. [B, T] -> [B, T].

    counts: of the WHOLE step, all micro-batches and ranks.
    """
    return response_mask / _at_least_one(counts.tokens)


def sequence_average(response_mask: Tensor, counts: StepCounts) -> Tensor:
    """Return weights w with sum(w * x) = the mean over the step's rollouts of their token means. [B, T] -> [B, T].

    An empty response contributes 0. counts: of the WHOLE step, all micro-batches and ranks.
    """
    lengths = response_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return response_mask / lengths / _at_least_one(counts.sequences)


def _at_least_one(count: float | Tensor) -> float | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def token_log_ratios(log_probs: Tensor, old_log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """Return log pi - log pi_old of each token, clamped to [-20, 20]. [B, T] x 3 -> [B, T]."""
    return (log_probs - old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def sequence_log_ratios(log_probs: Tensor, old_log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """Return the mean of log pi - log pi_old over each rollout's tokens, on all of them. [B, T] x 3 -> [B, T].

    GSPO, arXiv 2507.18071, equation 7; clamped to [-20, 20]. Its gradient flows into every token of the rollout.
    """
    lengths = response_mask.sum(dim=1, keepdim=True).clamp(min=1)
    means = ((log_probs - old_log_probs) * response_mask).sum(dim=1, keepdim=True) / lengths
    return means.expand_as(response_mask).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


@dataclass(frozen=True)
class ClipRatios:
    """How far the ratio may leave 1: down to 1 - low, up to 1 + high; `dual` bounds it where the advantage is
    negative."""

    low: float
    high: float
    dual: float


def clipped_policy_loss(
    log_ratio: Tensor, advantages: Tensor, clip_ratios: ClipRatios
) -> tuple[Tensor, Tensor, Tensor]:
    """Return PPO's clipped loss with dual clip, per token. [B, T] x 2 -> loss, clipped_high, clipped_dual [B, T].

        max(-A r, -A clip(r, 1 - low, 1 + high)),  then min(that, -A c) where A < 0        r = exp(log_ratio)

    clipped_high and clipped_dual are 1.0 where the clip, or the dual clip (arXiv 1912.09729), decided.
    """
    low, high = torch.log1p(torch.tensor([-clip_ratios.low, clip_ratios.high], dtype=torch.float64)).tolist()
    unclipped = -advantages * log_ratio.exp()
    clipped = -advantages * log_ratio.clamp(low, high).exp()
    loss = torch.maximum(unclipped, clipped)
    bound = -advantages * clip_ratios.dual
    negative = advantages < 0
    clipped_high = (unclipped < clipped).to(loss.dtype)
    clipped_dual = (negative & (loss > bound)).to(loss.dtype)
    return torch.where(negative, torch.minimum(loss, bound), loss), clipped_high, clipped_dual


def truncated_importance_weights(old_log_probs: Tensor, rollout_log_probs: Tensor, cap: float) -> Tensor:
    """Return min(pi_old / pi_rollout, cap) per token, a constant. [B, T], [B, T] -> [B, T].

    Corrects for the rollout engine's policy being another one than the trainer's, numerically or because it is older
    (truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training").
    """
    ratio = (old_log_probs - rollout_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return ratio.clamp(max=cap).detach()


def kl_k1(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Return the per-token k1 estimate of KL(pi_theta || pi_other): log pi_theta - log pi_other. [B, T] x 2 -> [B, T],
    any sign."""
    return log_probs - other_log_probs


def kl_abs(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Return |log pi_theta - log pi_other|, non-negative; not an estimate of a KL. [B, T], [B, T] -> [B, T]."""
    return (log_probs - other_log_probs).abs()


def kl_k2(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Return the per-token k2 estimate of KL(pi_theta || pi_other): (log pi_theta - log pi_other)^2 / 2. [B, T] x 2 ->
    [B, T], Schulman 2020."""
    return 0.5 * (log_probs - other_log_probs).square()


def kl_k3(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Return the per-token k3 estimate of KL(pi_theta || pi_other). [B, T], [B, T] -> [B, T], non-negative.

        k3 = exp(d) - d - 1,   d = log pi_other - log pi_theta        Schulman 2020

    d is clamped to [-20, 20] and the value to [-10, 10], as in the authors' code. Used for kl_ref and kl_prcp. Gradient
    flows into both arguments: the caller detaches.

    Differs: the paper prints r - log r - 1 with r = pi_theta / pi_mask, the inverse ratio, which is not an estimate of
    this KL under samples of pi_theta. The published models were trained with this direction.
    """
    d = (other_log_probs - log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (d.exp() - d - 1).clamp(-KL_LIMIT, KL_LIMIT)


@dataclass(frozen=True)
class TruncatedImportanceWeights:
    """truncated_importance_weights with a cap."""

    cap: float

    def __call__(self, old_log_probs: Tensor, rollout_log_probs: Tensor) -> Tensor:
        return truncated_importance_weights(old_log_probs, rollout_log_probs, self.cap)


@dataclass(frozen=True)
class EstimatedKL:
    """KL_prcp per token by an estimator of the sampled tokens' log-probs."""

    estimator: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, log_probs: Tensor, masked_image: MaskedImageTokens) -> Tensor:
        return self.estimator(log_probs, masked_image.log_probs)


def exact_kl_prcp(log_probs: Tensor, masked_image: MaskedImageTokens) -> Tensor:
    """Return KL_prcp per token as the sum over the whole vocabulary, which the model's last stage has computed."""
    return _given(masked_image.exact_kl, "exact_kl")


def sampled_entropy(log_probs: Tensor, entropy: Tensor | None) -> Tensor:
    """Return -log pi of the sampled tokens, an unbiased estimate of the entropy. [B, T]."""
    return -log_probs


def exact_entropy(log_probs: Tensor, entropy: Tensor | None) -> Tensor:
    """Return the entropy over the whole vocabulary, which the model's last stage has computed. [B, T]."""
    return _given(entropy, "entropy")


def _given(values: Tensor | None, name: str) -> Tensor:
    if values is None:
        raise ValueError(f"the formulas need {name}, which was not given")
    return values


def top_share(values: Tensor, response_mask: Tensor, share: float) -> Tensor:
    """Return 1.0 on the `share` of each rollout's response tokens with the largest values, else 0.0. [B, T] x 2.

    The threshold is the (1 - share) quantile (linear interpolation) over that rollout's response tokens; ties are kept.
    """
    of_responses = values.detach().float().masked_fill(response_mask == 0, torch.nan)
    threshold = torch.nanquantile(of_responses, 1.0 - share, dim=1, keepdim=True)  # nan where the response is empty
    return (of_responses >= threshold).to(values.dtype)


def selected_kl(values: Tensor, response_mask: Tensor, top_p: float | None, clip: float | None) -> Tensor:
    """Return what two options leave of KL_prcp per token: the top_p share of each rollout's tokens, clamped to [0,
    clip]."""
    if top_p is not None:
        values = values * top_share(values, response_mask, top_p)
    return values if clip is None else values.clamp(0.0, clip)


def annealed_kl_prcp_coef(step: int, start: float, end: float, steps: int) -> float:
    """Return gamma at optimizer step 0, 1, ... of the run: linear from start to end over `steps` steps, then constant.

    The entropy coefficients are scaled by the same factor, annealed / start. Differs: the authors' code advances once
    per iteration.
    """
    return start + (end - start) * min(step / steps, 1.0)


@dataclass(frozen=True)
class Averages:
    """The denominators of the step, and what the terms of the loss are averaged over.

    Entropies, clip fractions and the variance of KL_prcp are averages over tokens, whatever `of_loss` is.
    """

    counts: StepCounts
    of_loss: Callable[[Tensor, StepCounts], Tensor] = token_average
    """token_average or sequence_average."""


@dataclass(frozen=True)
class Coefficients:
    """Weights of the loss's terms; a term with weight 0 is still computed where its tensors are given, and logged."""

    kl_ref: float = 0.0
    """beta"""
    kl_prcp: float = 0.0
    """gamma"""
    entropy: float = 0.0
    """eta_1"""
    masked_image_entropy: float = 0.0
    """eta_2"""
    sft: float = 0.0
    kl_kept: float = 0.0
    contrast: float = 0.0


@dataclass(frozen=True)
class Formulas:
    """How each term is computed from the tokens."""

    clip_ratios: ClipRatios
    log_ratios: Callable[[Tensor, Tensor, Tensor], Tensor] = token_log_ratios
    """token_log_ratios or sequence_log_ratios."""
    importance_weights: Callable[[Tensor, Tensor], Tensor] | None = None
    """(old_log_probs, rollout_log_probs) -> the weight of each token's policy loss, e.g. TruncatedImportanceWeights."""
    kl_ref: Callable[[Tensor, Tensor], Tensor] = kl_k3
    """kl_k1, kl_abs, kl_k2 or kl_k3."""
    kl_prcp: Callable[[Tensor, MaskedImageTokens], Tensor] = EstimatedKL(kl_k3)
    """EstimatedKL of an estimator, or exact_kl_prcp."""
    kl_prcp_top_p: float | None = None
    """Keep only this share of each rollout's tokens, those with the largest KL_prcp."""
    kl_prcp_clip: float | None = None
    """Clamp each token's KL_prcp to [0, this]."""
    entropy: Callable[[Tensor, Tensor | None], Tensor] = sampled_entropy
    """sampled_entropy or exact_entropy, for both branches."""
    contrast: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(log_probs, kept, masked) -> per token: objective/contrast.py with a temperature."""


def papo_loss(
    tokens: ResponseTokens, averages: Averages, coefficients: Coefficients, formulas: Formulas
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return one micro-batch's contribution to the loss of the optimizer step, and to its metrics.

        policy loss  +  beta KL_ref  -  gamma KL_prcp  +  eta_1 H  +  eta_2 H_mask  +  sft

    Args:
        tokens: the micro-batch. A tensor may be None where no formula with a weight needs it.
        averages: the denominators of the whole step.
        coefficients: beta, gamma, ... at this step.
        formulas: how each term is computed.

    The metrics are contributions too: sum them over micro-batches and ranks, then call finish_metrics. Raises
    ValueError where a formula's tensor was not given.
    """
    t = _clean(tokens)
    loss_weights = averages.of_loss(t.mask, averages.counts)
    token_weights = token_average(t.mask, averages.counts)

    log_ratio = formulas.log_ratios(t.log_probs, t.old_log_probs, t.mask)
    policy, clipped_high, clipped_dual = clipped_policy_loss(log_ratio, t.advantages, formulas.clip_ratios)
    if formulas.importance_weights is not None:
        rollout_log_probs = _given(t.rollout_log_probs, "rollout_log_probs")
        policy = policy * formulas.importance_weights(t.old_log_probs, rollout_log_probs)
    terms: dict[str, Tensor] = {}
    if t.policy_weights is not None:
        policy = policy * t.policy_weights
        terms["policy_tokens_share"] = (token_weights * (t.policy_weights > 0)).sum()
        terms["policy_weight_mean"] = (token_weights * t.policy_weights).sum()
    terms["policy_loss"] = (loss_weights * policy).sum()
    loss = terms["policy_loss"]
    loss = loss + coefficients.entropy * (token_weights * formulas.entropy(t.log_probs, t.entropy)).sum()

    if t.ref_log_probs is not None:
        terms["kl_ref"] = (loss_weights * formulas.kl_ref(t.log_probs, t.ref_log_probs)).sum()
        loss = loss + coefficients.kl_ref * terms["kl_ref"]

    if t.masked_image is not None:
        per_token = formulas.kl_prcp(t.log_probs, t.masked_image)
        selected = selected_kl(per_token, t.mask, formulas.kl_prcp_top_p, formulas.kl_prcp_clip)
        if t.kl_prcp_weights is not None:
            selected = selected * t.kl_prcp_weights
        terms["kl_prcp"] = (loss_weights * selected).sum()
        masked_entropy = formulas.entropy(t.masked_image.log_probs, t.masked_image.entropy)
        loss = loss - coefficients.kl_prcp * terms["kl_prcp"]
        loss = loss + coefficients.masked_image_entropy * (token_weights * masked_entropy).sum()
        terms["kl_prcp_mean"] = (token_weights * per_token).sum()
        terms["kl_prcp_second_moment"] = (token_weights * per_token.square()).sum()

    if t.kept_image is not None:
        terms["kl_kept"] = (loss_weights * formulas.kl_prcp(t.log_probs, t.kept_image)).sum()
        loss = loss + coefficients.kl_kept * terms["kl_kept"]

    if formulas.contrast is not None and t.kept_image is not None and t.masked_image is not None:
        weights = _given(t.contrast_weights, "contrast_weights")
        per_token = formulas.contrast(t.log_probs, t.kept_image.log_probs, t.masked_image.log_probs)
        terms["contrast"] = (weights * per_token).sum()
        terms["contrast_tokens_share"] = (token_weights * (weights > 0)).sum()
        loss = loss + coefficients.contrast * terms["contrast"]

    if coefficients.sft > 0:
        of_correct = StepCounts(averages.counts.correct_tokens, averages.counts.sequences)
        sft_weights = token_average(t.mask * _given(t.correct, "correct"), of_correct)
        terms["sft_loss"] = (sft_weights * -t.log_probs).sum()
        loss = loss + coefficients.sft * terms["sft_loss"]

    terms |= _entropies(t, token_weights)
    terms |= {
        "loss": loss,
        "clip_fraction_high": (token_weights * clipped_high).sum(),
        "clip_fraction_dual": (token_weights * clipped_dual).sum(),
        "kl_old": -(token_weights * token_log_ratios(t.log_probs, t.old_log_probs, t.mask)).sum(),
    }
    return loss, {name: value.detach() for name, value in terms.items()}


def _entropies(t: ResponseTokens, token_weights: Tensor) -> dict[str, Tensor]:
    """Return both estimates of both branches' entropies, as far as they can be computed."""
    entropies: dict[str, Tensor | None] = {"entropy_sampled": -t.log_probs, "entropy": t.entropy}
    if t.masked_image is not None:
        entropies["masked_image_entropy_sampled"] = -t.masked_image.log_probs
        entropies["masked_image_entropy"] = t.masked_image.entropy
    return {name: (token_weights * values).sum() for name, values in entropies.items() if values is not None}


def _clean(tokens: ResponseTokens) -> ResponseTokens:
    """Return the tokens without inf or nan: padding must not bring one into a sum, nor a forbidden token its -inf."""
    mask = tokens.mask.bool()

    def clean(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).clamp(min=LOWEST_LOG_PROB)

    def clean_if_given(values: Tensor | None) -> Tensor | None:
        return None if values is None else clean(values)

    def clean_view(view: MaskedImageTokens | None) -> MaskedImageTokens | None:
        if view is None:
            return None
        return MaskedImageTokens(clean(view.log_probs), clean_if_given(view.entropy), clean_if_given(view.exact_kl))

    return replace(
        tokens,
        log_probs=clean(tokens.log_probs),
        old_log_probs=clean(tokens.old_log_probs),
        entropy=clean_if_given(tokens.entropy),
        ref_log_probs=clean_if_given(tokens.ref_log_probs),
        rollout_log_probs=clean_if_given(tokens.rollout_log_probs),
        policy_weights=clean_if_given(tokens.policy_weights),
        kl_prcp_weights=clean_if_given(tokens.kl_prcp_weights),
        masked_image=clean_view(tokens.masked_image),
        kept_image=clean_view(tokens.kept_image),
        contrast_weights=clean_if_given(tokens.contrast_weights),
    )


def finish_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Return the metrics of an optimizer step from the sums of papo_loss's contributions.

    kl_prcp_mean and kl_prcp_variance: over the response tokens of the step, of the estimate before kl_prcp_top_p and
    kl_prcp_clip.
    """
    metrics = dict(sums)
    if "kl_prcp_second_moment" in metrics:
        metrics["kl_prcp_variance"] = max(metrics.pop("kl_prcp_second_moment") - metrics["kl_prcp_mean"] ** 2, 0.0)
    return metrics

"""The PAPO objective (arXiv 2507.06448, section 3), as pure functions of per-token tensors.

    L =   L_clip                                   clipped policy gradient (GRPO / DAPO / GSPO)
        + kl_ref_coef               * KL_ref       beta
        - kl_prcp_coef              * KL_prcp      gamma: MAXIMISE the divergence from the masked-image policy
        + entropy_coef              * H            eta_1 \\  double entropy loss
        + masked_image_entropy_coef * H_mask       eta_2 /
        + sft_coef                  * -log pi      of correct rollouts

Every per-token tensor is [B, T]: B rollouts, T response positions (padded); response_mask is 1.0 on response tokens.
Averages are weighted sums whose weights already hold the denominators of the whole optimizer step, so that
contributions of micro-batches and data-parallel ranks simply add up: the same loss and gradient for any split.

Differs: the authors average inside each micro-batch and then over micro-batches, so their result depends on the
micro-batch size. A caller who wants that (`average: micro_batch`) passes each micro-batch's own count times the number
of micro-batches.
"""

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
KL_LIMIT = 10.0
LOWEST_LOG_PROB = -1e4
"""A forbidden token's -inf becomes this, so that -inf - -inf is no nan; far below the log of any probability that fp32
can hold."""


def average_weights(response_mask: Tensor, average: str, *, num_tokens: float, num_sequences: float) -> Tensor:
    """Weights w with sum(w * x) = the average of x over the optimizer step. [B, T] -> [B, T].

    token: 1 / num_tokens on response tokens. sequence: each rollout's token mean, then the mean over num_sequences
    rollouts; an empty response contributes 0. num_tokens, num_sequences: of the WHOLE step, all micro-batches and
    ranks.
    """
    if average == "token":
        return response_mask / max(num_tokens, 1)
    lengths = response_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return response_mask / lengths / max(num_sequences, 1)


def log_ratios(log_probs: Tensor, old_log_probs: Tensor, response_mask: Tensor, level: str) -> Tensor:
    """log pi - log pi_old, clamped to [-20, 20]. [B, T] x 3 -> [B, T].

    token: of each token. sequence: the mean over each rollout's tokens, on all of them (GSPO, arXiv 2507.18071,
    equation 7); its gradient flows into every token of the rollout.
    """
    log_ratio = log_probs - old_log_probs
    if level == "sequence":
        lengths = response_mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = ((log_ratio * response_mask).sum(dim=1, keepdim=True) / lengths).expand_as(response_mask)
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_policy_loss(
    log_ratio: Tensor, advantages: Tensor, *, clip_ratio_low: float, clip_ratio_high: float, clip_ratio_dual: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped loss with dual clip, per token. [B, T] x 2 -> loss, clipped_high, clipped_dual [B, T].

        max(-A r, -A clip(r, 1 - low, 1 + high)),  then min(that, -A c) where A < 0        r = exp(log_ratio)

    clipped_high and clipped_dual are 1.0 where the clip, or the dual clip (arXiv 1912.09729), decided.
    """
    low, high = torch.log1p(torch.tensor([-clip_ratio_low, clip_ratio_high], dtype=torch.float64)).tolist()
    unclipped = -advantages * log_ratio.exp()
    clipped = -advantages * log_ratio.clamp(low, high).exp()
    loss = torch.maximum(unclipped, clipped)
    bound = -advantages * clip_ratio_dual
    negative = advantages < 0
    clipped_high = (unclipped < clipped).to(loss.dtype)
    clipped_dual = (negative & (loss > bound)).to(loss.dtype)
    return torch.where(negative, torch.minimum(loss, bound), loss), clipped_high, clipped_dual


def truncated_importance_weights(old_log_probs: Tensor, rollout_log_probs: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_rollout, cap) per token, a constant. [B, T], [B, T] -> [B, T].

    Corrects for the rollout engine's policy being another one than the trainer's, numerically or because it is older
    (truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training").
    """
    ratio = (old_log_probs - rollout_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return ratio.clamp(max=cap).detach()


def kl_k1(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Per-token k1 estimate of KL(pi_theta || pi_other): log pi_theta - log pi_other. [B, T], [B, T] -> [B, T], any
    sign."""
    return log_probs - other_log_probs


def kl_abs(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """|log pi_theta - log pi_other|, non-negative; not an estimate of a KL. [B, T], [B, T] -> [B, T]."""
    return (log_probs - other_log_probs).abs()


def kl_k2(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Per-token k2 estimate of KL(pi_theta || pi_other): (log pi_theta - log pi_other)^2 / 2 (Schulman 2020). [B, T] x
    2 -> [B, T]."""
    return 0.5 * (log_probs - other_log_probs).square()


def kl_k3(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Per-token k3 estimate of KL(pi_theta || pi_other). [B, T], [B, T] -> [B, T], non-negative.

        k3 = exp(d) - d - 1,   d = log pi_other - log pi_theta        Schulman 2020

    d is clamped to [-20, 20] and the value to [-10, 10], as in the authors' code. Used for kl_ref and kl_prcp. Gradient
    flows into both arguments: the caller detaches.

    Differs: the paper prints r - log r - 1 with r = pi_theta / pi_mask, the inverse ratio, which is not an estimate of
    this KL under samples of pi_theta. The published models were trained with this direction.
    """
    d = (other_log_probs - log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (d.exp() - d - 1).clamp(-KL_LIMIT, KL_LIMIT)


KL_ESTIMATORS = {"k1": kl_k1, "abs": kl_abs, "k2": kl_k2, "k3": kl_k3}


def top_share(values: Tensor, response_mask: Tensor, share: float) -> Tensor:
    """1.0 on the `share` of each rollout's response tokens with the largest values, else 0.0. [B, T], [B, T] -> [B, T].

    The threshold is the (1 - share) quantile (linear interpolation) over that rollout's response tokens; ties are kept.
    """
    of_responses = values.detach().float().masked_fill(response_mask == 0, torch.nan)
    threshold = torch.nanquantile(of_responses, 1.0 - share, dim=1, keepdim=True)  # nan where the response is empty
    return (of_responses >= threshold).to(values.dtype)


def selected_kl(values: Tensor, response_mask: Tensor, top_p: float | None, clip: float | None) -> Tensor:
    """KL_prcp per token with what the options leave of it: the top_p share of each rollout's tokens, then clamped to
    [0, clip]."""
    if top_p is not None:
        values = values * top_share(values, response_mask, top_p)
    return values if clip is None else values.clamp(0.0, clip)


def annealed_kl_prcp_coef(step: int, start: float, end: float, steps: int) -> float:
    """gamma at optimizer step 0, 1, ... of the run: linear from start to end over `steps` steps, then constant.

    The entropy coefficients are scaled by the same factor, annealed / start. Differs: the authors' code advances once
    per iteration.
    """
    return start + (end - start) * min(step / steps, 1.0)


def papo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    ref_log_probs: Tensor | None = None,
    masked_image_log_probs: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    masked_image_entropy: Tensor | None = None,
    exact_kl_prcp: Tensor | None = None,
    correct: Tensor | None = None,
    num_tokens: float,
    num_sequences: float,
    num_correct_tokens: float = 0,
    average: str = "token",
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_dual: float,
    ratio_level: str = "token",
    importance_sampling_cap: float | None = None,
    kl_ref_coef: float = 0.0,
    kl_ref_estimator: str = "k3",
    kl_prcp_coef: float = 0.0,
    kl_prcp_estimator: str = "k3",
    kl_prcp_clip: float | None = None,
    kl_prcp_top_p: float | None = None,
    entropy_coef: float = 0.0,
    masked_image_entropy_coef: float = 0.0,
    entropy_estimator: str = "sampled",
    sft_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's contribution to the loss of the optimizer step, and to its metrics. Tensors [B, T] -> scalar,
    {name: scalar}.

    advantages: [B, T], or [B, 1] where all tokens of a rollout share one. num_tokens, num_sequences: response tokens
    and rollouts of the whole step; num_correct_tokens: response tokens of its correct rollouts (correct: [B, 1] of 0
    and 1). A tensor may be None when no option with a weight needs it: ref_log_probs for kl_ref_coef,
    masked_image_log_probs for kl_prcp_coef and masked_image_entropy_coef, rollout_log_probs for
    importance_sampling_cap, entropy and masked_image_entropy (over the vocabulary) for entropy_estimator `exact`,
    exact_kl_prcp for the KL_prcp estimator `exact`. Gradient flows into whatever requires it: a cached masked-image
    branch does not. Entropies and clip fractions are averages over tokens whatever `average` says. The metrics are
    contributions too: sum them over micro-batches and ranks, then call finish_metrics.
    """
    mask = response_mask.bool()

    def clean(values: Tensor | None) -> Tensor | None:
        """Padding must not bring inf or nan into a sum, nor a forbidden token its -inf."""
        return None if values is None else torch.where(mask, values, 0.0).clamp(min=LOWEST_LOG_PROB)

    log_probs, old_log_probs, ref_log_probs = clean(log_probs), clean(old_log_probs), clean(ref_log_probs)
    weights = average_weights(response_mask, average, num_tokens=num_tokens, num_sequences=num_sequences)
    token_weights = average_weights(response_mask, "token", num_tokens=num_tokens, num_sequences=num_sequences)

    policy, clipped_high, clipped_dual = clipped_policy_loss(
        log_ratios(log_probs, old_log_probs, response_mask, ratio_level),
        advantages,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        clip_ratio_dual=clip_ratio_dual,
    )
    if importance_sampling_cap is not None:
        policy = policy * truncated_importance_weights(old_log_probs, clean(rollout_log_probs), importance_sampling_cap)
    terms = {"policy_loss": (weights * policy).sum(), "entropy_sampled": (token_weights * -log_probs).sum()}
    if entropy is not None:
        terms["entropy"] = (token_weights * clean(entropy)).sum()
    loss = terms["policy_loss"] + entropy_coef * terms["entropy" if entropy_estimator == "exact" else "entropy_sampled"]

    if ref_log_probs is not None:
        terms["kl_ref"] = (weights * KL_ESTIMATORS[kl_ref_estimator](log_probs, ref_log_probs)).sum()
        loss = loss + kl_ref_coef * terms["kl_ref"]

    if masked_image_log_probs is not None:
        masked_image_log_probs = clean(masked_image_log_probs)
        exact = kl_prcp_estimator == "exact"
        per_token = (
            clean(exact_kl_prcp) if exact else KL_ESTIMATORS[kl_prcp_estimator](log_probs, masked_image_log_probs)
        )
        terms["kl_prcp"] = (weights * selected_kl(per_token, response_mask, kl_prcp_top_p, kl_prcp_clip)).sum()
        terms["masked_image_entropy_sampled"] = (token_weights * -masked_image_log_probs).sum()
        if masked_image_entropy is not None:
            terms["masked_image_entropy"] = (token_weights * clean(masked_image_entropy)).sum()
        masked_entropy = terms[
            "masked_image_entropy" if entropy_estimator == "exact" else "masked_image_entropy_sampled"
        ]
        loss = loss - kl_prcp_coef * terms["kl_prcp"] + masked_image_entropy_coef * masked_entropy
        terms["kl_prcp_mean"] = (token_weights * per_token).sum()
        terms["kl_prcp_second_moment"] = (token_weights * per_token.square()).sum()

    if sft_coef > 0:
        sft_weights = average_weights(
            response_mask * correct, "token", num_tokens=num_correct_tokens, num_sequences=num_sequences
        )
        terms["sft_loss"] = (sft_weights * -log_probs).sum()
        loss = loss + sft_coef * terms["sft_loss"]

    terms |= {
        "loss": loss,
        "clip_fraction_high": (token_weights * clipped_high).sum(),
        "clip_fraction_dual": (token_weights * clipped_dual).sum(),
        "kl_old": -(token_weights * log_ratios(log_probs, old_log_probs, response_mask, "token")).sum(),
    }
    return loss, {name: value.detach() for name, value in terms.items()}


def finish_metrics(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of an optimizer step from the sums of papo_loss's contributions.

    kl_prcp_mean and kl_prcp_variance: over the response tokens of the step, of the estimate before kl_prcp_top_p and
    kl_prcp_clip.
    """
    metrics = dict(sums)
    if "kl_prcp_second_moment" in metrics:
        metrics["kl_prcp_variance"] = max(metrics.pop("kl_prcp_second_moment") - metrics["kl_prcp_mean"] ** 2, 0.0)
    return metrics

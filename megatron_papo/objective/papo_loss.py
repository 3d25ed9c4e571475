"""The PAPO objective (arXiv 2507.06448, section 3), as pure functions of per-token tensors.

    L =   L_clip                                   clipped policy gradient (GRPO / DAPO)
        + kl_ref_coef               * KL_ref       beta
        - kl_prcp_coef              * KL_prcp      gamma: MAXIMISE the divergence from the masked-image policy
        + entropy_coef              * H            eta_1 \\  double entropy loss
        + masked_image_entropy_coef * H_mask       eta_2 /

Every per-token tensor is [B, T]: B rollouts, T response positions (padded); response_mask is 1.0 on response tokens. Averages are
weighted sums whose weights already hold the denominators of the whole optimizer step, so that contributions of micro-batches and
data-parallel ranks simply add up: the same loss and gradient for any split.

Differs: the authors average inside each micro-batch and then over micro-batches, so their result depends on the micro-batch size.
"""

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
KL_LIMIT = 10.0


def average_weights(response_mask: Tensor, average: str, *, num_tokens: float, num_sequences: float) -> Tensor:
    """Weights w with sum(w * x) = the average of x over the optimizer step. [B, T] -> [B, T].

    token: 1 / num_tokens on response tokens. sequence: each rollout's token mean, then the mean over num_sequences rollouts; an empty
    response contributes 0. num_tokens, num_sequences: of the WHOLE step, all micro-batches and ranks.
    """
    if average == "token":
        return response_mask / max(num_tokens, 1)
    lengths = response_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return response_mask / lengths / max(num_sequences, 1)


def clipped_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_ratio_low: float, clip_ratio_high: float, clip_ratio_dual: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped loss with dual clip, per token. [B, T] x 3 -> loss, clipped_high, clipped_dual [B, T].

        max(-A r, -A clip(r, 1 - low, 1 + high)),  then min(that, -A c) where A < 0        r = exp(log pi - log pi_old)

    clipped_high and clipped_dual are 1.0 where the clip, or the dual clip (arXiv 1912.09729), decided.
    """
    log_ratio = (log_probs - old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    low, high = torch.log1p(torch.tensor([-clip_ratio_low, clip_ratio_high], dtype=torch.float64)).tolist()
    unclipped = -advantages * log_ratio.exp()
    clipped = -advantages * log_ratio.clamp(low, high).exp()
    loss = torch.maximum(unclipped, clipped)
    bound = -advantages * clip_ratio_dual
    negative = advantages < 0
    clipped_high = (unclipped < clipped).to(loss.dtype)
    clipped_dual = (negative & (loss > bound)).to(loss.dtype)
    return torch.where(negative, torch.minimum(loss, bound), loss), clipped_high, clipped_dual


def kl_k1(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Per-token k1 estimate of KL(pi_theta || pi_other): log pi_theta - log pi_other. [B, T], [B, T] -> [B, T], any sign."""
    return log_probs - other_log_probs


def kl_abs(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """|log pi_theta - log pi_other|, non-negative; not an estimate of a KL. [B, T], [B, T] -> [B, T]."""
    return (log_probs - other_log_probs).abs()


def kl_k2(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Per-token k2 estimate of KL(pi_theta || pi_other): (log pi_theta - log pi_other)^2 / 2 (Schulman 2020). [B, T] x 2 -> [B, T]."""
    return 0.5 * (log_probs - other_log_probs).square()


def kl_k3(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Per-token k3 estimate of KL(pi_theta || pi_other). [B, T], [B, T] -> [B, T], non-negative.

        k3 = exp(d) - d - 1,   d = log pi_other - log pi_theta        Schulman 2020

    d is clamped to [-20, 20] and the value to [-10, 10], as in the authors' code. Used for kl_ref and kl_prcp. Gradient flows into
    both arguments: the caller detaches.

    Differs: the paper prints r - log r - 1 with r = pi_theta / pi_mask, the inverse ratio, which is not an estimate of this KL under
    samples of pi_theta. The published models were trained with this direction.
    """
    d = (other_log_probs - log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (d.exp() - d - 1).clamp(-KL_LIMIT, KL_LIMIT)


KL_ESTIMATORS = {"k1": kl_k1, "abs": kl_abs, "k2": kl_k2, "k3": kl_k3}


def top_share(values: Tensor, response_mask: Tensor, share: float) -> Tensor:
    """1.0 on the `share` of each rollout's response tokens with the largest values, else 0.0. [B, T], [B, T] -> [B, T].

    The threshold is the (1 - share) quantile (linear interpolation) over that rollout's response tokens; ties are kept.
    """
    keep = torch.zeros_like(values)
    for row, (value, mask) in enumerate(zip(values.detach(), response_mask.bool())):
        if mask.any():
            threshold = torch.quantile(value[mask].float(), 1.0 - share)
            keep[row] = (mask & (value >= threshold)).to(values.dtype)
    return keep


def papo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    ref_log_probs: Tensor | None = None,
    masked_image_log_probs: Tensor | None = None,
    *,
    num_tokens: float,
    num_sequences: float,
    average: str = "token",
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_dual: float,
    kl_ref_coef: float = 0.0,
    kl_prcp_coef: float = 0.0,
    kl_prcp_estimator: str = "k3",
    kl_prcp_clip: float | None = None,
    kl_prcp_top_p: float | None = None,
    entropy_coef: float = 0.0,
    masked_image_entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's contribution to the loss of the optimizer step, and to its metrics. All tensors [B, T] -> scalar, {name: scalar}.

    num_tokens, num_sequences: response tokens and rollouts of the whole step. ref_log_probs may be None when kl_ref_coef is 0,
    masked_image_log_probs when kl_prcp_coef and masked_image_entropy_coef are 0. Both entropies are the sampled ones, -log pi of the
    sampled tokens, always averaged over tokens, like the clip fractions and kl_old = -mean(log ratio). The metrics are contributions too: sum them over micro-batches and ranks.
    """
    log_probs, old_log_probs, ref_log_probs, masked_image_log_probs = (
        None if x is None else torch.where(response_mask.bool(), x, 0.0)  # padding must not bring inf or nan into a sum
        for x in (log_probs, old_log_probs, ref_log_probs, masked_image_log_probs)
    )
    weights = average_weights(response_mask, average, num_tokens=num_tokens, num_sequences=num_sequences)
    token_weights = average_weights(response_mask, "token", num_tokens=num_tokens, num_sequences=num_sequences)

    policy, clipped_high, clipped_dual = clipped_policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        clip_ratio_dual=clip_ratio_dual,
    )
    terms = {"policy_loss": (weights * policy).sum(), "entropy_sampled": (token_weights * -log_probs).sum()}
    loss = terms["policy_loss"] + entropy_coef * terms["entropy_sampled"]
    if ref_log_probs is not None:
        terms["kl_ref"] = (weights * kl_k3(log_probs, ref_log_probs)).sum()
        loss = loss + kl_ref_coef * terms["kl_ref"]
    if masked_image_log_probs is not None:
        kl_prcp = KL_ESTIMATORS[kl_prcp_estimator](log_probs, masked_image_log_probs)
        if kl_prcp_clip is not None:
            kl_prcp = kl_prcp.clamp(0.0, kl_prcp_clip)
        if kl_prcp_top_p is not None:
            kl_prcp = kl_prcp * top_share(kl_prcp, response_mask, kl_prcp_top_p)
        terms["kl_prcp"] = (weights * kl_prcp).sum()
        terms["kl_prcp_squared"] = (token_weights * kl_prcp.square()).sum()
        terms["masked_image_entropy_sampled"] = (token_weights * -masked_image_log_probs).sum()
        loss = loss - kl_prcp_coef * terms["kl_prcp"] + masked_image_entropy_coef * terms["masked_image_entropy_sampled"]

    log_ratio = (log_probs - old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    terms |= {
        "loss": loss,
        "clip_fraction_high": (token_weights * clipped_high).sum(),
        "clip_fraction_dual": (token_weights * clipped_dual).sum(),
        "kl_old": -(token_weights * log_ratio).sum(),
    }
    return loss, {name: value.detach() for name, value in terms.items()}

"""How far the rollout engine's log-probs are from the trainer's for the same tokens: the numbers the field reports.

pi_old: the trainer's policy before the update. pi_rollout: the policy as the rollout engine computed it, which drew the
tokens.
"""

from torch import Tensor

from megatron_papo.objective.papo_loss import LOG_RATIO_LIMIT


def mismatch_sums(old_log_probs: Tensor, rollout_log_probs: Tensor) -> dict[str, float]:
    """Return sums over [N] response tokens, which add up over rollouts and ranks."""
    log_ratio = (old_log_probs - rollout_log_probs).double().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    weights = log_ratio.exp()
    return {
        "tokens": float(len(log_ratio)),
        "difference": log_ratio.abs().sum().item(),
        "k1": -log_ratio.sum().item(),
        "k3": (weights - 1 - log_ratio).sum().item(),
        "weights": weights.sum().item(),
        "weights_squared": weights.square().sum().item(),
    }


def mismatch_metrics(sums: dict[str, float], largest: float) -> dict[str, float]:
    """Return the metrics per token, in nats unless said otherwise.

    Args:
        sums: mismatch_sums, added up.
        largest: |difference| of a token.

    rollout_log_prob_difference_mean, _max: |log pi_old - log pi_rollout|. rollout_kl, rollout_kl_k3: KL(pi_rollout ||
    pi_old) by k1 (unbiased, any sign) and k3 (non-negative). rollout_effective_sample_size: (sum w)^2 / (N sum w^2)
    with w = pi_old / pi_rollout; a share, 1 where both policies agree.
    """
    n = max(sums["tokens"], 1)
    return {
        "rollout_log_prob_difference_mean": sums["difference"] / n,
        "rollout_log_prob_difference_max": largest,
        "rollout_kl": sums["k1"] / n,
        "rollout_kl_k3": sums["k3"] / n,
        "rollout_effective_sample_size": sums["weights"] ** 2 / (n * sums["weights_squared"])
        if sums["weights_squared"]
        else 1.0,
    }


def sampling_bias_sums(log_probs: Tensor, entropy: Tensor) -> dict[str, float]:
    """Return sums over [N] response tokens, which add up over rollouts and ranks.

    log_probs: of the tokens under the policy. entropy: of the distributions that they were drawn from.
    """
    surprise = -log_probs.double() - entropy.double()
    return {
        "tokens": float(len(surprise)),
        "surprise": surprise.sum().item(),
        "surprise_squared": surprise.square().sum().item(),
    }


def sampling_bias_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Return sampling_bias, in nats per token: the mean of -log pi(token) - H(pi), and its standard error.

    0 within a few errors if the tokens were drawn from pi itself. Below 0 where sampling cut off the unlikely ones
    (top_p, top_k, forbidden tokens): the gradient estimate is then biased against them, and by how much is not
    otherwise seen.
    """
    n = max(sums["tokens"], 1)
    mean = sums["surprise"] / n
    variance = max(sums["surprise_squared"] / n - mean**2, 0.0)
    return {"sampling_bias": mean, "sampling_bias_error": (variance / n) ** 0.5}

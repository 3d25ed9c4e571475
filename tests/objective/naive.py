"""The PAPO objective as a beginner would write it from the paper: loops over rollouts and tokens, one scalar at a time, float64."""

import math


def clip(value, low, high):
    return min(max(value, low), high)


def naive_papo_loss(rollouts, *, average, low, high, dual, beta, gamma, eta_1, eta_2):
    """rollouts: dicts with advantage and lists log_probs (0-dim float64 tensors), old, ref, masked (floats). -> scalar tensor, metrics."""
    policy, kl_ref, kl_prcp, entropies, masked_entropies = [], [], [], [], []
    for rollout in rollouts:
        a = rollout["advantage"]
        rows = []
        for log_prob, old, ref, masked in zip(rollout["log_probs"], rollout["old"], rollout["ref"], rollout["masked"]):
            ratio = (log_prob - old).exp()
            clipped = ratio if 1 - low < float(ratio) < 1 + high else ratio * 0 + clip(float(ratio), 1 - low, 1 + high)
            token = max(-a * ratio, -a * clipped, key=float)
            if a < 0:
                token = min(token, ratio * 0 - a * dual, key=float)
            rows.append(
                (
                    token,
                    math.exp(ref) / log_prob.exp() - (ref - log_prob) - 1,
                    math.exp(masked) / log_prob.exp() - (masked - log_prob) - 1,
                )
            )
            entropies.append(-log_prob)
            masked_entropies.append(-masked)
        policy.append([row[0] for row in rows])
        kl_ref.append([row[1] for row in rows])
        kl_prcp.append([row[2] for row in rows])

    def mean(per_rollout):
        if average == "sequence":
            return sum(sum(values) / len(values) for values in per_rollout if values) / len(per_rollout)
        tokens = [value for values in per_rollout for value in values]
        return sum(tokens) / len(tokens)

    entropy, masked_entropy = sum(entropies) / len(entropies), sum(masked_entropies) / len(masked_entropies)
    metrics = {"policy_loss": mean(policy), "kl_ref": mean(kl_ref), "kl_prcp": mean(kl_prcp), "entropy_sampled": entropy}
    loss = mean(policy) + beta * mean(kl_ref) - gamma * mean(kl_prcp) + eta_1 * entropy + eta_2 * masked_entropy
    return loss, metrics | {"loss": loss, "masked_image_entropy_sampled": masked_entropy}

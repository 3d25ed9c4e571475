"""The PAPO objective as a beginner would write it from the papers: loops over rollouts and tokens, one scalar at a
time, float64."""

import math

import torch


def naive_token(logits, masked_logits, token):
    """Of one position: two lists of float64 logits over the vocabulary -> what the objective needs, each a scalar
    tensor."""
    p, q = (torch.stack([x.exp() for x in z]) / sum(x.exp() for x in z) for z in (logits, masked_logits))
    return {
        "log_probs": p[token].log(),
        "masked": q[token].log(),
        "entropy": -sum(x * x.log() for x in p),
        "masked_entropy": -sum(x * x.log() for x in q),
        "exact_kl": sum(x * (x.log() - y.log()) for x, y in zip(p, q)),
    }


def number_of(value):
    return float(value.detach())


def clip(value, low, high):
    """A scalar tensor held within numbers, by hand."""
    number = number_of(value)
    return value if low < number < high else value * 0 + min(max(number, low), high)


ESTIMATORS = {
    "k1": lambda p, q: p - q,
    "abs": lambda p, q: p - q if number_of(p) > number_of(q) else q - p,
    "k2": lambda p, q: (p - q) ** 2 / 2,
    "k3": lambda p, q: clip((q - p).exp() - (q - p) - 1, -10, 10),
}


def kept_tokens(values, share):
    """Which of a rollout's tokens are among the `share` with the largest values: at or above the (1 - share) quantile,
    interpolated."""
    ordered, place = sorted(values), (1 - share) * (len(values) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    threshold = below + (above - below) * (place - math.floor(place))
    return [value >= threshold - 1e-12 for value in values]


def naive_papo_loss(
    rollouts,
    *,
    average="token",
    low=0.2,
    high=0.3,
    dual=3.0,
    beta=0.0,
    gamma=0.0,
    eta_1=0.0,
    eta_2=0.0,
    estimator="k3",
    ref_estimator="k3",
    ratio_level="token",
    importance_cap=None,
    kl_clip=None,
    top_p=None,
    exact_entropy=False,
    sft=0.0,
    kl_kept=0.0,
    contrast=0.0,
    temperature=0.1,
):
    """rollouts: dicts with advantage, correct, and a list per kind of number (log_probs, old, ref, masked, rollout,
    entropy, masked_entropy, exact_kl), one entry per response token: scalar float64 tensors or floats; perhaps weights
    and kl_weights, floats (naive_weights.py), kept, and contrasted: which tokens are. -> scalar tensor, metrics."""
    policy, kl_ref, kl_prcp, raw, entropies, masked_entropies, sampled, masked_sampled, sft_tokens = (
        [],
        [],
        [],
        [],
        [],
        [],
        [],
        [],
        [],
    )
    for r in rollouts:
        a, length = r["advantage"], len(r["log_probs"])
        number = {
            name: [torch.as_tensor(x, dtype=torch.float64) for x in r.get(name) or [0.0] * length] for name in KINDS
        }
        differences = [lp - old for lp, old in zip(number["log_probs"], number["old"])]
        if ratio_level == "sequence":
            differences = [sum(differences) / len(differences) for _ in differences]
        losses = []
        for t in range(length):
            ratio = differences[t].exp()
            token = max(-a * ratio, -a * clip(ratio, 1 - low, 1 + high), key=number_of)
            if a < 0:
                token = min(token, ratio * 0 - a * dual, key=number_of)
            if importance_cap is not None:
                token = token * min(math.exp(number["old"][t] - number["rollout"][t]), importance_cap)
            losses.append(token * r["weights"][t] if "weights" in r else token)
        policy.append(losses)
        kl_ref.append([ESTIMATORS[ref_estimator](p, q) for p, q in zip(number["log_probs"], number["ref"])])
        if estimator == "exact":
            values = number["exact_kl"]
        else:
            values = [ESTIMATORS[estimator](p, q) for p, q in zip(number["log_probs"], number["masked"])]
        raw.append(values)
        if top_p is not None and values:
            values = [
                x if keep else x * 0 for x, keep in zip(values, kept_tokens([number_of(x) for x in values], top_p))
            ]
        if kl_clip is not None:
            values = [clip(x, 0.0, kl_clip) for x in values]
        if "kl_weights" in r:
            values = [x * w for x, w in zip(values, r["kl_weights"])]
        kl_prcp.append(values)
        sampled += [-x for x in number["log_probs"]]
        masked_sampled += [-x for x in number["masked"]]
        entropies += number["entropy"]
        masked_entropies += number["masked_entropy"]
        sft_tokens += [-x for x in number["log_probs"]] if r.get("correct") else []

    def mean(values):
        return sum(values) / max(len(values), 1)

    def average_of(per_rollout):
        if average == "sequence":
            return mean([mean(values) for values in per_rollout])
        return mean([value for values in per_rollout for value in values])

    flat = [number_of(x) for values in raw for x in values]
    metrics = {
        "policy_loss": average_of(policy),
        "kl_ref": average_of(kl_ref),
        "kl_prcp": average_of(kl_prcp),
        "kl_prcp_mean": mean(flat),
        "kl_prcp_variance": mean([x**2 for x in flat]) - mean(flat) ** 2,
        "entropy_sampled": mean(sampled),
        "masked_image_entropy_sampled": mean(masked_sampled),
        "entropy": mean(entropies),
        "masked_image_entropy": mean(masked_entropies),
    }
    if sft:
        metrics["sft_loss"] = mean(sft_tokens)
    kept, contrasts = [], []
    for r in rollouts if kl_kept or contrast else []:
        kinds = ("log_probs", "masked", "kept")
        lp, masked, third = ([torch.as_tensor(x, dtype=torch.float64) for x in r[kind]] for kind in kinds)
        kept.append([ESTIMATORS[estimator](p, q) for p, q in zip(lp, third)])
        for t, is_in in enumerate(r.get("contrasted", [False] * len(lp))):
            if is_in:
                difference = ESTIMATORS["k3"](lp[t], third[t]) - ESTIMATORS["k3"](lp[t], masked[t])
                contrasts.append((1 + (difference / temperature).exp()).log())
    if kept:
        metrics |= {"kl_kept": average_of(kept)}
    if contrast:
        metrics |= {"contrast": mean(contrasts)}
    h, h_masked = (
        ("entropy", "masked_image_entropy") if exact_entropy else ("entropy_sampled", "masked_image_entropy_sampled")
    )
    loss = (
        metrics["policy_loss"]
        + beta * metrics["kl_ref"]
        - gamma * metrics["kl_prcp"]
        + eta_1 * metrics[h]
        + eta_2 * metrics[h_masked]
        + sft * metrics.get("sft_loss", 0.0)
        + kl_kept * metrics.get("kl_kept", 0.0)
        + contrast * metrics.get("contrast", 0.0)
    )
    return loss, metrics | {"loss": loss}


KINDS = ("log_probs", "old", "ref", "masked", "rollout", "entropy", "masked_entropy", "exact_kl")

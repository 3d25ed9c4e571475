"""What tokens are weighed by, as a beginner would write it from the papers: loops over responses and tokens, Python
floats."""

import math


def k3(p, q):
    d = min(max(q - p, -20.0), 20.0)
    return min(max(math.exp(d) - d - 1, 0.0), 10.0)


def sensitivities(formula, tokens):
    """tokens: of one response, dicts with log_probs, masked, entropy, masked_entropy as floats."""
    of_token = {
        "k3": lambda t: k3(t["log_probs"], t["masked"]),
        "abs": lambda t: abs(t["masked"] - t["log_probs"]),
        "entropy_gap": lambda t: max(t["masked_entropy"] - t["entropy"], 0.0) / (t["masked_entropy"] + 1e-6),
    }[formula]
    return [of_token(token) for token in tokens]


def top(values, numerator, denominator=10):
    """Which of the values are among the ceil(numerator / denominator x N) largest: one after the other is taken, of
    equal ones the first."""
    taken = [False] * len(values)
    wanted = 0
    while wanted * denominator < numerator * len(values):
        wanted += 1
    for _ in range(wanted):
        best = None
        for i, value in enumerate(values):
            if not taken[i] and (best is None or value > values[best]):
                best = i
        taken[best] = True
    return taken


def selection(sensitivity, entropy, tenths, per="response", only=1.0, renormalise=False):
    """tenths: (by sensitivity, by entropy), None where nothing is selected by it -> weight of each token."""
    chosen = []
    for values, share in zip((sensitivity, entropy), tenths):
        if share is None:
            chosen.append([[False] * len(of_response) for of_response in sensitivity or entropy])
        elif per == "response":
            chosen.append([top(of_response, share) for of_response in values])
        else:
            flat = iter(top([x for of_response in values for x in of_response], share))
            chosen.append([[next(flat) for _ in of_response] for of_response in values])
    weights = [
        [1.0 if e or (s and tenths[1] is None) else only if s else 0.0 for s, e in zip(of_s, of_e)]
        for of_s, of_e in zip(*chosen)
    ]
    if renormalise:
        every = [w for of_response in weights for w in of_response]
        scale = len(every) / max(sum(w > 0 for w in every), 1)
        weights = [[w * scale for w in of_response] for of_response in weights]
    return weights


def trajectory(sensitivity, lowest, ranks=None):
    """VPPO. ranks: [[positions of a micro-batch] of a rank]; None: one of each -> f of each response."""
    means = [sum(s) / len(s) if s else None for s in sensitivity]
    factors = [1.0] * len(means)
    for micro_batches in ranks or [[list(range(len(means)))]]:
        there = [means[i] for part in micro_batches for i in part if means[i] is not None]
        if len(there) < 2 or max(there) - min(there) <= 1e-6:
            continue
        for part in micro_batches:
            n = {i: (means[i] - min(there)) / (max(there) - min(there)) for i in part if means[i] is not None}
            if n:
                highest = lowest + (1 - lowest) / (sum(n.values()) / len(n) + 1e-8)
                for i in n:
                    factors[i] = lowest + n[i] * (highest - lowest)
    return factors


def token_shaping(s, threshold, boost):
    """PGPO, one response."""
    u = [math.log(1 + max(x, 0.0)) for x in s]
    if not u or max(u) == min(u):
        return [1.0] * len(u)
    u = [(x - min(u)) / (max(u) - min(u)) for x in u]
    w = [x / threshold if x < threshold else 1 + boost * (x - threshold) / (1 - threshold) for x in u]
    return [x * len(w) / sum(w) for x in w]


def median(values):
    values = sorted(values)
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def response_shaping(sensitivity, strength, tenths):
    """CGPO -> factor of each token."""
    there = [sum(s) / len(s) for s in sensitivity if s]
    middle = median(there)
    deviation = median([abs(x - middle) for x in there])
    factors = []
    for s in sensitivity:
        scale = 1.0
        if s and deviation > 0:
            scale = 1 + strength * math.tanh((sum(s) / len(s) - middle) / deviation)
        factors.append([scale if kept else 1.0 for kept in top(s, tenths)])
    return factors


def detected(s, numerator, denominator=10):
    """CPPO's detector, one response: which of its tokens."""
    above = sorted([x for x in s if x > 0], reverse=True)
    if not above:
        return [False] * len(s)
    return [x >= above[max(1, len(above) * numerator // denominator) - 1] for x in s]


def unit(values):
    low, high = min(values, default=0.0), max(values, default=0.0)
    return [(x - low) / (high - low) if high > low else 0.0 for x in values]


def vepo_scores(entropy, masked_entropy, jsd):
    """One response."""
    h, d, j = unit(entropy), unit([abs(q - p) for p, q in zip(entropy, masked_entropy)]), unit(jsd)
    return [h[t] * (1 - (1 - j[t]) ** 0.7 * (1 - d[t]) ** 0.3) for t in range(len(h))]


def divergences(p, q):
    """KL, Jensen-Shannon, Hellinger of two lists of probabilities."""
    kl = sum(x * math.log(x / y) for x, y in zip(p, q))
    middle = [(x + y) / 2 for x, y in zip(p, q)]
    jsd = sum(x * math.log(x / m) + y * math.log(y / m) for x, y, m in zip(p, q, middle)) / 2
    return kl, jsd, math.sqrt(max(1 - sum(math.sqrt(x * y) for x, y in zip(p, q)), 0.0))


def product(*factors):
    """Token by token."""
    return [[math.prod(of_token) for of_token in zip(*of_response)] for of_response in zip(*factors)]

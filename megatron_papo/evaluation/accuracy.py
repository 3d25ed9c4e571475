"""avg@k."""

from collections.abc import Iterable


def average_at_k(scores: Iterable[tuple[str, float]]) -> float:
    """Mean over prompts of the mean over a prompt's samples: (prompt id, score) pairs -> avg@k, 0..1. PAPO section 4,
    avg@8.

    Raises ValueError when there are no scores or prompts have different numbers of samples.
    """
    by_prompt: dict[str, list[float]] = {}
    for prompt_id, score in scores:
        by_prompt.setdefault(prompt_id, []).append(score)
    counts = {len(samples) for samples in by_prompt.values()}
    if len(counts) != 1:
        raise ValueError(f"avg@k needs the same number of samples of every prompt, got {sorted(counts)}")
    means = [sum(samples) / len(samples) for samples in by_prompt.values()]
    return sum(means) / len(means)

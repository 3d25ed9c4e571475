"""avg@k."""

from collections.abc import Iterable


def average_at_k(scores: Iterable[tuple[str, float]]) -> float:
    """Return the mean over prompts of the mean over a prompt's samples: PAPO (arXiv 2507.06448), section 4, avg@8.

    scores: pairs of a prompt's id and a score, 0 to 1. Raises ValueError when there are no scores or prompts have
    different numbers of samples.
    """
    by_prompt: dict[str, list[float]] = {}
    for prompt_id, score in scores:
        by_prompt.setdefault(prompt_id, []).append(score)
    counts = {len(samples) for samples in by_prompt.values()}
    if len(counts) != 1:
        raise ValueError(f"avg@k needs the same number of samples of every prompt, got {sorted(counts)}")
    means = [sum(samples) / len(samples) for samples in by_prompt.values()]
    return sum(means) / len(means)

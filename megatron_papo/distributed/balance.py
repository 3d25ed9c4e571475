"""Work of different sizes dealt out to ranks."""

from collections.abc import Sequence


def balanced(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Return each rank's items, ascending.

    The most costly item goes first, always to the rank with the least to do (Graham 1969, LPT).

    Deterministic, so that every rank finds the same shares for itself. The largest load is at most 4/3 of the best
    possible one.
    """
    loads = [0] * ranks
    chosen: list[list[int]] = [[] for _ in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = min(range(ranks), key=lambda r: (loads[r], len(chosen[r])))
        loads[rank] += costs[item]
        chosen[rank].append(item)
    return [sorted(items) for items in chosen]

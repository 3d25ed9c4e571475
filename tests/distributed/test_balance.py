"""Shares of work: each item once, and no rank with much more than its part."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from megatron_papo.distributed.balance import balanced

COSTS = st.lists(st.integers(1, 50), max_size=7)


@given(COSTS, st.integers(1, 4))
def test_every_item_once_in_order_and_within_grahams_bound(costs, ranks):
    shares = balanced(costs, ranks)
    assert len(shares) == ranks and sorted(item for share in shares for item in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    best = min(
        max(sum(cost for cost, rank in zip(costs, choice) if rank == r) for r in range(ranks))
        for choice in itertools.product(range(ranks), repeat=len(costs))
    )
    assert 3 * ranks * max(sum(costs[item] for item in share) for share in shares) <= (4 * ranks - 1) * best


def test_dealing_them_in_turns_would_break_the_bound():
    costs = [40, 1, 40, 1]
    assert balanced(costs, 2) == [[0, 1], [2, 3]]
    assert max(sum(costs[rank::2]) for rank in range(2)) == 80


def test_more_ranks_than_items():
    assert balanced([5, 9], 4) == [[1], [0], [], []]

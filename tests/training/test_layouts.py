"""How rollouts become micro-batches and ranks' shares: every rollout once, budgets kept, ranks balanced. Pure
functions, no model."""

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.training.layouts import GroupLayout, PlainLayout
from tests.helpers import DEMO_CONFIG


def rows_of(groups):
    """groups: (prompt length, response lengths) of each."""
    return [
        SimpleNamespace(
            rollout=SimpleNamespace(group=number),
            prompt_token_ids=[0] * prompt,
            response_length=length,
            name=(number, sample),
        )
        for number, (prompt, lengths) in enumerate(groups)
        for sample, length in enumerate(lengths)
    ]


def tokens_of(part, copies=1):
    """As laid out: every group's prompt once, then the responses."""
    prompts = {row.rollout.group: len(row.prompt_token_ids) for row in part}
    return copies * (sum(prompts.values()) + sum(row.response_length for row in part))


GROUPS = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(0, 20), min_size=1, max_size=5)), min_size=1, max_size=8
)


@given(GROUPS, st.integers(1, 120), st.sampled_from([1, 2]))
def test_group_micro_batches_hold_every_rollout_once_within_the_budget(groups, budget, copies):
    rows = rows_of(groups)
    plan = GroupLayout(budget).plan(rows, 3, copies)
    assert [row.name for part in plan for row in part] == [row.name for row in rows]
    for part, following in zip(plan, [*plan[1:], None]):
        assert tokens_of(part, copies) <= budget or len(part) == 1
        if following is not None:  # nothing more would have fitted
            assert tokens_of([*part, following[0]], copies) > budget


def test_a_group_over_the_budget_is_cut_and_its_prompt_repeated():
    plan = GroupLayout(22).plan(rows_of([(10, [5, 5, 5, 5])]), 1)
    assert [len(part) for part in plan] == [2, 2] and [tokens_of(part) for part in plan] == [20, 20]
    assert [len(part) for part in GroupLayout(22).plan(rows_of([(10, [5, 5, 5, 5])]), 1, copies=2)] == [1, 1, 1, 1]


@given(GROUPS, st.integers(1, 7))
def test_plain_micro_batches_are_slices(groups, size):
    rows = rows_of(groups)
    plan = PlainLayout().plan(rows, size)
    assert [row for part in plan for row in part] == rows and all(len(part) == size for part in plan[:-1])


@given(GROUPS, st.integers(1, 4))
def test_ranks_share_whole_groups(groups, ranks):
    rows = rows_of(groups)
    shares = GroupLayout(1).split_over_ranks(rows, ranks)
    assert sorted(place for share in shares for place in share) == list(range(len(rows)))
    assert all(
        len({rank for rank, share in enumerate(shares) for place in share if rows[place].rollout.group == g}) == 1
        for g in range(len(groups))
    )
    assert all(share == sorted(share) for share in shares) or ranks > 1  # one rank: in order
    dealt = PlainLayout().split_over_ranks(rows, ranks)
    assert sorted(place for share in dealt for place in share) == list(range(len(rows)))


def test_ranks_are_balanced_by_cost():
    rng = random.Random(0)
    groups = [(1000, [int(rng.expovariate(1 / 250)) for _ in range(5)]) for _ in range(64)]
    rows = rows_of(groups)
    shares = [tokens_of([rows[place] for place in share]) for share in GroupLayout(1).split_over_ranks(rows, 4)]
    dealt = [tokens_of([row for row in rows if row.rollout.group % 4 == rank]) for rank in range(4)]
    assert max(shares) / min(shares) < 1.01 < max(dealt) / min(dealt)


@pytest.mark.parametrize(
    "overrides, problem",
    [
        (["training.layout=group"], "training.layout group needs training.max_tokens_per_micro_batch"),
        (
            ["training.layout=group", "training.max_tokens_per_micro_batch=99", "parallel.data_parallel_size=16"],
            "cannot feed data_parallel_size 16",
        ),
    ],
)
def test_configuration_mistakes(overrides, problem):
    with pytest.raises(UserError, match=problem):
        load_config(DEMO_CONFIG, overrides)

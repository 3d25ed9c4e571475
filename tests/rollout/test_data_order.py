"""The order of prompts: whole epochs, no repeats inside one, no state but a position."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_papo.rollout.data_order import prompts_at


@pytest.mark.parametrize("num_prompts, batch", [(7, 3), (5, 5), (3, 7), (12, 4)])
def test_batches_laid_end_to_end_are_whole_epochs(num_prompts, batch):
    drawn = [pair for i in range(2 * num_prompts) for pair in prompts_at(num_prompts, i * batch, batch, seed=4)]
    for epoch in range(len(drawn) // num_prompts):
        part = drawn[epoch * num_prompts : (epoch + 1) * num_prompts]
        assert {e for e, _ in part} == {epoch}
        assert sorted(index for _, index in part) == list(range(num_prompts))


@given(
    num_prompts=st.integers(1, 20), counts=st.lists(st.integers(1, 25), min_size=1, max_size=6), seed=st.integers(0, 3)
)
def test_batches_of_any_sizes_are_the_same_order_cut_up(num_prompts, counts, seed):
    """What dynamic sampling needs: each iteration draws as many as it happens to use, from where the last one
    stopped."""
    whole = prompts_at(num_prompts, 0, sum(counts), seed)
    position, pieces = 0, []
    for count in counts:
        pieces += prompts_at(num_prompts, position, count, seed)
        position += count
    assert pieces == whole
    assert len(set(whole)) == len(whole)  # (epoch, index): nothing twice within an epoch
    for epoch in range(len(whole) // num_prompts):  # and nothing skipped
        assert sorted(index for e, index in whole if e == epoch) == list(range(num_prompts))


def test_seed_and_epoch_change_the_order_and_nothing_else_does():
    orders = {tuple(i for _, i in prompts_at(20, first, 20, seed)) for first in (0, 20, 40) for seed in (1, 2)}
    assert len(orders) == 6
    assert prompts_at(20, 12, 6, 1) == prompts_at(20, 12, 6, 1)
    assert prompts_at(20, 6, 6, 1) != prompts_at(20, 5, 6, 1)

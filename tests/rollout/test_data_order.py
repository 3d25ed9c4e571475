"""The order of prompts: whole epochs, no repeats inside one, no state."""

import pytest

from megatron_papo.rollout.data_order import prompts_of_iteration


@pytest.mark.parametrize("num_prompts, batch", [(7, 3), (5, 5), (3, 7), (12, 4)])
def test_iterations_laid_end_to_end_are_whole_epochs(num_prompts, batch):
    drawn = [pair for i in range(1, 2 * num_prompts + 1) for pair in prompts_of_iteration(num_prompts, batch, i, seed=4)]
    for epoch in range(len(drawn) // num_prompts):
        part = drawn[epoch * num_prompts : (epoch + 1) * num_prompts]
        assert {e for e, _ in part} == {epoch}
        assert sorted(index for _, index in part) == list(range(num_prompts))


def test_seed_and_epoch_change_the_order_and_nothing_else_does():
    orders = {tuple(i for _, i in prompts_of_iteration(20, 20, iteration, seed)) for iteration in (1, 2, 3) for seed in (1, 2)}
    assert len(orders) == 6
    assert prompts_of_iteration(20, 6, 3, 1) == prompts_of_iteration(20, 6, 3, 1)
    assert [i for _, i in prompts_of_iteration(20, 6, 2, 1)] == [i for _, i in prompts_of_iteration(20, 12, 1, 1)][6:]

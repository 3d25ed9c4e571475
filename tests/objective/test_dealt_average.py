"""The authors' average against a loop that deals the rollouts out itself, in float64, and computed in other
micro-batches than those that define it.

NOT covered here: gradients of the whole step (tests/training/test_papo_step.py).
"""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_papo.config import ObjectiveConfig
from megatron_papo.objective.dealt_average import deal, dealt_denominators
from megatron_papo.objective.papo_loss import StepCounts, stacked, token_average, total
from megatron_papo.training.loss_recipe import denominators_of


def average_by_hand(values: list[list[float]], ranks: int, size: int) -> float:
    """Deal like cards: rollout after rollout to the next rank; then mean in mean in mean."""
    hands: list[list[list[float]]] = [[] for _ in range(ranks)]
    for number, of_rollout in enumerate(values):
        hands[number % ranks].append(of_rollout)
    of_ranks = []
    for hand in hands:
        means = []
        while hand:
            micro_batch, hand = hand[:size], hand[size:]
            tokens = [x for of_rollout in micro_batch for x in of_rollout]
            means.append(sum(tokens) / len(tokens) if tokens else 0.0)
        if means:
            of_ranks.append(sum(means) / len(means))
    return sum(of_ranks) / len(of_ranks)


def average_by_table(values: list[list[float]], denominators: list[StepCounts], seed: int) -> float:
    """Through stacked denominators and token_average, in micro-batches that have nothing to do with the deal."""
    order = list(range(len(values)))
    rng = random.Random(seed)
    rng.shuffle(order)
    result = 0.0
    while order:
        cut = rng.randint(1, len(order))
        part, order = order[:cut], order[cut:]
        longest = max(1, *(len(values[i]) for i in part), 1)
        mask = torch.tensor([[float(t < len(values[i])) for t in range(longest)] for i in part])
        table = torch.tensor([values[i] + [7.0] * (longest - len(values[i])) for i in part], dtype=torch.float64)
        weights = token_average(mask, stacked([denominators[i] for i in part], torch.device("cpu")))
        result += float((weights.double() * table).sum())
    return result


VALUES = st.lists(st.lists(st.floats(-3, 3), max_size=6), min_size=1, max_size=24)


@given(VALUES, st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_the_table_gives_the_average_of_the_deal(values, ranks, size, seed):
    counts = [StepCounts(len(of_rollout), 1) for of_rollout in values]
    got = average_by_table(values, dealt_denominators(counts, ranks, size), seed)
    assert got == pytest.approx(average_by_hand(values, ranks, size), abs=1e-6)  # fp32 weights


def test_another_deal_is_another_number():
    """The control: order, ranks and size all matter, and the mean over all tokens is none of them."""
    values = [[1.0] * 5, [-2.0], [3.0] * 3, [0.5] * 2, [2.0] * 4, [-1.0], [0.0, 1.0]]
    deals = [(1, 2), (2, 2), (3, 2), (2, 1), (8, 1)]
    found = [average_by_hand(values, *each) for each in deals] + [average_by_hand(values[::-1], 2, 2)]
    found.append(average_by_hand(values, 1, 99))
    assert all(abs(a - b) > 1e-2 for number, a in enumerate(found) for b in found[:number])
    counts = [StepCounts(len(of_rollout), 1) for of_rollout in values]
    for each, number in zip(deals, found):
        assert average_by_table(values, dealt_denominators(counts, *each), 1) == pytest.approx(number, abs=1e-6)


def test_every_rollout_is_dealt_once_and_ranks_without_any_are_left_out():
    assert deal(7, 3, 2) == [[range(0, 6, 3), range(6, 9, 3)], [range(1, 7, 3)], [range(2, 7, 3)]]
    for rollouts, ranks, size in [(1, 8, 4), (3, 8, 4), (640, 8, 4), (13, 4, 5)]:
        dealt = deal(rollouts, ranks, size)
        assert sorted(i for of_rank in dealt for part in of_rank for i in part) == list(range(rollouts))
        assert len(dealt) == min(ranks, rollouts) and all(len(part) <= size for of_rank in dealt for part in of_rank)


def test_the_options_reach_the_table():
    counts = [StepCounts(number + 1, 1, number % 2) for number in range(12)]

    def denominators(**options):
        return denominators_of(counts, ObjectiveConfig(**options))

    published = denominators(average="micro_batch")
    assert published == dealt_denominators(counts, 8, 4) != denominators(average="micro_batch", average_ranks=2)
    assert published != denominators(average="micro_batch", average_micro_batch_size=1)
    assert denominators(average="token") == denominators(average="sequence") == [total(counts)] * 12
    assert denominators(average="token", average_ranks=2) == [total(counts)] * 12
    assert total(counts) == StepCounts(78, 12, 6)

"""The refill logic of dynamic sampling, without a server: groups are numbers of right responses out of GROUP_SIZE."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_papo.config import DynamicSamplingConfig
from megatron_papo.errors import UserError
from megatron_papo.rollout.dynamic_sampling import fill_batch, one_round
from megatron_papo.rollout.groups import Graded, Group
from megatron_papo.run.records import Rewards
from megatron_papo.sglang.answers import Sample

GROUP_SIZE = 5


def graded(accuracy):
    rewards = Rewards(overall=accuracy, accuracy=accuracy, format=0.0)
    return Graded(Sample.of([1], [-1.0], "stop", "v"), "", rewards)


def numbered(rounds):
    """Lists of how many are right -> lists of Groups; the epoch serves as the number in the order drawn."""
    counter = iter(range(10**6))
    return [
        [Group(next(counter), [], [graded(1.0)] * right + [graded(0.0)] * (GROUP_SIZE - right)) for right in one]
        for one in rounds
    ]


def right(group):
    return sum(response.rewards.accuracy == 1.0 for response in group.graded)


class Rounds:
    """An iterator of rounds that knows how many were asked for."""

    def __init__(self, rounds):
        self.rounds, self.asked = iter(rounds), 0

    def __iter__(self):
        return self

    def __next__(self):
        self.asked += 1
        return next(self.rounds)


def test_by_hand():
    rounds = Rounds(numbered([[0, 5, 2], [5, 5, 0], [1, 4, 3], [1, 1, 1]]))
    batch = fill_batch(rounds, 3, DynamicSamplingConfig())
    assert [group.epoch for group in batch.kept] == [2, 6, 7]
    assert (batch.rounds, len(batch.sampled), batch.all_right, batch.all_wrong, batch.surplus) == (3, 9, 3, 2, 1)
    assert rounds.asked == 3
    # the round without a mixed group adds nothing; the authors' code would have kept its three
    assert not {3, 4, 5} & {group.epoch for group in batch.kept}


def test_limits_are_strict():
    for lowest, highest, kept in (
        (0.0, 1.0, [1, 2, 3, 4]),
        (0.2, 0.8, [2, 3]),
        (0.2, 0.81, [2, 3, 4]),
        (0.19, 0.8, [1, 2, 3]),
    ):
        limits = DynamicSamplingConfig(lowest_accuracy=lowest, highest_accuracy=highest)
        batch = fill_batch(iter(numbered([[0, 1, 2, 3, 4, 5]])), len(kept), limits)
        assert [right(group) for group in batch.kept] == kept
        assert batch.all_wrong == min(kept) and batch.all_right == 5 - max(kept)


rounds_of_groups = st.lists(st.lists(st.integers(0, GROUP_SIZE), min_size=1, max_size=7), min_size=1, max_size=8)


@given(rounds_of_groups, st.integers(1, 9), st.integers(1, 8))
def test_any_rounds(rounds, wanted, max_rounds):
    """Against the definition: which prefix of the rounds holds enough mixed groups, counted with exact fractions."""
    groups = numbered(rounds)
    limits = DynamicSamplingConfig(max_rounds=max_rounds)

    def mixed(group):
        return Fraction(1, 100) < Fraction(right(group), GROUP_SIZE) < Fraction(99, 100)

    prefixes = [[group for one in groups[:n] for group in one] for n in range(1, min(max_rounds, len(groups)) + 1)]
    enough = [prefix for prefix in prefixes if sum(map(mixed, prefix)) >= wanted]
    asked = Rounds([*groups, *[numbered([[0]])[0]] * max_rounds])  # then rounds that never help
    if not enough:
        with pytest.raises(UserError, match=f"after max_rounds = {max_rounds} rounds") as caught:
            fill_batch(asked, wanted, limits)
        assert asked.asked == max_rounds and len(str(caught.value).splitlines()) == 1
        return
    batch = fill_batch(asked, wanted, limits)
    used = enough[0]
    assert batch.sampled == used and asked.asked == batch.rounds == prefixes.index(used) + 1
    assert batch.kept == [group for group in used if mixed(group)][:wanted]
    assert batch.all_right == sum(right(group) == GROUP_SIZE for group in used)
    assert batch.all_wrong == sum(right(group) == 0 for group in used)
    assert len(used) == batch.all_right + batch.all_wrong + wanted + batch.surplus


def test_giving_up_says_what_was_found_and_what_to_do():
    with pytest.raises(UserError) as hard:
        fill_batch(iter(numbered([[0, 0, 1], [0, 5, 0]])), 4, DynamicSamplingConfig(max_rounds=2))
    assert "after max_rounds = 2 rounds, 6 prompts gave 1 of the 4 groups wanted: 1 were all right, 4 all wrong" in str(
        hard.value
    )
    assert "easier prompts" in str(hard.value) and "max_rounds" in str(hard.value)
    with pytest.raises(UserError) as easy:
        fill_batch(iter(numbered([[5, 5, 0]])), 4, DynamicSamplingConfig(max_rounds=1))
    assert "harder prompts" in str(easy.value) and "easier" not in str(easy.value)


def test_without_dynamic_sampling_everything_is_kept():
    (groups,) = numbered([[0, 5, 2, 0]])
    batch = one_round(groups)
    assert batch.kept == batch.sampled == groups
    assert (batch.rounds, batch.all_right, batch.all_wrong, batch.surplus) == (1, 1, 2, 0)

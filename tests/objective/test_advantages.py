"""Advantages against loops written from the papers, and on degenerate groups. GRPO and RLOO also: test_golden.py."""

import statistics

import pytest
import torch

from megatron_papo.objective.advantages import advantages_of

REWARDS = [[1.0, 0.1, 0.9, 0.0, 1.0], [0.0, 0.0, 1.0, 0.1, 0.1]]
LENGTHS = [[3, 9, 1, 0, 4], [2, 2, 7, 5, 1]]


def by_hand(estimator):
    tokens = [
        reward
        for rewards, lengths in zip(REWARDS, LENGTHS)
        for reward, length in zip(rewards, lengths)
        for _ in range(length)
    ]
    mean, deviation = statistics.mean(tokens), statistics.stdev(tokens)
    rows = []
    for group in REWARDS:
        row = []
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            row.append(
                {
                    "grpo": (reward - statistics.mean(group)) / statistics.stdev(group),
                    "dr_grpo": reward - statistics.mean(group),
                    "rloo": reward - statistics.mean(others),
                    "reinforce_plus_plus": (reward - mean) / deviation,
                }[estimator]
            )
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus"])
def test_equals_the_formula(estimator):
    found = advantages_of(estimator, torch.tensor(REWARDS), torch.tensor(LENGTHS))
    torch.testing.assert_close(found, by_hand(estimator), rtol=1e-5, atol=3e-6)  # 1e-6 is added to GRPO's deviation
    for other in {"grpo", "dr_grpo", "rloo", "reinforce_plus_plus"} - {estimator}:
        assert not torch.allclose(found, by_hand(other), atol=1e-2)


def test_reinforce_plus_plus_is_white_over_tokens():
    lengths = torch.tensor(LENGTHS)
    tokens = (
        advantages_of("reinforce_plus_plus", torch.tensor(REWARDS), lengths)
        .flatten()
        .repeat_interleave(lengths.flatten())
    )
    assert abs(tokens.mean()) < 1e-6 and abs(tokens.std() - 1) < 1e-6
    same_length = advantages_of("reinforce_plus_plus", torch.tensor(REWARDS), torch.ones(2, 5))
    assert not torch.allclose(
        same_length, advantages_of("reinforce_plus_plus", torch.tensor(REWARDS), lengths), atol=1e-2
    )


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.9, 1.0])
def test_a_group_of_equal_rewards_gives_no_gradient(estimator, reward):
    """0.1 in fp32: the mean of seven of them is not 0.1, and dividing that by a deviation of 1e-6 must not make an
    advantage."""
    found = advantages_of(estimator, torch.full((1, 7), reward), torch.full((1, 7), 3))
    assert float(found.abs().max()) < (1e-3 if estimator == "reinforce_plus_plus" else 1e-6)

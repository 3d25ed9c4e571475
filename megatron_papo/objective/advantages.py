"""Advantages of rollouts, from their rewards (and lengths) alone. Rewards and result: [groups, group_size]."""

import torch
from torch import Tensor

STD_EPSILON = 1e-6
WHITENING_EPSILON = 1e-8
"""Added to the variance."""


def advantages_of(estimator: str, rewards: Tensor, lengths: Tensor) -> Tensor:
    """Return the advantages by an estimator's name: grpo, dr_grpo, rloo, reinforce_plus_plus.

    rewards, lengths (of the responses, in tokens) and the result: [groups, group_size].
    """
    if estimator == "reinforce_plus_plus":
        return reinforce_plus_plus(rewards, lengths)
    return GROUP_ADVANTAGES[estimator](rewards)


def grpo(rewards: Tensor) -> Tensor:
    """Return (r - mean) / (std + 1e-6) within the group, unbiased std (GRPO, arXiv 2402.03300).

    A group of equal rewards gives zeros.
    """
    # the mean of equal numbers may be off by a rounding, which 1 / (0 + 1e-6) would blow up
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return torch.where(equal, 0.0, dr_grpo(rewards) / (rewards.std(dim=1, keepdim=True) + STD_EPSILON))


def dr_grpo(rewards: Tensor) -> Tensor:
    """Return r - mean within the group: no division by the standard deviation (arXiv 2503.20783)."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def rloo(rewards: Tensor) -> Tensor:
    """Return r - mean of the OTHER rollouts of the group (arXiv 2402.14740)."""
    size = rewards.shape[1]
    return dr_grpo(rewards) * (size / (size - 1))


def reinforce_plus_plus(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Return (r - mean) / sqrt(variance + 1e-8), mean and variance over all response tokens of the rollout batch, each
    carrying its rollout's reward.

    REINFORCE++ (arXiv 2501.03262) without discount: no group baseline, global whitening, unbiased variance. An empty
    response weighs nothing.
    """
    count = lengths.sum().clamp(min=1)
    mean = (lengths * rewards).sum() / count
    centred = rewards - mean
    variance = (lengths * centred.square()).sum() / (count - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + WHITENING_EPSILON)


GROUP_ADVANTAGES = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}

"""Advantages of the rollouts of a group, from their rewards alone. All functions: [groups, group_size] -> [groups, group_size]."""

from torch import Tensor

STD_EPSILON = 1e-6


def grpo(rewards: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) within the group, unbiased std (GRPO, arXiv 2402.03300). A group of equal rewards gives zeros."""
    centred = dr_grpo(rewards)
    return centred / (rewards.std(dim=1, keepdim=True) + STD_EPSILON)


def dr_grpo(rewards: Tensor) -> Tensor:
    """r - mean within the group: no division by the standard deviation (arXiv 2503.20783)."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def rloo(rewards: Tensor) -> Tensor:
    """r - mean of the OTHER rollouts of the group (arXiv 2402.14740)."""
    size = rewards.shape[1]
    return dr_grpo(rewards) * (size / (size - 1))


ADVANTAGES = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}

"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2).

A group that is all right or all wrong does not say which response is better: rounds of groups are sampled until the
batch is full of groups in between. The rounds come from an iterator that samples when it is asked: nothing here knows
of servers or files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_papo.config import DynamicSamplingConfig
from megatron_papo.errors import UserError
from megatron_papo.rollout.groups import Group


@dataclass(frozen=True)
class Batch:
    """The groups of an iteration. sampled = all right + all wrong + kept + surplus where there is dynamic sampling."""

    kept: list[Group]
    """Groups to train on, in the order drawn."""
    sampled: list[Group]
    """All groups, in the order drawn."""
    rounds: int
    all_right: int
    """How many reach highest_accuracy (without dynamic sampling: 1)."""
    all_wrong: int
    """How many do not exceed lowest_accuracy (without dynamic sampling: 0)."""
    surplus: int
    """How many in between the last round gave that the batch had no place for; they are dropped."""


def one_round(groups: Sequence[Group]) -> Batch:
    """Return the batch without dynamic sampling: every group is kept."""
    accuracies = [group.accuracy for group in groups]
    return Batch(list(groups), list(groups), 1, accuracies.count(1.0), accuracies.count(0.0), surplus=0)


def fill_batch(rounds: Iterator[Sequence[Group]], wanted: int, settings: DynamicSamplingConfig) -> Batch:
    """Take rounds until `wanted` groups have an accuracy strictly between the limits, and keep the first of those.

    No round is taken that is not needed. Raises UserError if the batch is not full after settings.max_rounds. Differs:
    where no group of a round qualifies, the authors' code (ray_trainer.py, _make_batch_data) keeps all groups of the
    round.
    """
    between: list[Group] = []
    sampled: list[Group] = []
    all_right = all_wrong = 0
    for number in range(1, settings.max_rounds + 1):
        for group in next(rounds):
            sampled.append(group)
            if group.accuracy >= settings.highest_accuracy:
                all_right += 1
            elif group.accuracy <= settings.lowest_accuracy:
                all_wrong += 1
            else:
                between.append(group)
        if len(between) >= wanted:
            return Batch(between[:wanted], sampled, number, all_right, all_wrong, len(between) - wanted)
    raise UserError(
        f"rollout.dynamic_sampling: after max_rounds = {settings.max_rounds} rounds, {len(sampled)} prompts gave"
        f" {len(between)} of the {wanted} groups wanted: {all_right} were all right, {all_wrong} all wrong:"
        f" {_advice(all_right, all_wrong)}, lower rollout.rollout_batch_size, or raise rollout.group_size or"
        " rollout.dynamic_sampling.max_rounds"
    )


def _advice(all_right: int, all_wrong: int) -> str:
    if all_wrong >= all_right:
        return "give the model easier prompts or a (longer) cold start"
    return "give the model harder prompts"

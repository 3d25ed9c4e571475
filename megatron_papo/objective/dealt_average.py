"""The authors' average over a step: token means of micro-batches, their mean on each rank, then over the ranks.

Which rollouts share a micro-batch decides the result, so the deal is part of the objective: rank r of n gets every n-th
rollout of the step from its r-th on, and cuts them, in order, into micro-batches of a fixed size. From it each rollout
gets its denominators. What computes the rollouts (other ranks, other micro-batches) then changes nothing.
"""

from collections.abc import Sequence

from megatron_papo.objective.papo_loss import StepCounts, total


def deal(rollouts: int, ranks: int, micro_batch_size: int) -> list[list[range]]:
    """Return the positions of the rollouts in each micro-batch of each rank that gets any.

    Args:
        rollouts: of the step.
        ranks: they are dealt out over.
        micro_batch_size: rollouts in a micro-batch; the last one of a rank may hold fewer.
    """
    of_ranks = [range(rank, rollouts, ranks) for rank in range(min(ranks, rollouts))]
    return [
        [of_rank[start : start + micro_batch_size] for start in range(0, len(of_rank), micro_batch_size)]
        for of_rank in of_ranks
    ]


def dealt_denominators(rollouts: Sequence[StepCounts], ranks: int, micro_batch_size: int) -> list[StepCounts]:
    """Return the denominators of each rollout of a step: what is divided by them adds up to the authors' average.

    That of a rollout is its micro-batch's count, times the number of micro-batches of its rank, times that of the ranks
    that have any rollouts. A micro-batch without tokens adds 0 to the means.

    Args:
        rollouts: counts of each rollout alone, in the order of the step.
        ranks, micro_batch_size: see deal.
    """
    denominators = list(rollouts)
    dealt = deal(len(rollouts), ranks, micro_batch_size)
    for of_rank in dealt:
        for micro_batch in of_rank:
            counts = total([rollouts[position] for position in micro_batch], times=len(of_rank) * len(dealt))
            for position in micro_batch:
                denominators[position] = counts
    return denominators

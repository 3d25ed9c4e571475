"""Which prompts an iteration draws: a pure function of the run's seed and the iteration's number, so nothing is carried over."""

import random

from megatron_papo.seeds import derive_seed


def prompts_of_iteration(num_prompts: int, rollout_batch_size: int, iteration: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, index of the prompt) of each of an iteration's groups; iterations count from 1, epochs and indices from 0.

    Each epoch is a permutation of all prompts; iteration i takes the i-th slice of rollout_batch_size of the epochs laid end to end.
    """
    first = (iteration - 1) * rollout_batch_size
    orders: dict[int, list[int]] = {}
    drawn = []
    for position in range(first, first + rollout_batch_size):
        epoch, place = divmod(position, num_prompts)
        if epoch not in orders:
            orders[epoch] = random.Random(derive_seed(seed, "order", epoch)).sample(range(num_prompts), num_prompts)
        drawn.append((epoch, orders[epoch][place]))
    return drawn

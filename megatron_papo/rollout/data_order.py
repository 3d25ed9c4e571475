"""Which prompts are drawn: a pure function of the run's seed and of a position in its epochs laid end to end."""

import random

from megatron_papo.seeds import derive_seed


def prompts_at(num_prompts: int, first_position: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Return (epoch, index of the prompt) at each of `count` positions; all of them count from 0.

    Each epoch is a permutation of all prompts. An iteration draws from where the iteration before stopped.

    Args:
        num_prompts: how many there are.
        first_position: in the epochs laid end to end.
        count: how many are drawn.
        seed: of the run.
    """
    orders: dict[int, list[int]] = {}
    drawn = []
    for position in range(first_position, first_position + count):
        epoch, place = divmod(position, num_prompts)
        if epoch not in orders:
            orders[epoch] = random.Random(derive_seed(seed, "order", epoch)).sample(range(num_prompts), num_prompts)
        drawn.append((epoch, orders[epoch][place]))
    return drawn

"""What the ranks of a training job tell each other, apart from tensors of the model."""

import sys
from contextlib import contextmanager

from megatron_papo.distributed import process_groups
from megatron_papo.errors import UserError


@contextmanager
def first_process_speaks():
    """For checks that fail alike in every process: only the first one reports the UserError, the others leave
    quietly."""
    try:
        yield
    except UserError:
        if process_groups.is_main_rank():
            raise
        sys.exit(2)


def is_reporting_rank() -> bool:
    """The one process that sees losses first: last pipeline stage, first tensor- and data-parallel rank. It shows and
    logs them."""
    return (
        process_groups.is_last_stage()
        and process_groups.tp_group().rank() == 0
        and process_groups.dp_group().rank() == 0
    )


def sum_from_last_stage(values: dict) -> dict[str, float]:
    """Adds up {name: scalar} over the data-parallel ranks of the last pipeline stage; every rank gets the sums."""
    mine = {}
    if process_groups.is_last_stage() and process_groups.tp_group().rank() == 0:
        mine = {name: float(value) for name, value in values.items()}
    everyone = _gather(mine)
    names = next(each for each in everyone if each)
    return {name: sum(each[name] for each in everyone if each) for name in names}


def max_over_ranks(value: float) -> float:
    return max(_gather(value))


def barrier() -> None:
    _gather(None)


def _gather(value) -> list:
    import torch

    everyone = [None] * process_groups.world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone

"""What the ranks of a training job tell each other, apart from tensors of the model."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import SupportsFloat, TypeVar

from megatron_papo.distributed import process_groups
from megatron_papo.errors import UserError
from megatron_papo.reading import shown

Value = TypeVar("Value")

LAUNCHER_SECONDS = 5.0
"""Within this time a launcher ends the other processes when one has failed; torchrun looks ten times a second."""


@contextmanager
def first_process_speaks() -> Iterator[None]:
    """Report a UserError once where it comes up in every process alike, and by its rank where it does not.

    The first process reports it and ends, upon which the launcher ends the others. One that is still there after a
    while has failed alone (another file system, another machine) and says so itself.
    """
    try:
        yield
    except UserError as error:
        if process_groups.is_main_rank():
            raise
        time.sleep(LAUNCHER_SECONDS)
        for line in error.lines:
            print(f"error: rank {process_groups.rank()}: {shown(line, limit=0)}", file=sys.stderr, flush=True)
        sys.exit(2)


@contextmanager
def within_first_process(output: AbstractContextManager[object]) -> Iterator[None]:
    """Enter an output in the first process, and leave it there once all have done their work; all leave together.

    Where the others would end meanwhile, a launcher on several nodes would give the first one five minutes to publish
    what they have made (torchrun's agents wait so long for each other), and then end it.
    """
    with ExitStack() as stack:
        if process_groups.is_main_rank():
            stack.enter_context(output)
        barrier()  # the output's directory is there
        yield
        barrier()  # every process has written
        leaving = stack.pop_all()
    problem: UserError | None = None
    try:
        leaving.close()
    except UserError as error:
        problem = error
    if any(gather(problem is not None)):
        if problem is not None:
            raise problem
        time.sleep(LAUNCHER_SECONDS)  # the first process says it
        process_groups.leave(2)


def is_reporting_rank() -> bool:
    """Return whether this is the one process that shows and logs losses: of the last pipeline stage, which sees them,
    the first tensor- and data-parallel rank."""
    return (
        process_groups.is_last_stage()
        and process_groups.tp_group().rank() == 0
        and process_groups.dp_group().rank() == 0
    )


def sum_from_last_stage(values: Mapping[str, SupportsFloat]) -> dict[str, float]:
    """Return the sums of named scalars over the data-parallel ranks of the last pipeline stage, on every rank."""
    contribution: dict[str, float] = {}
    if process_groups.is_last_stage() and process_groups.tp_group().rank() == 0:
        contribution = {name: float(value) for name, value in values.items()}
    contributions = [of_rank for of_rank in gather(contribution) if of_rank]
    return {name: sum(of_rank[name] for of_rank in contributions) for name in contributions[0]}


def max_over_ranks(value: float) -> float:
    """Return the largest of the ranks' values, on every rank."""
    return max(gather(value))


def barrier() -> None:
    """Return once every rank is here."""
    gather(None)


def gather(value: Value) -> list[Value]:
    """Return the values of all ranks, on every rank."""
    import torch

    values: list[Value] = [value] * process_groups.world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def gather_data_parallel(value: Value) -> list[Value]:
    """Return the values of this rank's data-parallel group, on each of its ranks."""
    import torch

    group = process_groups.dp_group()
    values: list[Value] = [value] * group.size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values

"""Traces side by side, each in a process of its own: a trace is nothing but Python on one core."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from megatron_papo.plan.layers import Asked, Traces
from megatron_papo.plan.trace import Numbers, trace

MOST = 16
"""Processes at once: each takes about 0.3 GB."""


def in_processes(progress: Callable[[int, int], None]) -> Traces:
    """Return what makes traces in as many processes as there are cores for this one.

    They are forked, so that torch is imported once; autograd must not have run in this process before.

    Args:
        progress: Gets how many of the traces that were asked for are made, and how many they are.
    """

    def made(asked: Sequence[Asked]) -> list[Numbers]:
        count = min(len(asked), len(os.sched_getaffinity(0)), MOST)
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork")) as pool:
            futures = [pool.submit(trace, *each) for each in asked]
            for number, future in enumerate(as_completed(futures), 1):
                future.result()  # an error, as soon as there is one
                progress(number, len(futures))
            return [future.result() for future in futures]

    return made

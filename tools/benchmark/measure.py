"""Seconds and bytes for the benchmarks."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def shared_machine_clock(processes: int = 1) -> Callable[[], float]:
    """Return the clock that other work on the machine moves least.

    CPU seconds of this process where one thread of it does everything, as on an idle machine; wall seconds where a GPU,
    more threads or more processes work together.
    """
    import torch

    alone = processes == 1 and torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time if alone else time.perf_counter


def seconds_in_turns(
    functions: Mapping[Name, Callable[[], object]],
    repeat: int,
    statistic: Callable[[list[float]], float] = statistics.median,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, float]:
    """Measure the seconds of each function, after one call that does not count; the functions take turns.

    Args:
        functions: what is measured, by name.
        repeat: measurements of each.
        statistic: of the measurements. `min` where other work on the machine is the only noise: it never makes a call
            faster.
        clock: what counts.
    """
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    measured: dict[Name, list[float]] = {name: [] for name in functions}
    for number in range(repeat + 1):
        for name, function in functions.items():
            wait()
            started = clock()
            function()
            wait()
            if number > 0:
                measured[name].append(clock() - started)
    return {name: statistic(seconds) for name, seconds in measured.items()}


def peak_bytes(function: Callable[[], object]) -> int:
    """Measure the most bytes that tensors allocated while the function runs hold at one time, without what was there
    before."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # torch's allocator for the CPU has no counter, but reports every allocation and release to the profiler
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as directory:
        profile.export_chrome_trace(f"{directory}/trace.json")
        events = json.loads(Path(directory, "trace.json").read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def measure_in_processes(
    module: str,
    args: Namespace,
    processes: int,
    make_checkpoint: Callable[[Namespace, Path], None],
    measure: Callable[[Namespace, Path], dict],
    show: Callable[[Namespace, dict], None],
) -> None:
    """Run a benchmark in one process or several.

    Args:
        module: the benchmark's name for `python -m`.
        args: its command line; args.checkpoint: this is one of several processes.
        processes: how many. Several are started by torchrun, as this command again with --checkpoint.
        make_checkpoint: makes what is measured in a directory.
        measure: returns the result, in every process.
        show: prints it, in the first one.
    """
    if args.checkpoint:
        result = measure(args, args.checkpoint)
        if int(os.environ["RANK"]) == 0:
            show(args, result)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(args, Path(directory))
        if processes == 1:
            show(args, measure(args, Path(directory)))
            return
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        sys.exit(subprocess.run([*launcher, "-m", module, *sys.argv[1:], "--checkpoint", directory]).returncode)

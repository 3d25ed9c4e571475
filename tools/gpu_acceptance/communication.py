"""Section communication: the collective operations that training uses, exact, over all GPUs; their speed.

As a module of torchrun it is one of the processes: `communication FILE` writes what rank 0 found.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.gpu_acceptance.report import Fact, Line, passed_if
from tools.gpu_acceptance.task import Task

MODULE = "tools.gpu_acceptance.communication"
CPU_PROCESSES = 2
BYTES = {"cuda": 1 << 28, "cpu": 1 << 20}


def run(task: Task) -> Iterator[Line | Fact]:
    name = "gloo" if task.device == "cpu" else "NCCL"
    if task.gpus == 1:
        yield Line("one process without a launcher", *outcome(task.output, 1, name))
        yield Line(f"{name} between GPUs", "not possible", "1 GPU")
        return
    processes = task.gpus or CPU_PROCESSES
    yield Line(f"{processes} processes", *outcome(task.output, processes, name))


def outcome(output: Path, processes: int, name: str) -> tuple:
    """Return result and words of the operations among so many processes."""
    file = output / "communication.ranks.json"
    file.unlink(missing_ok=True)
    launcher = ["tools.torchrun", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    done = subprocess.run([sys.executable, "-m", *launcher, MODULE, str(file)])
    if done.returncode or not file.exists():
        return "fail", f"{name} ended with status {done.returncode}: see the log"
    found = json.loads(file.read_text())
    wrong = [operation for operation, right in found["exact"].items() if not right]
    said = f"{', '.join(found['exact'])} exact; all-reduce {found['gigabytes_per_second']:.1f} GB/s a rank"
    return passed_if(not wrong), f"wrong: {', '.join(wrong)}" if wrong else f"{name}: {said}"


def operations(rank: int, ranks: int) -> dict[str, Callable[[], bool]]:
    """Return the operations by name: each returns whether this rank got what arithmetic says."""
    import torch
    import torch.distributed as dist

    from megatron_papo.distributed import process_groups

    device, total = process_groups.device(), ranks * (ranks + 1) // 2
    numbers = torch.arange(4096, device=device) % 64

    def all_reduce(dtype: torch.dtype) -> bool:
        tensor = numbers.to(dtype) * (rank + 1)
        dist.all_reduce(tensor)
        return torch.equal(tensor, numbers.to(dtype) * total)

    def gather() -> bool:
        whole = numbers.new_empty(ranks * len(numbers))
        dist.all_gather_into_tensor(whole, numbers + rank)
        return torch.equal(whole, torch.cat([numbers + other for other in range(ranks)]))

    def scatter() -> bool:
        part = numbers.new_empty(len(numbers) // ranks, dtype=torch.float32)
        dist.reduce_scatter_tensor(part, numbers[: len(part) * ranks].float() * (rank + 1))
        return torch.equal(part, numbers[len(part) * rank : len(part) * (rank + 1)].float() * total)

    def objects() -> bool:
        everyone: list = [None] * ranks
        dist.all_gather_object(everyone, {"rank": rank})
        first = [{"from": rank}]
        dist.broadcast_object_list(first)
        return everyone == [{"rank": other} for other in range(ranks)] and first == [{"from": 0}]

    def ring() -> bool:
        received = torch.empty_like(numbers)
        pair = [
            dist.P2POp(dist.isend, numbers + rank, (rank + 1) % ranks),
            dist.P2POp(dist.irecv, received, (rank - 1) % ranks),
        ]
        for request in dist.batch_isend_irecv(pair):
            request.wait()
        return torch.equal(received, numbers + (rank - 1) % ranks)

    found: dict[str, Callable[[], bool]] = {
        "all-reduce": lambda: all_reduce(torch.float32) and all_reduce(torch.bfloat16),
        "all-gather": gather,
        "reduce-scatter": scatter,
        "objects": objects,
    }
    return found | ({"send and receive": ring} if ranks > 1 else {})


def bytes_per_second(ranks: int) -> float:
    """Return what an all-reduce moves through each rank, 2 (n - 1) / n of the tensor (all of it for one rank)."""
    import torch

    from megatron_papo.distributed import process_groups

    device = process_groups.device()
    tensor = torch.ones(BYTES[device.type] // 4, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.distributed.barrier
    times = []
    for _ in range(5):
        wait()
        started = time.perf_counter()
        torch.distributed.all_reduce(tensor)
        wait()
        times.append(time.perf_counter() - started)
    share = 2 * (ranks - 1) / ranks if ranks > 1 else 1
    return share * tensor.nbytes / min(times)


def main() -> None:
    import torch

    from megatron_papo.distributed import collectives, process_groups

    process_groups.connect()
    rank, ranks = process_groups.rank(), process_groups.world_size()
    exact = {}
    for name, operation in operations(rank, ranks).items():
        right = torch.tensor(float(operation()), device=process_groups.device())
        torch.distributed.all_reduce(right, torch.distributed.ReduceOp.MIN)
        exact[name] = bool(right)
    speed = collectives.max_over_ranks(bytes_per_second(ranks))
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps({"exact": exact, "gigabytes_per_second": speed / 1e9}))
    process_groups.disconnect()


if __name__ == "__main__":
    from megatron_papo.run.command_line import run as run_command

    run_command(main)

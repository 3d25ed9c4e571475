"""Memory that saving and loading a training checkpoint need on each rank, against megatron-core's gathering of it.

    .venv/bin/python -m tools.benchmark.saving --tp 1 --dp 2 --hidden 1024

A narrow model under DistributedOptimizer, random weights, one optimizer step's state. Of each way: the most bytes of
tensors that live beside what was there before (on a GPU: on the GPU), and how far the resident memory of the process
rises, as multiples of the shard that a rank holds (weights, fp32 main parameters, both moments); and wall seconds.
`gathered` is megatron-core's fully_reshardable sharded_state_dict alone, before anything is written. The worst rank
counts. The last line of the output is one JSON object.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

from megatron_papo.run.command_line import run
from tools.benchmark.measure import measure_in_processes, peak_bytes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size (default 1)")
    parser.add_argument("--dp", type=int, default=2, help="data-parallel size (default 2)")
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 64 (default 256; 3B: 2048)")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder (default 4; 3B: 36)")
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)  # of the processes that are started
    return parser.parse_args()


def make_checkpoint(args: argparse.Namespace, directory: Path) -> None:
    from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model

    sizes = TinySizes(
        num_layers=args.layers,
        num_heads=args.hidden // 32,
        num_kv_heads=args.hidden // 64,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
    )
    make_tiny_model(directory / "hf", seed=1, sizes=sizes)


def measure(args: argparse.Namespace, directory: Path) -> dict:
    """In every process; the result is the same in all."""
    import torch

    from megatron_papo.checkpoint import megatron_files, optimizer_state
    from megatron_papo.config import OptimizerConfig, ParallelConfig
    from megatron_papo.distributed import collectives, process_groups
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.model.qwen2_5_vl import build_model
    from megatron_papo.training.optimizer import build_optimizer

    process_groups.initialize(ParallelConfig(tensor_model_parallel_size=args.tp, data_parallel_size=args.dp))
    model = build_model(
        read_hf_config(directory / "hf"), dtype=torch.bfloat16, sequence_parallel=False, recompute="none"
    )
    settings = OptimizerConfig(learning_rate=1e-4, distributed=True)
    wrapped, optimizer = build_optimizer(model, settings, torch.bfloat16)
    for parameter in model.parameters():
        parameter.main_grad.fill_(1e-3)
    optimizer.step()
    part = optimizer_state.distributed_part(optimizer)
    assert part is not None
    state = [tensor for group in part.optimizer.param_groups for tensor in group["params"]]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shard = 2 * parameters + 12 * sum(tensor.numel() for tensor in state)

    def gathered() -> None:
        whole = {"distrib_optim_sharding_type": "fully_reshardable"}
        model_state = model.sharded_state_dict(metadata={"dp_cp_group": process_groups.dp_group()})
        optimizer.sharded_state_dict(model_state, metadata=whole)

    def saved() -> None:
        megatron_files.save(directory / "saved", model, optimizer, {})

    def loaded() -> None:
        megatron_files.load_optimizer(directory / "saved", model, optimizer)

    found: dict = {"tp": args.tp, "dp": args.dp, "parameters_of_a_rank": parameters, "shard_bytes": shard}
    for name, function in {"gathered": gathered, "saved": saved, "loaded": loaded}.items():
        gc.collect()
        started = time.perf_counter()
        resident = rise_of_resident_memory(function)
        seconds = time.perf_counter() - started
        tensors = peak_bytes(function)
        numbers = {"tensors": tensors / shard, "resident": resident / shard, "seconds": seconds}
        numbers |= {"tensor_bytes": float(tensors), "resident_bytes": float(resident)}
        found[name] = {key: collectives.max_over_ranks(value) for key, value in numbers.items()}
    found["file_bytes"] = sum(file.stat().st_size for file in (directory / "saved").glob("*.distcp"))
    process_groups.shutdown()
    return found


def rise_of_resident_memory(function: Callable[[], object]) -> int:
    """Return by how many bytes the process's peak while a function runs is above what it had before."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (man 5 proc)
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def show(args: argparse.Namespace, found: dict) -> None:
    size, parameters = found["shard_bytes"] / 1e6, found["parameters_of_a_rank"] / 1e6
    print(f"shard of a rank: {size:,.1f} MB, {parameters:,.2f} M parameters")
    for name in ("gathered", "saved", "loaded"):
        row = found[name]
        print(
            f"{name}: tensors {row['tensors']:.2f} of it ({row['tensor_bytes'] / 1e6:,.1f} MB), resident memory"
            f" {row['resident']:.2f} ({row['resident_bytes'] / 1e6:,.1f} MB), {row['seconds']:.2f} s"
        )
    print(json.dumps(found))


def main() -> None:
    args = parse()
    measure_in_processes("tools.benchmark.saving", args, args.tp * args.dp, make_checkpoint, measure, show)


if __name__ == "__main__":
    run(main)

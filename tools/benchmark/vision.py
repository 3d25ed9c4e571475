"""Time of the vision tower with its weights sharded over the tensor-parallel ranks against its pictures spread over
them.

    .venv/bin/python -m tools.benchmark.vision --tp 2 --pictures 1 2 4 8

Forward and backward of one micro-batch of pictures of one size, both towers (parallel.vision_tower) in turns in one
run, one checkpoint. The tower is a narrow one with the published proportions (heads of 80, MLP 2.67 times the width,
one layer in four over the whole picture). A step ends when the slowest rank has done its part. Where more processes
than cores want to run, wall time says little: processor_ratio compares the processor seconds of the busiest rank, which
leave out waiting (on a CPU; a GPU's work is not in them).

Also: the reduction of all gradients at the end of an optimizer step, which with `spread` has the tower's weights in it;
the tower's parameters per rank; and how far tokens and gradient norms of the two are apart. The last line of the output
is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from megatron_papo.run.command_line import run
from tools.benchmark.measure import measure_in_processes, seconds_in_turns

Tower = Literal["sharded", "spread"]
TOWERS: tuple[Tower, ...] = ("sharded", "spread")
HEAD_WIDTH = 80


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2, help="processes (default 2)")
    parser.add_argument(
        "--pictures", type=int, nargs="+", default=[1, 2, 4, 8], help="per micro-batch (default 1 2 4 8)"
    )
    parser.add_argument(
        "--side", type=int, default=24, help="of a picture, in patches of 14 pixels (default 24: 144 image tokens)"
    )
    parser.add_argument(
        "--heads", type=int, default=4, help=f"of the tower, {HEAD_WIDTH} wide (default 4; published: 16)"
    )
    parser.add_argument("--depth", type=int, default=4, help="layers of the tower (default 4; published: 32)")
    parser.add_argument("--repeat", type=int, default=10, help="measurements of each, the fastest counts")
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)  # of the processes that --tp starts
    return parser.parse_args()


def make_checkpoint(args: argparse.Namespace, directory: Path) -> None:
    from megatron_papo.checkpoint import convert
    from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model

    width = args.heads * HEAD_WIDTH
    sizes = TinySizes(
        num_heads=4 * args.tp,
        num_kv_heads=args.tp,
        hidden_size=128 * args.tp,
        vision_hidden_size=width,
        vision_heads=args.heads,
        vision_intermediate_size=width * 8 // 3 // args.tp * args.tp,
        vision_depth=args.depth,
        full_attention_layers=tuple(range(args.depth - 1, 0, -4)),
        initializer_range=0.02,
    )
    make_tiny_model(directory / "hf", seed=1, sizes=sizes)
    (directory / "megatron").mkdir()
    convert.hf_to_megatron(convert.HFCheckpoint(directory / "hf"), directory / "megatron")


def measure(args: argparse.Namespace, directory: Path) -> dict:
    """In every process; the result is the same in all."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed import collectives, process_groups
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.model.qwen2_5_vl import build_model

    process_groups.initialize(ParallelConfig(tensor_model_parallel_size=args.tp))
    hf = read_hf_config(directory / "hf")
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    models = {}
    for name in TOWERS:
        model = build_model(hf, dtype=dtype, sequence_parallel=False, recompute="none", vision_tower=name)
        megatron_files.load_weights(directory / "megatron", model)
        models[name] = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model
        )
    towers = {name: wrapped.module.vision_model for name, wrapped in models.items()}
    random, grid = torch.Generator().manual_seed(1), (1, args.side, args.side)

    def micro_batch(pictures: int) -> list[torch.Tensor]:
        pixels = torch.randn(pictures * args.side**2, hf.vision.patch_values, generator=random)
        gradient = torch.randn(
            pictures * args.side**2 // hf.vision.spatial_merge_size**2, hf.vision.out_hidden_size, generator=random
        )
        return [x.to(process_groups.device(), dtype) for x in (pixels, gradient)]

    def step(name: Tower, pixels: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        tokens = towers[name](pixels, [grid] * (pixels.shape[0] // args.side**2))
        if tokens.requires_grad:  # not where a rank had no picture
            tokens.backward(gradient)
        return tokens.detach()

    def finalize(name: Tower) -> None:
        models[name].module.config.finalize_model_grads_func([models[name]])

    def gradient_norm(name: Tower) -> float:
        squares = torch.zeros(
            2, dtype=torch.float64, device=process_groups.device()
        )  # of weights that are cut, of those that all ranks have
        for parameter in towers[name].parameters():
            squares[0 if getattr(parameter, "tensor_model_parallel", False) else 1] += (
                parameter.main_grad.double().square().sum()
            )
        torch.distributed.all_reduce(squares[:1], group=process_groups.tp_group())
        return float(squares.sum().sqrt())

    def in_turns(function: Callable, *arguments: object) -> tuple[dict, dict]:
        """Seconds of both towers until the slowest rank is done, and processor seconds of the busiest rank."""
        processor: dict[Tower, list[float]] = {name: [] for name in TOWERS}

        def timed(name: Tower) -> None:
            started = time.process_time()
            function(name, *arguments)
            processor[name].append(time.process_time() - started)
            torch.distributed.barrier()

        seconds = seconds_in_turns({name: partial(timed, name) for name in TOWERS}, args.repeat, statistic=min)
        return everywhere(seconds), everywhere({name: min(measured[1:]) for name, measured in processor.items()})

    def everywhere(seconds: dict) -> dict:
        return {name: collectives.max_over_ranks(value) for name, value in seconds.items()}

    found = {"tp": args.tp, "pictures": {}}
    for pictures in args.pictures:
        batch, tokens, norms = micro_batch(pictures), {}, {}
        for name, wrapped in models.items():
            wrapped.zero_grad_buffer()
            tokens[name] = step(name, *batch).float()
            finalize(name)
            norms[name] = gradient_norm(name)
        seconds, processor = in_turns(step, *batch)
        found["pictures"][pictures] = {
            "ratio": seconds["sharded"] / seconds["spread"],
            "processor_ratio": processor["sharded"] / processor["spread"],
            **{f"seconds_{name}": seconds[name] for name in TOWERS},
            **{f"processor_seconds_{name}": processor[name] for name in TOWERS},
            "max_abs_token_difference": float((tokens["sharded"] - tokens["spread"]).abs().max()),
            "max_abs_token": float(tokens["sharded"].abs().max()),
            "relative_gradient_norm_difference": abs(norms["spread"] / norms["sharded"] - 1),
        }
    seconds, _ = in_turns(finalize)
    found |= {f"seconds_finalize_{name}": seconds[name] for name in TOWERS}
    found |= {
        f"parameters_{name}": sum(parameter.numel() for parameter in towers[name].parameters()) for name in TOWERS
    }
    process_groups.shutdown()
    return found


def show(args: argparse.Namespace, found: dict) -> None:
    for pictures, row in found["pictures"].items():
        print(
            f"{pictures} pictures: sharded / spread {row['ratio']:.2f} ({row['seconds_sharded']:.3f} s /"
            f" {row['seconds_spread']:.3f} s),"
            f" of the busiest rank's processor time {row['processor_ratio']:.2f}"
            f" ({row['processor_seconds_sharded']:.3f} s / {row['processor_seconds_spread']:.3f} s);"
            f" tokens differ by {row['max_abs_token_difference']:.1e} of {row['max_abs_token']:.1e},"
            f" gradient norms by {row['relative_gradient_norm_difference']:.1e} of themselves"
        )
    width = args.heads * HEAD_WIDTH
    shape = f"TP{args.tp}, pictures of {args.side} x {args.side} patches, {args.depth} layers of width {width}"
    reductions = (f"{name} {found[f'seconds_finalize_{name}']:.4f} s" for name in TOWERS)
    print("reduction of the gradients, once a step:", ", ".join(reductions))
    print(
        f"the tower's parameters per rank: sharded {found['parameters_sharded']:,}, spread"
        f" {found['parameters_spread']:,} ({shape})"
    )
    print(json.dumps(found))


def main() -> None:
    args = parse()
    measure_in_processes("tools.benchmark.vision", args, args.tp, make_checkpoint, measure, show)


if __name__ == "__main__":
    run(main)

"""Time and memory of a PAPO training step in the group layout against the plain one, on the same rollouts, and their
gradients.

    .venv/bin/python -m tools.benchmark.layout --group-size 5 --prompt-tokens 1000 --response-tokens 250 --tp 1 --pp 1

One optimizer step as the published runs take it: sweeps without gradient over the rollouts (reference, old policy,
masked images), then forward and backward of the objective with a cached masked branch. Prompts are nine tenths image,
responses have the spread of real ones (log-normal, the mean as given). The model is a Qwen2.5-VL that is small enough
for two cores; the vocabulary is small too, so that attention, MLP and vision tower are what is timed. Both layouts take
one group per micro-batch. They are measured in turns in one run.

token_ratio: tokens of the plain layout, without its padding, over those of the group layout: what the ratio of the
times could be if every token cost the same. padded_token_ratio: with the padding to the longest response of the group,
which the plain layout computes too. flops_ratio: model FLOPs of the step (training/accounting.py), which count
attention and the vision tower for what they are, and no padding. seconds_pictures: the vision tower's part of the step,
the same in both layouts. Times are the best of --repeat, taken in turns, since other work on the machine only adds; one
process counts its own CPU seconds (`clock`). --tp and --pp start that many processes. The last line of the output is
one JSON object.

--views 1,2,3 measures another thing: the update alone, with gradient through that many views of the picture.
"""

import argparse
import json
import math
import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_papo.config import Config
from megatron_papo.run.command_line import run
from tools.benchmark.measure import measure_in_processes, peak_bytes, seconds_in_turns, shared_machine_clock
from tools.benchmark.views import VIEWS, measure_views, show_views

if TYPE_CHECKING:
    from megatron_papo.model.hf_config import HFConfig
    from megatron_papo.run.records import Rollout
    from megatron_papo.training.collator import Kind

DEMO_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
SPREAD = 0.5
"""Standard deviation of the logarithm of a response's length."""
PIXELS_PER_TOKEN = 28
SWEEPS: dict[str, "Kind"] = {
    "ref_log_probs": "original",
    "old_log_probs": "original",
    "masked_image_log_probs": "masked",
}
"""Passes without gradient, by what they yield, and the pictures they see."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--response-tokens", type=int, default=250, help="on average")
    parser.add_argument("--groups", type=int, default=2, help="in the step (default 2)")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256, help="width of the decoder (default 256)")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder (default 4)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each, the best counts (default 3)")
    parser.add_argument("--views", type=views_of, metavar="1,2,3", help="measure updates with so many views instead")
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)  # of the processes that --tp and --pp start
    return parser.parse_args()


def views_of(text: str) -> list[int]:
    """Return numbers of views. Raises ArgumentTypeError."""
    numbers = text.split(",")
    if not all(number in ("1", "2", "3") for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: expected some of 1, 2 and 3, separated by commas")
    return [int(number) for number in dict.fromkeys(numbers)]


def response_lengths(rng: random.Random, group_size: int, mean: int) -> list[int]:
    """Tokens of each response of a group: log-normal, the group's mean as given, up to rounding. One rng, one shape,
    whatever the mean."""
    draws = [math.exp(rng.gauss(0.0, SPREAD)) for _ in range(group_size)]
    return [max(1, round(mean * draw * group_size / sum(draws))) for draw in draws]


def make_rollouts(args: argparse.Namespace, hf: "HFConfig", directory: Path) -> list["Rollout"]:
    """args.groups groups; one picture of noise per prompt, which is also written."""
    import numpy as np
    from PIL import Image

    from megatron_papo.run.records import Rewards, Rollout
    from megatron_papo.seeds import derive_seed

    rng = random.Random(0)
    side = max(2, math.isqrt(args.prompt_tokens * 9 // 10))
    text = max(2, args.prompt_tokens - side * side)
    records = []
    for group in range(args.groups):
        noise = np.random.default_rng(group).integers(
            0, 256, (side * PIXELS_PER_TOKEN, side * PIXELS_PER_TOKEN, 3), dtype=np.uint8
        )
        Image.fromarray(noise).save(directory / f"{group}.png")
        prompt = [hf.image_token_id, *(rng.randrange(100) for _ in range(text))]
        for sample, length in enumerate(response_lengths(random.Random(group), args.group_size, args.response_tokens)):
            records.append(
                Rollout(
                    prompt_id=str(group),
                    iteration=1,
                    epoch=0,
                    group=group,
                    sample=sample,
                    answer="",
                    prompt_token_ids=prompt,
                    prompt_num_tokens=side * side + text,
                    images=[f"{group}.png"],
                    response_token_ids=[rng.randrange(100) for _ in range(length)],
                    rollout_log_probs=[0.0] * length,
                    text="",
                    finish_reason="stop",
                    rewards=Rewards(overall=sample % 2, accuracy=sample % 2, format=1),
                    temperature=1.0,
                    top_p=1.0,
                    sampling_seed=0,
                    masked_image_seed=derive_seed(0, group),
                    weight_version="",
                )  # fmt: skip
            )
    return records


def make_checkpoint(args: argparse.Namespace, directory: Path) -> None:
    from megatron_papo.checkpoint import convert
    from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model

    heads = max(4, args.hidden // 64)
    sizes = TinySizes(
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_layers=args.layers,
        num_heads=heads,
        num_kv_heads=2,
        vision_hidden_size=128,
        vision_intermediate_size=256,
        vision_depth=2,
        vision_heads=4,
        initializer_range=0.02,
    )
    make_tiny_model(directory / "hf", seed=1, sizes=sizes)
    (directory / "megatron").mkdir()
    convert.hf_to_megatron(convert.HFCheckpoint(directory / "hf"), directory / "megatron")


def load_layout(args: argparse.Namespace, layout: str, views: int | None = None) -> Config:
    from megatron_papo.config_files import load_config

    whole_group = 2 * args.group_size * (args.prompt_tokens + 10 * args.response_tokens)
    # one group; the next one's prompt does not fit
    budget = (views or 1) * (args.prompt_tokens + args.group_size * (args.response_tokens + 1))
    return load_config(
        DEMO_CONFIG,
        [
            f"parallel.tensor_model_parallel_size={args.tp}",
            f"parallel.pipeline_model_parallel_size={args.pp}",
            "parallel.data_parallel_size=1",
            f"parallel.sequence_parallel={str(args.tp > 1).lower()}",
            f"training.layout={layout}",
            f"training.max_tokens_per_micro_batch={budget}",
            f"training.micro_batch_size={args.group_size}",
            f"training.log_prob_micro_batch_size={args.group_size}",
            f"rollout.group_size={max(args.group_size, 2)}",
            f"data.max_pixels={args.prompt_tokens * PIXELS_PER_TOKEN**2}",
            f"data.max_prompt_tokens={whole_group}",
            *VIEWS.get(views or 0, []),
        ],
    )


def measure(args: argparse.Namespace, directory: Path) -> dict:
    """In every process of the layout; the result is the same in all."""
    if args.views:
        return measure_views(
            args,
            directory,
            {f"{layout}_{n}": load_layout(args, layout, n) for n in args.views for layout in ("plain", "group")},
        )
    import torch

    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.distributed import collectives, process_groups
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.model.qwen2_5_vl import build_model
    from megatron_papo.training import accounting
    from megatron_papo.training.collator import Collator
    from megatron_papo.training.forward_step import PassSettings, papo_step, sweep
    from megatron_papo.training.loss_recipe import counts_of, denominators_of, loss_recipe
    from megatron_papo.training.optimizer import build_optimizer
    from megatron_papo.training.rows import make_rows

    configs = {layout: load_layout(args, layout) for layout in ("plain", "group")}
    config = configs["plain"]
    process_groups.initialize(config.parallel)
    hf = read_hf_config(directory / "hf")
    shared = [make_rollouts(args, hf, directory) if process_groups.is_main_rank() else []]
    torch.distributed.broadcast_object_list(shared)
    [rollouts] = shared
    rows = make_rows(rollouts, [(-1.0) ** i for i in range(len(rollouts))], directory, config, hf, directory)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = build_model(hf, dtype=dtype, sequence_parallel=config.parallel.sequence_parallel, recompute="none")
    megatron_files.load_weights(directory / "megatron", model)
    wrapped, _ = build_optimizer(model, config.optimizer, dtype)
    settings = PassSettings(args.group_size, temperature=1.0)

    def collator_of(config: Config) -> Collator:
        return Collator(
            config,
            hf,
            directory,
            with_pixels=process_groups.is_first_stage(),
            device=process_groups.device(),
            dtype=dtype,
        )

    def step(layout: str) -> None:
        config = configs[layout]
        collator = collator_of(config)

        constants = {
            name: sweep(wrapped, collator, rows, settings, [kind])[kind].log_probs for name, kind in SWEEPS.items()
        }
        wrapped.zero_grad_buffer()
        denominators = denominators_of([counts_of(row) for row in rows], config.objective)
        papo_step(wrapped, collator, rows, constants, settings, loss_recipe(config.objective, 0), denominators)

    collator = collator_of(config)
    batches = {
        kind: [collator.collate(part, kind) for part in collator.plan(rows, args.group_size)]
        for kind in ("original", "masked")
    }

    tower = model.vision_model

    def tower_passes() -> None:
        if tower is None:  # a later pipeline stage
            return
        for pictures in SWEEPS.values():
            with torch.no_grad():
                for batch in batches[pictures]:
                    tower(batch.pixel_values, batch.image_grids)
        for batch in batches["original"]:
            out = tower(batch.pixel_values, batch.image_grids)
            out.backward(torch.ones_like(out))

    gradients, peaks = {}, {}
    for layout in configs:
        step(layout)
        gradients[layout] = [parameter.main_grad.detach().clone() for parameter in model.parameters()]
    scale = max((g.abs().max().item() for g in gradients["plain"]), default=0.0)
    difference = max(((a - b).abs().max().item() for a, b in zip(*gradients.values())), default=0.0)
    del gradients
    timed = {layout: partial(step, layout) for layout in configs} | {"pictures": tower_passes}
    clock = shared_machine_clock(args.tp * args.pp)
    seconds = seconds_in_turns(timed, args.repeat, min, clock)
    for layout in configs:
        peaks[layout] = peak_bytes(partial(step, layout))
    responses = sum(row.response_length for row in rows)
    prompts = [len(row.prompt_token_ids) for row in rows]
    tokens = {"plain": sum(prompts) + responses, "group": sum(prompts[:: args.group_size]) + responses}
    size = args.group_size
    longest = [max(row.response_length for row in rows[start : start + size]) for start in range(0, len(rows), size)]
    tokens["plain_padded"] = sum(prompts) + size * sum(longest)
    slowest = {name: collectives.max_over_ranks(value) for name, value in seconds.items()}
    found: dict[str, float | str] = {f"seconds_{name}": value for name, value in slowest.items()}
    found |= {
        "ratio": slowest["plain"] / slowest["group"],
        "token_ratio": tokens["plain"] / tokens["group"],
        "padded_token_ratio": tokens["plain_padded"] / tokens["group"],
        **{f"tokens_{name}": count for name, count in tokens.items()},
        **{f"peak_bytes_{layout}": int(collectives.max_over_ranks(peaks[layout])) for layout in configs},
        "max_abs_gradient_difference": collectives.max_over_ranks(difference),
        "max_abs_gradient": collectives.max_over_ranks(scale),
    }
    passes = [
        *accounting.sweeps(list(SWEEPS.values()), config.training),
        accounting.update(config.objective, config.training),
    ]
    flops = {
        name: sum(accounting.work_of(rows, each, of, hf).model_flops for each in passes) for name, of in configs.items()
    }
    found |= {"flops_ratio": flops["plain"] / flops["group"], "clock": clock.__name__}
    process_groups.shutdown()
    return found


def show(args: argparse.Namespace, found: dict) -> None:
    if args.views:
        show_views(args, found)
        return
    shape = (
        f"groups of {args.group_size}, prompts of {args.prompt_tokens}, responses of {args.response_tokens} tokens,"
        f" TP{args.tp} x PP{args.pp}"
    )
    print(
        f"ratio {found['ratio']:.2f} of {found['token_ratio']:.2f} that the token counts allow"
        f" ({found['ratio'] / found['token_ratio']:.0%}): {shape}"
    )
    print(f"seconds per step: plain {found['seconds_plain']:.2f}, group {found['seconds_group']:.2f}", end="")
    print(f"; of these the vision tower in either {found['seconds_pictures']:.2f}", end="")
    if args.pp == 1:  # stages overlap
        rest = {layout: found[f"seconds_{layout}"] - found["seconds_pictures"] for layout in ("plain", "group")}
        print(f", and without it a ratio of {rest['plain'] / rest['group']:.2f}", end="")
    print(f"; tokens with padding: {found['padded_token_ratio']:.2f}; FLOPs: {found['flops_ratio']:.2f}")
    print(
        f"peak bytes: plain {found['peak_bytes_plain']:,}, group {found['peak_bytes_group']:,}"
        f" ({found['peak_bytes_plain'] / found['peak_bytes_group']:.2f} x)"
    )
    print(
        f"largest difference of a gradient {found['max_abs_gradient_difference']:.1e}, largest gradient"
        f" {found['max_abs_gradient']:.1e}"
    )
    print(json.dumps(found))


def main() -> None:
    args = parse()
    measure_in_processes("tools.benchmark.layout", args, args.tp * args.pp, make_checkpoint, measure, show)


if __name__ == "__main__":
    run(main)

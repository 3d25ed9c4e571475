"""What one more view costs: the update of an optimizer step with one, two or three of them in its micro-batches, in the
group layout and in the plain one. Run by tools.benchmark.layout --views."""

import argparse
import json
from functools import partial
from pathlib import Path

from megatron_papo.config import Config
from tools.benchmark.measure import peak_bytes, seconds_in_turns, shared_machine_clock

VIEWS = {
    1: ["objective.kl_prcp_coef=0", "objective.masked_image_entropy_coef=0"],
    2: ["objective.masked_branch=recompute_with_grad"],
    3: [
        "objective.masked_branch=recompute_with_grad",
        "objective.kl_kept_coef=0.01",
        "kept_image={strategy: noise}",
    ],
}
"""Pictures that a step trains through: the original; and masked; and kept. By what the configuration says."""


def measure_views(args: argparse.Namespace, directory: Path, configs: dict[str, Config]) -> dict:
    """In every process of the layout; the result is the same in all.

    Args:
        args: the benchmark's.
        directory: of its checkpoint; pictures are written to it.
        configs: by `LAYOUT_VIEWS`, e.g. group_3.
    """
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
    from tools.benchmark.layout import make_rollouts

    first = next(iter(configs.values()))
    process_groups.initialize(first.parallel)
    hf = read_hf_config(directory / "hf")
    shared = [make_rollouts(args, hf, directory) if process_groups.is_main_rank() else []]
    torch.distributed.broadcast_object_list(shared)
    rows = make_rows(shared[0], [(-1.0) ** i for i in range(len(shared[0]))], directory, first, hf, directory)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = build_model(hf, dtype=dtype, sequence_parallel=first.parallel.sequence_parallel, recompute="none")
    megatron_files.load_weights(directory / "megatron", model)
    wrapped, _ = build_optimizer(model, first.optimizer, dtype)
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

    old = sweep(wrapped, collator_of(first), rows, settings)["original"].log_probs
    constants = {"old_log_probs": old, "ref_log_probs": old}
    collators = {name: collator_of(config) for name, config in configs.items()}

    def step(name: str) -> None:
        objective = configs[name].objective
        wrapped.zero_grad_buffer()
        denominators = denominators_of([counts_of(row) for row in rows], objective)
        papo_step(wrapped, collators[name], rows, constants, settings, loss_recipe(objective, 0), denominators)

    gradients = {}
    for name in configs:
        step(name)
        gradients[name] = torch.cat([parameter.main_grad.flatten() for parameter in model.parameters()])
    clock = shared_machine_clock(args.tp * args.pp)
    seconds = seconds_in_turns({name: partial(step, name) for name in configs}, args.repeat, min, clock)
    found: dict[str, float | str] = {"clock": clock.__name__}
    for name, config in configs.items():
        one_pass = accounting.update(config.objective, config.training)
        work = accounting.work_of(rows, one_pass, config, hf)
        found[f"seconds_{name}"] = collectives.max_over_ranks(seconds[name])
        found[f"tokens_{name}"] = work.tokens
        found[f"peak_bytes_{name}"] = int(collectives.max_over_ranks(peak_bytes(partial(step, name))))
    for number in args.views:
        plain, group = gradients[f"plain_{number}"], gradients[f"group_{number}"]
        difference = float((plain - group).abs().max() / plain.abs().max())
        found[f"gradient_difference_{number}"] = collectives.max_over_ranks(difference)
    process_groups.shutdown()
    return found


def show_views(args: argparse.Namespace, found: dict) -> None:
    print("views  layout  tokens  seconds per update  peak bytes")
    for number in args.views:
        for layout in ("plain", "group"):
            name = f"{layout}_{number}"
            tokens, seconds = found[f"tokens_{name}"], found[f"seconds_{name}"]
            print(f"{number:5}  {layout:6}  {tokens:6}  {seconds:18.2f}  {found[f'peak_bytes_{name}']:>10,}")
        print(f"       largest difference of the two gradients, relative: {found[f'gradient_difference_{number}']:.1e}")
    print(json.dumps(found))

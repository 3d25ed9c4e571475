"""Section checkpoint: a training checkpoint is saved, resumed from, and exported.

After the first of two optimizer steps a checkpoint is saved. From it the second step is made again by a policy that was
loaded: on a CPU to the same bits, on a GPU, whose attention kernels add up in changing orders, to CLOSE of how far the
step moved. Control: the same from the weights alone, without optimizer state.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tools.gpu_acceptance.report import Fact, Line, passed_if
from tools.gpu_acceptance.task import Shape, Task

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_papo.config import Config
    from megatron_papo.model.hf_config import HFConfig
    from megatron_papo.training.passes import Passes
    from megatron_papo.training.policy import Policy

CLOSE = 0.1
"""Of the step. bfloat16 gradients scatter by 1 % from run to run; Adam makes a whole step of the smallest of them."""
CONTROL = 0.3
"""Without its moments Adam steps so much further, or in another direction."""
LEARNING_RATE = 1e-3


def run(task: Task) -> Iterator[Line | Fact]:
    from megatron_papo.checkpoint.logits import TOLERANCE, logits_of
    from megatron_papo.checkpoint.megatron_files import copy_hf_files
    from megatron_papo.distributed import process_groups
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.training.policy import Policy

    hf_dir, megatron_dir = task.checkpoint()
    hf, pictures = read_hf_config(hf_dir), task.output / "pictures_checkpoint"
    places = {name: task.output / "checkpoints" / name for name in ("whole", "weights", "export")}
    shutil.rmtree(task.output / "checkpoints", ignore_errors=True)
    shape = Shape(2, 60, 20) if task.device == "cpu" else Shape(4, 1000, 250)
    config = training_config(task, shape)
    process_groups.initialize(config.parallel)
    passes = passes_of(task, config, hf, pictures, shape)

    policy = Policy(config, hf)
    policy.load(megatron_dir)
    step(policy, passes, 0)
    for name, with_optimizer in (("whole", True), ("weights", False)):
        started = time.perf_counter()
        policy.save(places[name], places[name], with_optimizer)
        copy_hf_files(megatron_dir, places[name])
        if with_optimizer:
            size = sum(file.stat().st_size for file in places[name].rglob("*") if file.is_file())
            seconds = time.perf_counter() - started
            yield Line("a checkpoint with optimizer is saved", "pass", f"{size / 1e6:.0f} MB in {seconds:.1f} s")
    first = weights_of(policy)
    step(policy, passes, 1)
    second = weights_of(policy)
    again = {}
    for name in ("whole", "weights"):
        policy.load(places[name])
        step(policy, passes, 1)
        again[name] = weights_of(policy)
    moved = distance(first, second)
    off = distance(second, again["whole"]) / moved
    limit = 0.0 if task.device == "cpu" else CLOSE
    words = f"{off:.2g} of the step's length off, limit {limit:g}"
    yield Line("the step after it, from the checkpoint", passed_if(off <= limit), words)
    off = distance(second, again["weights"]) / moved
    result = passed_if(off > CONTROL)
    yield Line("control: without optimizer state it is another step", result, f"{off:.2g} of the step's length off")
    del policy
    process_groups.shutdown()
    export(places["whole"], places["export"])
    saved, exported = logits_of(places["whole"]), logits_of(places["export"])
    relative = float((saved - exported).abs().max() / saved.abs().max())
    words = f"its logits by ours and the export's by transformers: {relative:.2g} of the largest, limit {TOLERANCE:g}"
    yield Line("its export is the same model", passed_if(relative <= TOLERANCE), words)
    start = logits_of(hf_dir)
    relative = float((start - exported).abs().max() / saved.abs().max())
    words = f"{relative:.2g} of the largest"
    yield Line("control: the export is not what training began with", passed_if(relative > TOLERANCE), words)
    shutil.rmtree(task.output / "checkpoints")


def training_config(task: Task, shape: Shape) -> "Config":
    """Return a configuration of two optimizer steps with megatron-core's DistributedOptimizer in bfloat16."""
    return task.config(
        "bfloat16",
        [
            *shape.changes,
            "rollout.group_size=3",
            f"rollout.rollout_batch_size={shape.groups}",
            f"training.global_batch_size={shape.groups // 2}",
            "optimizer.distributed=true",
        ],
    )


def passes_of(task: Task, config: "Config", hf: "HFConfig", pictures: Path, shape: Shape) -> "Passes":
    """Return the passes over made rollouts."""
    import torch

    from megatron_papo.distributed import process_groups
    from megatron_papo.training.collator import Collator
    from megatron_papo.training.passes import Passes, PassPlan, split_into_steps

    rows = task.rows(hf, config, pictures, shape)
    steps = split_into_steps(rows, config, 0, 1)
    collator = Collator(config, hf, pictures, with_pixels=True, device=process_groups.device(), dtype=torch.bfloat16)
    return Passes(config, hf, steps, PassPlan.of(config.objective), collator, lambda rollouts: None)


def step(policy: "Policy", passes: "Passes", number: int) -> None:
    """Make one optimizer step. What stays constant in the loss is what the policy says just before it."""
    from megatron_papo.training.loss_recipe import loss_recipe

    of_step, constants = passes.steps[number], passes.sweep_policy(policy.model)[0][number]
    if passes.plan.reference:
        constants["ref_log_probs"] = passes.sweep(policy.model, of_step.own, ["original"])["original"].log_probs
    recipe = loss_recipe(passes.config.objective, number, 1.0)
    passes.update(policy, of_step, constants, recipe, LEARNING_RATE)


def weights_of(policy: "Policy") -> "Tensor":
    """Return all main parameters that the optimizer steps on, in float32 on the CPU."""
    import torch

    groups = policy.optimizer.param_groups
    return torch.cat([weight.detach().float().flatten().cpu() for group in groups for weight in group["params"]])


def distance(first: "Tensor", second: "Tensor") -> float:
    """Return the norm of the difference."""
    return float((first.double() - second.double()).norm())


def export(checkpoint: Path, target: Path) -> None:
    """Convert a training checkpoint to a Hugging Face checkpoint."""
    from megatron_papo.checkpoint.convert import MegatronCheckpoint, megatron_to_hf

    target.mkdir()
    megatron_to_hf(MegatronCheckpoint(checkpoint), target)

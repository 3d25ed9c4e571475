"""Section iteration: one iteration of PAPO on the geometry of Qwen2.5-VL-3B with random weights, as stage 5 computes
it: the sweeps of the reference and the old policy, with and without masked pictures, and an optimizer step.

One process per GPU, data-parallel; where one GPU cannot hold all layers with their optimizer, as many as it can. As a
module of torchrun it is one of the processes: `iteration OUTPUT QUICK` writes what rank 0 found.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.gpu_acceptance.report import Fact, Line, passed_if
from tools.gpu_acceptance.task import ONE_PROCESS, Shape, Task

if TYPE_CHECKING:
    from megatron_papo.config import Config
    from megatron_papo.training.policy import Policy

MODULE = "tools.gpu_acceptance.iteration"
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "papo_g_3b.yaml"
GROUPS_PER_STEP = 8
"""Of five rollouts, on each GPU."""
WORKING_BYTES = 14e9
"""Activations with recompute, NCCL's and CUDA's own."""
LAYER_PARAMETERS, OTHER_PARAMETERS = 77.1e6, 0.98e9
"""Of a decoder layer of 3B; of its vision tower and its embeddings."""
FILE = "iteration.ranks.json"
GEOMETRY = "geometry"


def run(task: Task) -> Iterator[Line | Fact]:
    processes = max(1, task.gpus)
    file = task.output / FILE
    file.unlink(missing_ok=True)
    launcher = ["tools.torchrun", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    arguments = [str(task.output), task.device, "quick" if task.quick else "whole"]
    done = subprocess.run([sys.executable, "-m", *launcher, MODULE, *arguments])
    what = f"an iteration on {processes} GPU(s)" if task.gpus else "an iteration at tiny sizes"
    if done.returncode or not file.exists():
        yield Line(what, "fail", f"ended with status {done.returncode}: see the log")
        return
    found = json.loads(file.read_text())
    yield Fact("iteration", found["shape"])
    for layout, metrics in found["layouts"].items():
        if "peak_memory_bytes" in metrics:
            metrics["planned_bytes"] = planned_bytes(found["settings"][layout], task.output / GEOMETRY)
        said = f"loss {metrics['loss']:.3g}, gradient norm {metrics['gradient_norm']:.3g}"
        yield Line(f"{what}, {layout} layout", passed_if(metrics["moved"]), said)
        yield Fact(f"iteration, {layout} layout", as_words(metrics))
    if processes == 1:
        yield Line("an iteration over several GPUs", "not possible", f"{task.gpus} GPU")


def as_words(metrics: dict[str, float]) -> str:
    """Return time, speed and memory of a step and of the sweeps before it, for people."""
    words = []
    for name, prefix in (("step", ""), ("sweeps", "sweep_")):
        words.append(
            f"{name} {metrics[f'{prefix}seconds']:.2f} s, {metrics[f'{prefix}tokens_per_second']:,.0f} tokens/s"
        )
        if f"{prefix}mfu" in metrics:
            words[-1] += f", MFU {metrics[f'{prefix}mfu']:.1%}"
    if "peak_memory_bytes" in metrics:
        words.append(f"at most {metrics['peak_memory_bytes'] / 1e9:.1f} GB held by tensors")
    if "planned_bytes" in metrics:
        words[-1] += (
            f", where the plan of the fullest micro-batches of such rollouts has {metrics['planned_bytes'] / 1e9:.1f}"
        )
    return "; ".join(words)


def planned_bytes(settings: Sequence[str], model: Path) -> float:
    """Return the most bytes that a plan says tensors hold in sweeps and steps; its own process does not see the GPU.

    Args:
        settings: `section.key=value`, on top of CONFIG.
        model: Directory with the model's config.json.
    """
    words = [sys.executable, "-m", "tools.plan_memory", "--config", str(CONFIG), "--model", str(model), "--json"]
    words += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run([*words, "--rank", "0"], stdout=subprocess.PIPE, text=True, check=True)
    (rank,) = json.loads(done.stdout)["ranks"]
    return float(max(rank["phases"][phase]["peak_bytes"] for phase in ("sweep_policy", "update", "optimizer")))


def geometry(output: Path, device: str, ranks: int) -> tuple[Path, int]:
    """Write a config.json whose model fits, and return its directory and the number of decoder layers."""
    import torch

    from tools.convert.geometry import config_tree

    tree = config_tree("tiny" if device == "cpu" else "3b")
    layers = tree["num_hidden_layers"]
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0] - WORKING_BYTES
        room = free / bytes_per_parameter(ranks) - OTHER_PARAMETERS
        layers = max(1, min(layers, int(room / LAYER_PARAMETERS)))
    directory = output / GEOMETRY
    directory.mkdir(exist_ok=True)
    if ranks == 1 or torch.distributed.get_rank() == 0:
        (directory / "config.json").write_text(json.dumps({**tree, "num_hidden_layers": layers}))
    if ranks > 1:
        torch.distributed.barrier()
    return directory, layers


def longest_of(shape: Shape) -> list[str]:
    """Return settings that admit rollouts of this shape and no longer ones."""
    return [
        f"data.max_prompt_tokens={shape.prompt_tokens}",
        f"data.max_pixels={int(0.9 * shape.prompt_tokens) * 784}",
        f"rollout.max_response_tokens={2 * shape.response_tokens}",
    ]


def bytes_per_parameter(ranks: int) -> float:
    """Return the bytes of weight (2), gradient (4) and this rank's share of the optimizer (12)."""
    return 2 + 4 + 12 / ranks


def measure(output: Path, device: str, quick: bool) -> dict[str, Any]:
    """Return shape and metrics, by layout. All processes call it together."""
    from megatron_papo.config_files import load_config
    from megatron_papo.distributed import process_groups
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.training.policy import Policy

    process_groups.connect()
    ranks = process_groups.world_size()
    directory, layers = geometry(output, device, ranks)
    shape = Shape(2, 60, 20) if device == "cpu" else Shape(2 * ranks * (2 if quick else GROUPS_PER_STEP), 1000, 250)
    task = Task(output, "cuda" if device == "cuda" else "cpu", quick)
    changes = [
        *(ONE_PROCESS[:2]),
        f"parallel.data_parallel_size={ranks}",
        "parallel.sequence_parallel=false",
        f"training.global_batch_size={shape.groups // 2}",
        f"rollout.rollout_batch_size={shape.groups}",
        *shape.changes,
        "data.min_pixels=784",
    ]
    layouts: dict[str, dict[str, float]] = {}
    settings: dict[str, list[str]] = {}
    config = load_config(CONFIG, changes)
    process_groups.initialize(config.parallel)
    hf = read_hf_config(directory)
    policy = Policy(config, hf)
    policy.make_random()
    for layout in ("plain", "group"):
        budget = shape.prompt_tokens + 8 * shape.response_tokens
        of_layout = [f"training.layout={layout}", f"training.max_tokens_per_micro_batch={budget}"]
        layouts[layout] = one_iteration(task, policy, load_config(CONFIG, [*changes, *of_layout]), shape)
        settings[layout] = [*changes, *of_layout, *longest_of(shape)]
    count = sum(parameter.numel() for parameter in policy.model.parameters())
    process_groups.shutdown()
    words = f"{layers} decoder layers, {count / 1e6:,.1f} M parameters, {config.model.dtype}, data-parallel {ranks};"
    words += f" {shape.groups} groups of {config.rollout.group_size}, prompts of {shape.prompt_tokens} tokens,"
    words += f" responses of {shape.response_tokens}, two steps of which the second counts"
    return {"shape": words, "layouts": layouts, "settings": settings}


def one_iteration(task: Task, policy: "Policy", config: "Config", shape: Shape) -> dict[str, float]:
    """Return the metrics of an iteration's sweeps and of its second step, whose kernels have been compiled."""
    import torch

    from megatron_papo.distributed import process_groups
    from megatron_papo.training.accounting import peak_memory
    from megatron_papo.training.collator import Collator
    from megatron_papo.training.loss_recipe import loss_recipe
    from megatron_papo.training.passes import Passes, PassPlan, split_into_steps

    group = process_groups.dp_group()
    pictures = task.output / f"pictures_iteration_{group.rank()}"
    rows = task.rows(policy.hf, config, pictures, shape)
    steps = split_into_steps(rows, config, group.rank(), group.size())
    plan = PassPlan.of(config.objective)
    collator = Collator(
        config, policy.hf, pictures, with_pixels=True, device=process_groups.device(), dtype=policy.dtype
    )
    passes = Passes(config, policy.hf, steps, plan, collator, lambda rollouts: None)
    passes.sweep(policy.model, steps[0].own, ("original",))  # compiles, and prepares the pictures
    passes.sweep(policy.model, steps[1].own, ("masked",))
    peak_memory()

    started = _now()
    of_reference = passes.sweep_reference(policy)
    of_policy, _ = passes.sweep_policy(policy.model)
    seconds = _now() - started
    metrics = {"sweep_seconds": seconds, **passes.account_sweeps(seconds)}
    before = [parameter.detach().clone() for parameter in policy.model.parameters() if parameter.ndim == 1]
    for number, step in enumerate(steps):
        started = _now()
        recipe = loss_recipe(config.objective, number, 1.0)
        update = passes.update(policy, step, of_reference[number] | of_policy[number], recipe, 1e-3)
        seconds = _now() - started
    metrics |= passes.account_step(steps[-1], seconds)
    after = [parameter for parameter in policy.model.parameters() if parameter.ndim == 1]
    moved = all(torch.isfinite(new).all() for new in after) and any(
        not torch.equal(old, new) for old, new in zip(before, after, strict=True)
    )
    loss = {"loss": update.metrics["loss"], "gradient_norm": update.gradient_norm, "moved": float(moved)}
    return metrics | loss | {"seconds": seconds}


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    from megatron_papo.distributed import process_groups

    output, device, size = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    found = measure(output, device, size == "quick")
    if process_groups.is_main_rank():
        (output / FILE).write_text(json.dumps(found))


if __name__ == "__main__":
    from megatron_papo.run.command_line import run as run_command

    run_command(main)

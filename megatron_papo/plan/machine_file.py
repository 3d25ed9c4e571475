"""The machine's part of a preset, configs/SIZE_MACHINE.yaml: layout, servers, and in its comment what a plan says."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_papo.config import Config
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.plan import estimates
from megatron_papo.plan.plan import Plan, Question
from megatron_papo.plan.seconds import GPUS_OF_NODE, seconds_of

PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size", "sequence_parallel")
SERVER = ("replicas", "tensor_parallel_size", "first_gpu")


@dataclass(frozen=True)
class Traced:
    """What of a comment needs a trace, in GB as it is printed."""

    resident: str
    peak: str
    phase: str
    needed: str
    node: str

    @classmethod
    def of(cls, plan: Plan) -> "Traced":
        rank = next(rank for rank in plan.ranks if rank.rank == plan.fullest_rank)
        numbers = (
            rank.phases["resident"].live_bytes,
            rank.phases[rank.fullest].peak_bytes,
            plan.needed_bytes,
            plan.host.total,
        )
        resident, peak, needed, node = (f"{count / 1e9:.1f}" for count in numbers)
        return cls(resident, peak, rank.fullest, needed, node)

    @classmethod
    def read(cls, text: str) -> "Traced":
        """Return what stands in a file that machine_file wrote. Raises UserError for another one."""
        flat = " ".join(line.removeprefix("# ") for line in text.splitlines())
        found = re.search(
            r"holds ([\d.]+) GB all the time and ([\d.]+) GB at most \((\w+)\); with .*? ([\d.]+) of"
            r" .*? host memory of a node: ([\d.]+) GB",
            flat,
        )
        if found is None:
            raise UserError("a comment as tools.plan_memory --write makes it is expected: write the file again")
        resident, peak, phase, needed, node = found.groups()
        return cls(resident, peak, phase, needed, node)


def machine_file(
    config: Config, base: Config, hf: HFConfig, question: Question, traced: Traced, preset: str, command: str
) -> str:
    """Return the file's text.

    Args:
        config: What fits.
        base: What the file is a part of: keys beside layout and servers stand in the file where the two differ.
        hf: The model.
        question: GPUs and usual rollouts.
        traced: Of the plan.
        preset: The configuration that was asked about.
        command: What was asked.
    """
    lines = [*_wrapped(_title(config, hf, question))]
    nodes = config.parallel.world_size // GPUS_OF_NODE + 1
    if not config.server.shares_gpus and config.parallel.world_size >= GPUS_OF_NODE:
        lines.append(f"  sbatch --nodes {nodes} stages/submit.slurm --config {preset}")
    lines += _wrapped(f"Planned, not measured (docs/plan.md), by {command}")
    lines += _wrapped(_memory(config, question, traced))
    lines += _wrapped(_disk(config, hf))
    lines += _wrapped(_time(config, hf, question))
    sections = _tree(config, base).items()
    text = "\n".join(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True) for key, value in sections)
    path = f"  path: {config.model.path}\n"
    text = text.replace(path, f"{path.rstrip()}  # set it to your copy\n")
    return "".join(f"# {line}\n" for line in lines) + text


def _title(config: Config, hf: HFConfig, question: Question) -> str:
    parallel, server = config.parallel, config.server
    layout = (
        f"TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size}"
        f" x DP{parallel.data_parallel_size}"
    )
    servers = f"{server.replicas} x SGLang TP{server.tensor_parallel_size}"
    path = config.model.path
    model = Path(path).name if path else f"A model of {estimates.parameters_of(hf) / 1e9:.2f} G parameters"
    size = f"{question.gpu_bytes / 1e9:.0f} GB"
    if server.shares_gpus:
        return f"{model} on one node of {parallel.world_size} GPUs of {size}, in turns: training {layout}, {servers}."
    if parallel.world_size >= GPUS_OF_NODE:
        nodes = parallel.world_size // GPUS_OF_NODE + 1
        return (
            f"{model} on {nodes} nodes of {GPUS_OF_NODE} GPUs of {size}: {servers} on the first node, training"
            f" {layout} on the others."
        )
    last = server.first_gpu + server.replicas * server.tensor_parallel_size
    return (
        f"{model} on one node of {last} GPUs of {size}: training {layout} on GPUs 0-{parallel.world_size - 1},"
        f" {servers} on GPUs {server.first_gpu}-{last - 1}."
    )


def _memory(config: Config, question: Question, traced: Traced) -> str:
    beside = ", fragmentation and what a server keeps" if config.server.shares_gpus else " and fragmentation"
    return (
        f"Memory: the fullest GPU that trains holds {traced.resident} GB all the time and {traced.peak} GB at most"
        f" ({traced.phase}); with allowances for CUDA, NCCL{beside} {traced.needed} of"
        f" {question.gpu_bytes / 1e9:.0f} GB. Training's host memory of a node: {traced.node} GB."
    )


def _disk(config: Config, hf: HFConfig) -> str:
    parameters, disk = estimates.parameters_of(hf), estimates.disk_bytes(config, hf)
    of_one, export = disk.checkpoint // parameters, disk.export / 1e9
    most = f"{disk.most / 1e12:.1f} TB" if disk.most >= 1e12 else f"{disk.most / 1e9:.0f} GB"
    return (
        f"Disk: a checkpoint with optimizer is {parameters / 1e9:.2f} G parameters x {of_one} bytes ="
        f" {disk.checkpoint / 1e9:.0f} GB, an export x {disk.export // parameters} bytes ="
        f" {export:.{1 if export < 10 else 0}f} GB. With keep_checkpoints {_kept(config.keep_checkpoints)},"
        f" keep_exports {_kept(config.keep_exports)} and keep_best {config.keep_best} at most {most}."
    )


def _kept(number: int | None) -> str:
    return "null" if number is None else str(number)


def _time(config: Config, hf: HFConfig, question: Question) -> str:
    _, flops = estimates.work_of_iteration(config, hf, question.usual)
    seconds = seconds_of(config, hf, question.usual, flops, question.gpu_bytes, question.mfu, question.gpu)
    return (
        f"Time: about {seconds.iteration:.0f} s an iteration on {question.gpu} (sampling {seconds.sampling:.0f},"
        f" training {seconds.training:.0f} at {question.mfu:.0%} of the peak, saving {seconds.saving:.0f}), with"
        f" rollouts of {question.usual.prompt_tokens} + {question.usual.response_tokens} tokens: for comparing layouts."
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def _tree(config: Config, base: Config) -> dict[str, Any]:
    """Return what the file sets."""
    parallel = {key: getattr(config.parallel, key) for key in PARALLEL}
    if config.parallel.vision_tower != base.parallel.vision_tower:
        parallel["vision_tower"] = config.parallel.vision_tower
    server: dict[str, Any] = {key: getattr(config.server, key) for key in SERVER}
    if config.server.shares_gpus:
        server["shares_gpus"] = True
    tree: dict[str, Any] = {}
    for key in ("checkpoint_every", "save_while_sampling", "export_directory"):
        if getattr(config, key) != getattr(base, key):
            tree[key] = getattr(config, key)
    model: dict[str, Any] = {"path": base.model.path}
    if config.model.recompute != base.model.recompute:
        model["recompute"] = config.model.recompute
    tree |= {"model": model, "parallel": parallel, "server": server}
    if config.rollout.concurrency != base.rollout.concurrency:
        tree["rollout"] = {"concurrency": config.rollout.concurrency}
    sizes = ("max_tokens_per_micro_batch", "micro_batch_size", "log_prob_micro_batch_size")
    training = {
        key: getattr(config.training, key)
        for key in sizes
        if getattr(config.training, key) != getattr(base.training, key)
    }
    return tree | ({"training": training} if training else {})


def write_machine_file(file: Path, text: str) -> None:
    """Write the file whole. Raises UserError where that is not possible."""
    try:
        file.write_text(text)
    except OSError as error:
        raise UserError(
            f"--write {file}: cannot be written ({error.strerror}): name a file in a directory that is there"
        )

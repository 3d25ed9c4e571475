"""The plan of a configuration: what GPUs, nodes and the disk must hold, whether it fits, what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_papo.config import Config
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.plan import estimates
from megatron_papo.plan.estimates import Counts, DiskBytes, Flops, ServerShare
from megatron_papo.plan.fake_device import Place
from megatron_papo.plan.layers import Traces, told
from megatron_papo.plan.memory import CONTEXT_BYTES, NCCL_BYTES, HostBytes, RankPlan, allowance, host_bytes, rank_plan
from megatron_papo.plan.seconds import Seconds, seconds_of
from megatron_papo.plan.workload import Lengths


@dataclass(frozen=True)
class Question:
    """What is asked of a configuration."""

    usual: Lengths
    """Of the rollouts that tokens, FLOPs and seconds are counted with."""
    gpu_bytes: int
    ranks: Sequence[int]
    exact: bool
    """Trace all layers instead of a few."""
    mfu: float
    gpu: str
    """A name of accounting.PEAK_FLOPS."""


@dataclass(frozen=True)
class Plan:
    """What a configuration needs. Bytes throughout."""

    ranks: list[RankPlan]
    fullest_rank: int
    needed_bytes: int
    """Of the fullest GPU: its peak with the allowance for what is not counted, and what a server keeps of it."""
    gpu_bytes: int
    host: HostBytes
    disk: DiskBytes
    tokens: Counts
    flops: Flops
    server: ServerShare
    seconds: Seconds
    fits: bool
    problems: list[str]
    """What does not fit, and which key to change."""


def plan_of(config: Config, hf: HFConfig, question: Question, traces: Traces) -> Plan:
    """Return the plan of a configuration.

    Args:
        config: whole; its layout divides the model.
        hf: the model.
        question: what is asked, of ranks that the layout has.
        traces: makes them, such as processes.in_processes, or cache.cached of it.
    """
    config = as_on_gpus(config)
    found = dict(zip(question.ranks, told(traces, config, hf, question.ranks, question.exact), strict=True))
    ranks = [rank_plan(numbers, Place.of(rank, config.parallel)) for rank, numbers in found.items()]
    needs = {plan.rank: needed(plan, config) + beside(config) for plan in ranks}
    fullest = max(ranks, key=lambda plan: needs[plan.rank])
    tokens, flops = estimates.work_of_iteration(config, hf, question.usual)
    server = estimates.server_share(config, hf, question.gpu_bytes)
    problems = [*problems_of_training(fullest, needs[fullest.rank], config, question.gpu_bytes)]
    problems += problems_of_server(server, config, question.gpu_bytes)
    return Plan(
        ranks=ranks,
        fullest_rank=fullest.rank,
        needed_bytes=needs[fullest.rank],
        gpu_bytes=question.gpu_bytes,
        host=host_bytes(found[fullest.rank], config, estimates.parameters_of(hf)),
        disk=estimates.disk_bytes(config, hf),
        tokens=tokens,
        flops=flops,
        server=server,
        seconds=seconds_of(config, hf, question.usual, flops, question.gpu_bytes, question.mfu, question.gpu),
        fits=not problems,
        problems=problems,
    )


def as_on_gpus(config: Config) -> Config:
    """Return the configuration with what GPUs choose by default."""
    if config.optimizer.distributed is not None:
        return config
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"distributed": True})})


def first_ranks(config: Config) -> list[int]:
    """Return the first rank of the first, second and last pipeline stage: tensor- and data-parallel ranks hold as much
    as it, and a stage between the second and the last has fewer micro-batches under way than the second."""
    parallel = config.parallel
    step = parallel.tensor_model_parallel_size * parallel.data_parallel_size
    last = parallel.pipeline_model_parallel_size - 1
    return [stage * step for stage in sorted({0, min(1, last), last})]


def needed(plan: RankPlan, config: Config) -> int:
    """Return what a rank's GPU must have, without what a server keeps of it."""
    peak = plan.phases[plan.fullest].peak_bytes
    return peak + allowance(peak, config)


def beside(config: Config) -> int:
    """Return what a server that has given up its memory keeps of a GPU that trains."""
    return int(estimates.SERVER_BESIDE) if config.server.shares_gpus else 0


def problems_of_training(plan: RankPlan, need: int, config: Config, gpu_bytes: int) -> list[str]:
    """Return what does not fit on the fullest GPU, and which keys change that, the one with most effect first."""
    if need <= gpu_bytes:
        return []
    phase = plan.fullest
    return [
        f"rank {plan.rank} (tensor {plan.tensor}, pipeline {plan.pipeline}, data {plan.data}) needs"
        f" {need / 1e9:.1f} GB in phase {phase}, {(need - gpu_bytes) / 1e9:.1f} GB more than a GPU has: "
        + ", or ".join(f"--set {change}" for change in changes(config, phase))
    ]


def changes(config: Config, phase: str) -> list[str]:
    """Return settings that lower a phase's peak, the one with most effect first."""
    parallel, training = config.parallel, config.training
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    of_layout = [
        f"parallel.tensor_model_parallel_size={2 * tensor} --set parallel.sequence_parallel=true",
        f"parallel.data_parallel_size={2 * parallel.data_parallel_size} (more GPUs)",
        f"parallel.pipeline_model_parallel_size={2 * stages} (more GPUs)",
    ]
    if phase not in ("update", "sweep_reference", "sweep_policy", "sweep_masked"):
        return of_layout
    of_passes = []
    if config.model.recompute == "none" and phase == "update":
        of_passes.append("model.recompute=full")
    if tensor > 1 and not parallel.sequence_parallel:
        of_passes.append("parallel.sequence_parallel=true")
    if training.layout == "group" and training.max_tokens_per_micro_batch is not None:
        of_passes.append(f"training.max_tokens_per_micro_batch={training.max_tokens_per_micro_batch // 2}")
    elif phase == "update" and training.micro_batch_size > 1:
        of_passes.append(f"training.micro_batch_size={training.micro_batch_size // 2}")
    elif phase != "update" and training.log_prob_micro_batch_size > 1:
        of_passes.append(f"training.log_prob_micro_batch_size={training.log_prob_micro_batch_size // 2}")
    return of_passes + of_layout


def problems_of_server(server: ServerShare, config: Config, gpu_bytes: int) -> list[str]:
    """Return what does not fit on a GPU that samples. Where it also trains, the training process is still there, with
    its context and its communicators."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    problems = []
    if server.cache_tokens < longest:
        tensor = 2 * config.server.tensor_parallel_size
        problems.append(
            f"a server has room for {server.cache_tokens} tokens beside {server.weights / 1e9:.1f} GB of weights on"
            f" each of its GPUs, and one rollout may have {longest}: --set server.tensor_parallel_size={tensor}"
        )
    others = estimates.SERVER_BESIDE + (CONTEXT_BYTES + NCCL_BYTES if server.shares_gpus else 0)
    most = int(100 * (gpu_bytes - others) / gpu_bytes) / 100
    if server.bytes + others > gpu_bytes:
        problems.append(
            f"server.memory_fraction {config.server.memory_fraction} leaves"
            f" {(gpu_bytes - server.bytes) / 1e9:.1f} GB of a GPU, and {others / 1e9:.1f} GB are taken to be needed"
            f" beside weights and cache: --set server.memory_fraction={max(most, 0.01):.2f}"
        )
    return problems

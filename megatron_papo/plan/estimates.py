"""What follows from a configuration by arithmetic: tokens, FLOPs, disk, the servers' share, and seconds under stated
assumptions."""

import math
from dataclasses import dataclass

from megatron_papo.checkpoint.name_map import pieces
from megatron_papo.config import Config
from megatron_papo.config_notes import bytes_of_checkpoint, bytes_on_disk
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.plan.workload import Lengths, rows_of
from megatron_papo.training import accounting
from megatron_papo.training.passes import PassPlan

BANDWIDTH = 2.0e12
"""Bytes a second that decoding reads of a GPU's memory: of an H100's 3.35e12, what kernels reach. An assumption."""
STEP_OF_DECODING = 0.004
"""Seconds of a decoding step beside reading: launches, sampling. An assumption."""
SWITCH_SECONDS = 30.0
"""Between sampling and training on the same GPUs: loading a checkpoint and the servers' weights. An assumption."""
SERVER_BESIDE = 3.0e9
"""Bytes that an SGLang server keeps of a GPU when it has given up weights and cache. An assumption."""


def parameters_of(hf: HFConfig) -> int:
    """Return the number of parameters of the whole model."""
    return sum(math.prod(piece.megatron_shape) for piece in pieces(hf))


@dataclass(frozen=True)
class DiskBytes:
    checkpoint: int
    """With optimizer."""
    export: int
    iteration: int
    """Written in an iteration."""
    most: int
    """Of all checkpoints and exports at once, by the cadence."""


def disk_bytes(config: Config, hf: HFConfig) -> DiskBytes:
    """Return what a run writes and keeps, its rollouts not counted (below 0.1 MB each)."""
    parameters = parameters_of(hf)
    checkpoint = bytes_of_checkpoint(config, parameters)
    export = parameters * (2 if config.model.dtype == "bfloat16" else 4)
    return DiskBytes(checkpoint, export, checkpoint + export, bytes_on_disk(config, parameters))


@dataclass(frozen=True)
class Counts:
    """Of one iteration, over all ranks."""

    sampled: int
    """Tokens of the responses."""
    trained: int
    """Tokens of prompts and responses, each rollout once."""
    computed: int
    """Tokens through the decoder, all passes."""


@dataclass(frozen=True)
class Flops:
    """Of one iteration, over all ranks (training/accounting.py)."""

    sweeps: int
    updates: int

    @property
    def total(self) -> int:
        return self.sweeps + self.updates


def work_of_iteration(config: Config, hf: HFConfig, lengths: Lengths) -> tuple[Counts, Flops]:
    """Return tokens and FLOPs of an iteration whose rollouts are all of these lengths."""
    training, rollout = config.training, config.rollout
    count = rollout.rollout_batch_size // training.global_batch_size
    steps = [rows_of(hf, config, lengths, training.global_batch_size)] * count
    plan = PassPlan.of(config.objective)
    of_sweeps, of_updates = (
        accounting.step_accounting(steps, config, hf, passes, 1.0)
        for passes in (plan.passes_at_start(count, training), plan.passes_of_step(config))
    )
    rows = rollout.rollout_batch_size * rollout.group_size
    tokens = Counts(
        sampled=rows * lengths.response_tokens,
        trained=rows * (lengths.prompt_tokens + lengths.response_tokens),
        computed=int(of_sweeps["tokens_computed"] + of_updates["tokens_computed"]),
    )
    return tokens, Flops(int(of_sweeps["model_flops"]), int(of_updates["model_flops"]))


@dataclass(frozen=True)
class ServerShare:
    """Of one GPU that serves."""

    gpus: int
    """That serve; of each node, where servers stand on several."""
    shares_gpus: bool
    bytes: int
    """Weights and cache."""
    weights: int
    cache_tokens: int
    """That fit into the cache of one server."""


def server_share(config: Config, hf: HFConfig, gpu_bytes: int) -> ServerShare:
    """Return what SGLang takes of a GPU while it samples."""
    server, text = config.server, hf.text
    bytes_of = int(server.memory_fraction * gpu_bytes)
    weights = 2 * parameters_of(hf) // server.tensor_parallel_size
    cached = 4 * text.num_layers * max(1, text.num_kv_groups // server.tensor_parallel_size) * text.head_dim
    return ServerShare(
        gpus=server.replicas * server.tensor_parallel_size,
        shares_gpus=server.shares_gpus,
        bytes=bytes_of,
        weights=weights,
        cache_tokens=max(0, bytes_of - weights) // cached,
    )


@dataclass(frozen=True)
class Seconds:
    """Of one iteration, and of the run: estimates."""

    sampling: float
    training: float
    iteration: float
    hours: float
    gpu_hours: float
    gpus: int
    mfu: float
    """Assumed: share of the GPU's peak that training reaches."""
    gpu: str


def seconds_of(config: Config, hf: HFConfig, lengths: Lengths, flops: Flops, mfu: float, gpu: str) -> Seconds:
    """Return how long an iteration may take, and the run.

    Training: FLOPs over GPUs x peak x mfu, longer by the pipeline's bubble. Sampling: each decoding step reads the
    weights and what the cache holds of the requests under way.
    """
    parallel, server = config.parallel, config.server
    peak = accounting.PEAK_FLOPS[gpu]
    stages = parallel.pipeline_model_parallel_size
    rollouts = config.training.global_batch_size * config.rollout.group_size // parallel.data_parallel_size
    if config.training.max_tokens_per_micro_batch is not None and config.training.layout == "group":
        size = lengths.prompt_tokens + config.rollout.group_size * lengths.response_tokens
        groups = max(1, config.training.max_tokens_per_micro_batch // size)
        micro_batches = max(1, rollouts // (groups * config.rollout.group_size))
    else:
        micro_batches = max(1, rollouts // config.training.micro_batch_size)
    bubble = (micro_batches + stages - 1) / micro_batches
    training = flops.total / (parallel.world_size * peak * mfu) * bubble
    requests = config.rollout.rollout_batch_size * config.rollout.group_size / server.replicas
    under_way = min(requests, config.rollout.concurrency / server.replicas)
    weights = 2 * parameters_of(hf) / server.tensor_parallel_size
    cached = 4 * hf.text.num_layers * hf.text.num_kv_groups * hf.text.head_dim / server.tensor_parallel_size
    held = under_way * cached * (lengths.prompt_tokens + lengths.response_tokens / 2)
    step = (weights + held) / BANDWIDTH + STEP_OF_DECODING
    sampling = math.ceil(requests / max(under_way, 1)) * lengths.response_tokens * step
    iteration = sampling + training + (SWITCH_SECONDS if server.shares_gpus else 0)
    gpus = parallel.world_size + (0 if server.shares_gpus else server.replicas * server.tensor_parallel_size)
    hours = iteration * config.iterations / 3600
    return Seconds(sampling, training, iteration, hours, hours * gpus, gpus, mfu, gpu)

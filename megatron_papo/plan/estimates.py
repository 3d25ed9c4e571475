"""What follows from a configuration by arithmetic: tokens, FLOPs, disk, the servers' share. Seconds: seconds.py."""

import math
from dataclasses import dataclass
from functools import lru_cache

from megatron_papo.checkpoint.name_map import pieces
from megatron_papo.config import Config
from megatron_papo.config_notes import bytes_of_checkpoint, bytes_on_disk
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.plan.workload import Lengths, rows_of
from megatron_papo.training import accounting
from megatron_papo.training.passes import PassPlan

SERVER_BESIDE = 3.0e9
"""Bytes that an SGLang server keeps of a GPU beside weights and cache: context, graphs. An assumption."""


@lru_cache
def parameters_of(hf: HFConfig) -> int:
    """Return the number of parameters of the whole model."""
    return sum(math.prod(piece.megatron_shape) for piece in pieces(hf))


def bytes_of_number(config: Config) -> int:
    """Return the bytes of a weight or an activation, in training and on the servers."""
    return 2 if config.model.dtype == "bfloat16" else 4


@dataclass(frozen=True)
class DiskBytes:
    checkpoint: int
    """With optimizer."""
    export: int
    iteration: int
    """Written in an iteration of a resident run, on average over those that checkpoint_every writes whole and those
    between them."""
    most: int
    """Of all checkpoints and exports at once, by the cadence."""


def disk_bytes(config: Config, hf: HFConfig) -> DiskBytes:
    """Return what a run writes and keeps, its rollouts not counted (below 0.1 MB each)."""
    parameters, every = parameters_of(hf), config.checkpoint_every
    checkpoint, weights = bytes_of_checkpoint(config, parameters), parameters * bytes_of_number(config)
    whole = checkpoint + weights + (weights if config.save_while_sampling else 0)
    between = 0 if config.export_directory is not None else 2 * weights  # as Megatron's, and the export
    written = (whole + (every - 1) * between) // every
    return DiskBytes(checkpoint, weights, written, bytes_on_disk(config, parameters))


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
    """Return tokens and FLOPs of an iteration whose rollouts are all of these lengths. A frozen vision tower encodes
    each picture once, and its masked one: in the sweeps."""
    training, rollout = config.training, config.rollout
    count = rollout.rollout_batch_size // training.global_batch_size
    steps = [rows_of(hf, config, lengths, range(training.global_batch_size))] * count
    plan = PassPlan.of(config.objective)
    encoded = []
    if "vision_tower" in config.model.freeze and lengths.image_tokens:
        kinds = 2 if config.objective.uses_masked_image else 1
        encoded = [lengths.picture] * (kinds * lengths.pictures * rollout.rollout_batch_size)
    of_sweeps = accounting.step_accounting(
        steps, config, hf, plan.passes_at_start(count, training), 1.0, encoded=encoded
    )
    of_updates = accounting.step_accounting(steps, config, hf, plan.passes_of_step(config), 1.0)
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
    server = config.server
    bytes_of = int(server.memory_fraction * gpu_bytes)
    weights = bytes_of_number(config) * parameters_of(hf) // server.tensor_parallel_size
    return ServerShare(
        gpus=server.replicas * server.tensor_parallel_size,
        shares_gpus=server.shares_gpus,
        bytes=bytes_of,
        weights=weights,
        cache_tokens=max(0, bytes_of - weights) // cached_bytes(config, hf),
    )


def cached_bytes(config: Config, hf: HFConfig) -> int:
    """Return the bytes of a token's keys and values on each GPU of a server."""
    text = hf.text
    groups = max(1, text.num_kv_groups // config.server.tensor_parallel_size)
    return 2 * bytes_of_number(config) * text.num_layers * groups * text.head_dim

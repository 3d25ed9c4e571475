"""How long an iteration takes, under assumptions that are stated: good enough to compare layouts, not for a calendar.

Training: the FLOPs of accounting.py, with those of recomputation, at a share of the GPU's peak; no micro-batch faster
than its kernels are launched; what tensor- and data-parallel ranks exchange; the pipeline's bubble. Sampling: each
decoding step reads the weights and what the cache holds; before it the server prepares the pictures of every request
anew. Not in it: evaluations, starts, what dynamic sampling throws away.
"""

import math
from dataclasses import dataclass

from megatron_papo.config import Config
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.plan.estimates import (
    Flops,
    bytes_of_number,
    cached_bytes,
    disk_bytes,
    parameters_of,
    server_share,
)
from megatron_papo.plan.workload import Lengths, copies_in_update
from megatron_papo.training import accounting
from megatron_papo.training.passes import PassPlan

GPUS_OF_NODE = 8
BANDWIDTH = 2.0e12
"""Bytes a second that decoding reads of a GPU's memory: of an H100's 3.35e12, what kernels reach. An assumption."""
STEP_OF_DECODING = 0.004
"""Seconds of a decoding step beside reading: launches, sampling. An assumption."""
LINK, NETWORK = 150.0e9, 25.0e9
"""Bytes a second that a GPU sends in a collective, within a node and between nodes: of NVLink's 450e9 and of 50e9 a
GPU. Assumptions."""
KERNELS_OF_LAYER = 120
"""Of a forward pass through a layer of decoder or tower; a backward pass has twice as many."""
LAUNCH = 6.0e-6
"""Seconds of the host for a kernel. An assumption."""
DISK = 5.0e9
"""Bytes a second that a node writes of checkpoints, and reads: its own NVMe drives. An assumption."""
PICTURES = 7.0
"""That a server prepares in a second; SGLang's own source says 4.5 to 9.3 (base_processor.py, full-page pictures)."""
SWITCH_SECONDS = 10.0
"""Between sampling and training on the same GPUs, beside reading the checkpoint. An assumption."""


@dataclass(frozen=True)
class Seconds:
    """Of one iteration, and of the run: estimates."""

    sampling: float
    training: float
    saving: float
    """Checkpoint and export; where GPUs are shared also reading the checkpoint again."""
    iteration: float
    hours: float
    gpu_hours: float
    gpus: int
    mfu: float
    """Assumed: share of its peak that a GPU reaches in matrix products."""
    gpu: str


def seconds_of(
    config: Config, hf: HFConfig, lengths: Lengths, flops: Flops, gpu_bytes: int, mfu: float, gpu: str
) -> Seconds:
    """Return how long an iteration may take, and the run.

    Args:
        config, hf: layout and model.
        lengths: of every rollout.
        flops: of an iteration.
        gpu_bytes: of a GPU, for the servers' cache.
        mfu: share of its peak that a GPU reaches.
        gpu: a name of accounting.PEAK_FLOPS.
    """
    parallel, server = config.parallel, config.server
    sampling = _sampling(config, hf, lengths, gpu_bytes)
    training = _training(config, hf, lengths, flops, mfu * accounting.PEAK_FLOPS[gpu])
    disk = disk_bytes(config, hf)
    nodes = -(-parallel.world_size // GPUS_OF_NODE)
    moved = disk.iteration + (disk.checkpoint if server.shares_gpus else 0)
    saving = moved / (DISK * nodes) + (SWITCH_SECONDS if server.shares_gpus else 0)
    iteration = sampling + training + saving
    gpus = parallel.world_size + (0 if server.shares_gpus else server.replicas * server.tensor_parallel_size)
    hours = iteration * config.iterations / 3600
    return Seconds(sampling, training, saving, iteration, hours, hours * gpus, gpus, mfu, gpu)


def _sampling(config: Config, hf: HFConfig, lengths: Lengths, gpu_bytes: int) -> float:
    server, rollout = config.server, config.rollout
    share = server_share(config, hf, gpu_bytes)
    fitting = share.cache_tokens // (lengths.prompt_tokens + lengths.response_tokens)
    requests = rollout.rollout_batch_size * rollout.group_size / server.replicas
    under_way = max(1.0, min(requests, rollout.concurrency / server.replicas, fitting))
    held = under_way * cached_bytes(config, hf) * (lengths.prompt_tokens + lengths.response_tokens / 2)
    step = (share.weights + held) / BANDWIDTH + STEP_OF_DECODING
    asked = rollout.rollout_batch_size * (rollout.group_size + 1)  # + 1: the prompt alone, before
    pictures = lengths.pictures * asked if lengths.image_tokens else 0
    return pictures / (PICTURES * server.replicas) + math.ceil(requests / under_way) * lengths.response_tokens * step


def _training(config: Config, hf: HFConfig, lengths: Lengths, flops: Flops, reached: float) -> float:
    """Return the seconds of all sweeps and updates. reached: FLOP/s of a GPU."""
    plan, recomputed = PassPlan.of(config.objective), config.model.recompute == "full"
    steps = config.rollout.rollout_batch_size // config.training.global_batch_size
    copies = copies_in_update(config)
    before_first = sum(plan.count_at_start(number) for number in range(steps)) / steps
    kinds = [  # FLOPs, how often over the rollouts of a step, forward passes' worth of kernels, exchanges; twins
        (flops.sweeps, before_first, 1, 1, 1),
        (flops.updates * (4 / 3 if recomputed else 1), plan.count_of_steps, 3 + recomputed, 2 + recomputed, copies),
    ]
    total = 0.0
    for of_kind, times, kernels, exchanges, twins in kinds:
        if not times:
            continue
        micro_batches, groups = micro_batches_of_step(config, lengths, twins, sweeps=kernels == 1)
        stages, tensor = config.parallel.pipeline_model_parallel_size, config.parallel.tensor_model_parallel_size
        passes = steps * times * micro_batches * config.parallel.data_parallel_size
        computing = of_kind / passes / (tensor * reached)
        launching = kernels * KERNELS_OF_LAYER * (hf.text.num_layers + hf.vision.depth) * LAUNCH
        exchanging = exchanges * _exchanged(config, hf, lengths, groups * twins) / LINK
        micro_batch = (max(computing, launching) + exchanging) / stages
        total += steps * times * (micro_batches + stages - 1) * micro_batch
    return total + steps * _reduced(config, hf)


def micro_batches_of_step(config: Config, lengths: Lengths, copies: int, sweeps: bool) -> tuple[int, float]:
    """Return how many micro-batches a step's share of a rank is, and how many prompts each of them has."""
    training, parallel, size = config.training, config.parallel, config.rollout.group_size
    groups = training.global_batch_size / parallel.data_parallel_size
    if training.layout == "group" and training.max_tokens_per_micro_batch is not None:
        tokens = copies * (lengths.prompt_tokens + size * lengths.response_tokens)
        count = math.ceil(groups / max(1, training.max_tokens_per_micro_batch // tokens))
        return count, groups / count
    rollouts = training.log_prob_micro_batch_size if sweeps else training.micro_batch_size
    return math.ceil(groups * size / rollouts), float(rollouts)


def _exchanged(config: Config, hf: HFConfig, lengths: Lengths, prompts: float) -> float:
    """Return the bytes that a tensor-parallel rank sends in a forward pass of a micro-batch with so many prompts: two
    all-reduces a layer, as a ring or as gather and scatter."""
    tensor = config.parallel.tensor_model_parallel_size
    if tensor == 1:
        return 0.0
    responses = config.rollout.group_size if config.training.layout == "group" else 1
    tokens = prompts * (lengths.prompt_tokens + responses * lengths.response_tokens)
    all_reduce = 2 * (tensor - 1) / tensor * bytes_of_number(config)
    sent = 2 * hf.text.num_layers * tokens * hf.text.hidden_size * all_reduce
    images = prompts * lengths.image_tokens
    if config.parallel.vision_tower == "spread":
        return sent + images * hf.text.hidden_size * all_reduce
    return sent + 2 * hf.vision.depth * images * hf.vision.spatial_merge_size**2 * hf.vision.hidden_size * all_reduce


def _reduced(config: Config, hf: HFConfig) -> float:
    """Return the seconds in which data-parallel ranks add up a step's gradients (float32) and share the weights."""
    parallel = config.parallel
    tensor, data = parallel.tensor_model_parallel_size, parallel.data_parallel_size
    own = parameters_of(hf) / (tensor * parallel.pipeline_model_parallel_size)
    link = LINK if tensor * data <= GPUS_OF_NODE else NETWORK
    return own * (4 + bytes_of_number(config)) * (data - 1) / data / link

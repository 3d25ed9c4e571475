"""What traces say about a rank's GPU and its node's host memory, phase by phase."""

from dataclasses import dataclass

from megatron_papo.checkpoint.hashed_files import BLOCK
from megatron_papo.checkpoint.torch_dist_writer import CHUNK_BYTES
from megatron_papo.config import Config
from megatron_papo.plan.fake_device import Place
from megatron_papo.plan.trace import Numbers
from megatron_papo.training.collator import KEPT_PICTURE_BYTES

CONTEXT_BYTES = 1.0e9
"""Of a GPU: CUDA's context, the workspaces of cuBLAS and of attention kernels. Not counted, an allowance."""
NCCL_BYTES = 1.0e9
"""Of a GPU, where there are peers: the buffers of its communicators. An allowance."""
FRAGMENTED = 0.03
"""Share of the peak that the allocator holds on top, its segments being expandable. An allowance."""
PROCESS_BYTES = 4.0e9
"""Of the host, for a training process: python, torch, CUDA's libraries. An allowance."""
GPUS_OF_NODE = 8


@dataclass(frozen=True)
class PhaseBytes:
    """Of one rank's GPU."""

    live_bytes: int
    """At the end of the phase."""
    peak_bytes: int


@dataclass(frozen=True)
class MicroBatchWork:
    """What one micro-batch of a phase asks of a GPU."""

    kernels: int
    communication_bytes: dict[str, int]
    """Of the arguments, by collective."""


@dataclass(frozen=True)
class RankPlan:
    """One process."""

    rank: int
    tensor: int
    pipeline: int
    data: int
    parameters: int
    phases: dict[str, PhaseBytes]
    micro_batches: dict[str, MicroBatchWork]

    @property
    def fullest(self) -> str:
        """Return the phase with the highest peak."""
        return max(self.phases, key=lambda name: self.phases[name].peak_bytes)


def save_bytes() -> int:
    """Return the bytes of host memory that saving a checkpoint takes on each rank, whatever the model and its layout
    (checkpoint/megatron_files.py): a copy of a part, and the blocks of the file that is written. Nothing is gathered
    on the GPU."""
    return CHUNK_BYTES + 4 * BLOCK


def rank_plan(numbers: Numbers, place: Place) -> RankPlan:
    """Return what a trace says about a rank."""
    phases: dict[str, PhaseBytes] = {}
    for name in numbers:
        phase, _, rest = name.partition("/")
        if rest.endswith("/peak"):
            peak = max(numbers[name], phases[phase].peak_bytes if phase in phases else 0)
            phases[phase] = PhaseBytes(numbers[name.removesuffix("peak") + "live"], peak)
    update, after = phases["update"], phases.pop("optimizer")
    phases["update"], phases["optimizer"] = PhaseBytes(update.live_bytes, update.peak_bytes), after
    resident = phases["resident"].live_bytes
    phases["save"] = PhaseBytes(resident, resident)
    phases["export"] = PhaseBytes(resident, resident)
    work = {}
    for name in phases:
        if f"{name}/kernels" in numbers and name not in ("build", "resident", "optimizer"):
            start = f"{name}/communication/"
            bytes_of = {key.removeprefix(start): value for key, value in numbers.items() if key.startswith(start)}
            work[name] = MicroBatchWork(numbers[f"{name}/kernels"], bytes_of)
    return RankPlan(
        rank=place.rank,
        tensor=place.tensor,
        pipeline=place.pipeline,
        data=place.data,
        parameters=numbers["parameters"],
        phases=phases,
        micro_batches=work,
    )


def allowance(peak: int, config: Config) -> int:
    """Return what a GPU needs on top of what tensors hold."""
    peers = NCCL_BYTES if config.parallel.world_size > 1 else 0
    return int(CONTEXT_BYTES + peers + FRAGMENTED * peak)


@dataclass(frozen=True)
class HostBytes:
    """Of the fullest node, all of its training processes together."""

    processes_on_node: int
    reference: int
    """The reference's weights, pinned."""
    save: int
    """While a checkpoint is saved."""
    pictures: int
    """Prepared pictures that are kept, at most; of a frozen vision tower also what it says about them."""
    servers: int
    """Weights of servers that have given up their GPUs."""
    exports: int
    """In export_directory."""
    processes: int
    total: int


def host_bytes(numbers: Numbers, config: Config, parameters: int) -> HostBytes:
    """Return what a node needs, by a rank of the fullest kind. parameters: of the whole model."""
    count = min(GPUS_OF_NODE, config.parallel.world_size)
    reference = count * numbers["pinned"] if config.objective.uses_reference else 0
    save = count * save_bytes()
    pictures, processes = count * KEPT_PICTURE_BYTES, int(count * PROCESS_BYTES)
    if "vision_tower" in config.model.freeze:
        pictures += int(count * config.training.encoded_picture_gigabytes * 1e9)
    weights = parameters * (2 if config.model.dtype == "bfloat16" else 4)
    servers = config.server.replicas * weights if config.server.shares_gpus else 0
    exports = 0 if config.export_directory is None else 3 * weights  # two, and one that is being made
    total = reference + save + pictures + processes + servers + exports
    return HostBytes(count, reference, save, pictures, servers, exports, processes, total)

"""Process groups: the only reader of what a launcher sets (RANK and its kind). NCCL on CUDA machines, gloo elsewhere.

torch and megatron are imported inside the functions that need them, so that asking for the rank costs nothing.
"""

import ctypes
import os
import signal
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from megatron_papo.config import ParallelConfig
from megatron_papo.distributed import gpus
from megatron_papo.errors import UserError

if TYPE_CHECKING:
    import torch


PATIENCE = timedelta(hours=2)
"""How long ranks wait for the first one, which verifies and hashes files: NCCL's ten minutes are too short for 72B."""

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What every launcher sets. Fewer of them are left over from something else, and mean nothing."""
OF_TORCHRUN = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME")
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Processes of one machine find each other over loopback, unless the environment says otherwise."""

LAUNCHER_PID = "PAPO_LAUNCHER_PID"
"""Where tools.torchrun says which process it is."""

_has_joined = False  # a process group: see leave()


def _is_launched() -> bool:
    """Return whether a launcher started this process, together with others: all that it sets is there, and fits."""
    given = [os.environ.get(name, "") for name in LAUNCHED]
    numbers = [value for name, value in zip(LAUNCHED, given, strict=True) if name != "MASTER_ADDR"]
    if not all(given) or not all(value.isascii() and value.isdigit() for value in numbers):
        return False
    return int(given[0]) < int(given[1])


def forget_left_over() -> None:
    """Remove a launcher's variables from the environment of a process that no launcher started: libraries would read
    them."""
    if _is_launched():
        return
    for name in list(os.environ):
        if name in LAUNCHED + OF_TORCHRUN or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


def world_size() -> int:
    """Return the number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if _is_launched() else 1


def rank() -> int:
    """Return the number of this process among all, from 0."""
    return int(os.environ["RANK"]) if _is_launched() else 0


def local_world_size() -> int:
    """Return how many of them are on this machine: all, where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if _is_launched() else 1


def is_main_rank() -> bool:
    """Return whether this is the one process of a run that prints and publishes."""
    return rank() == 0


def initialize(parallel: ParallelConfig) -> None:
    """Make the process groups of a layout; after destroy() it may be called again with another layout of the same
    processes.

    Raises UserError if the launcher started another number of processes than parallel asks for.
    """
    _check_world_size(parallel)
    from megatron_papo.distributed import cpu_backend

    cpu_backend.install()
    connect()
    import torch

    # Beside NCCL's nobody uses them, and over several nodes they wait for ever where a host's name means 127.0.1.1.
    make_groups(parallel, gloo=not torch.cuda.is_available())


def make_groups(parallel: ParallelConfig, gloo: bool) -> None:
    """Make megatron-core's groups of a layout among the processes that have joined.

    Args:
        parallel: The layout.
        gloo: Data-parallel groups for tensors on the host, too.
    """
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        distributed_timeout_minutes=int(PATIENCE.total_seconds()) // 60,
        create_gloo_process_groups=gloo,
    )
    # The inference tracker leaves the CUDA generator alone, which is right because Qwen2.5-VL has no dropout.
    tensor_parallel.model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)


def connect() -> None:
    """Join the processes that the launcher started and pick this one's device; nothing to do where that has happened.

    Raises UserError where this machine has GPUs that torch cannot use.
    """
    # Lets tensor-parallel communication overlap with computation; CUDA reads it once, when it starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    import torch

    die_with_launcher()
    gpus.require_usable_gpus()
    # cuDNN's attention plans for some 50 ms whenever it meets a new shape, and here almost every shape is new.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if torch.cuda.is_available():
        expand_segments()
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if _is_launched() else 0)
    else:
        # More threads than cores per process only get into each other's way: two threads per rank were 20 times slower.
        torch.set_num_threads(1)
    if not torch.distributed.is_initialized():
        _join_process_group()


def expand_segments() -> None:
    """Have torch's CUDA allocator grow its segments, unless the environment sets the allocator up: every micro-batch
    has another length, and fixed segments would be cut into pieces that fit none.

    To be called before anything lies on the GPU.
    """
    import torch

    if not any(os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def die_with_launcher() -> None:
    """End with the launcher: torchrun gives its workers sessions of their own; were it killed, they would go on and
    write into the next attempt's output."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        # Taken out: a launcher that this process starts is another one.
        if os.environ.pop(LAUNCHER_PID, None) not in (None, str(os.getppid())):
            print("error: the launcher that started this process has ended", file=sys.stderr, flush=True)
            os._exit(1)  # it was killed before this process could ask to end with it


def _check_world_size(parallel: ParallelConfig) -> None:
    if world_size() == parallel.world_size:
        return
    sizes = (
        f"tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size}"
        f" x data {parallel.data_parallel_size}"
    )
    left_over = "" if "TORCHELASTIC_RUN_ID" in os.environ or world_size() == 1 else " (says WORLD_SIZE)"
    raise UserError(
        f"{world_size()} processes were started{left_over}, the parallel section asks for {parallel.world_size}"
        f" ({sizes}): start with torchrun --nproc-per-node {parallel.world_size} {_this_program()} ..., or over several"
        f" nodes with --nnodes times --nproc-per-node = {parallel.world_size}"
    )


def _this_program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"-m -- {spec.name}" if spec else sys.argv[0]


def _join_process_group() -> None:
    import torch

    global _has_joined
    _has_joined = True
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    device_id = torch.device("cuda", torch.cuda.current_device()) if cuda else None
    if world_size() > 1:
        torch.distributed.init_process_group(backend, timeout=PATIENCE, device_id=device_id)
        return
    for name, value in LOOPBACK.items():
        os.environ.setdefault(name, value)
    store = torch.distributed.HashStore()  # one process needs no meeting place, nor a port for one
    torch.distributed.init_process_group(
        backend, timeout=PATIENCE, store=store, rank=0, world_size=1, device_id=device_id
    )


def destroy() -> None:
    """Forget the layout and end its groups, each of which has threads and sockets; the processes stay connected."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    unset_num_microbatches_calculator()
    parallel_state.destroy_global_memory_buffer()
    for group in parallel_state._global_process_group_list or []:
        if group is not None and group != torch.distributed.GroupMember.NON_GROUP_MEMBER:
            torch.distributed.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def shutdown() -> None:
    """End the process group, if there is one: call it before leaving, also after an error."""
    import torch

    if torch.distributed.is_initialized():
        destroy()
        torch.distributed.destroy_process_group()


def disconnect() -> None:
    """End the process group of connect()."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Exit with a status; a process that has joined a process group ends at once, without Python's finalization.

    A library may keep a group alive after its end (DeepSpeed does), and a gloo thread that drops its last tensor while
    Python finalizes aborts the process ("terminate called without an active exception"; one run in fourteen with two
    ranks on two cores).
    """
    if not _has_joined:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_first_stage() -> bool:
    """Return whether this rank is of the first pipeline stage, which holds the vision tower and the embeddings."""
    from megatron.core import parallel_state

    return parallel_state.is_pipeline_first_stage()


def is_last_stage() -> bool:
    """Return whether this rank is of the last pipeline stage, which holds the output layer and sees the logits."""
    from megatron.core import parallel_state

    return parallel_state.is_pipeline_last_stage()


def tp_group() -> "torch.distributed.ProcessGroup":
    """Return the tensor-parallel group of this rank."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def dp_group() -> "torch.distributed.ProcessGroup":
    """Return the data-parallel group of this rank."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group()


def has_gloo_groups() -> bool:
    """Return whether there are data-parallel groups for tensors on the host."""
    from megatron.core import parallel_state

    return parallel_state._DATA_PARALLEL_GROUP_GLOO is not None


def single_rank_group() -> "torch.distributed.ProcessGroup":
    """Return a group of this rank alone: megatron-core's context-parallel one, there being no context parallelism."""
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group()
    if group.size() != 1:
        raise RuntimeError(f"the context-parallel group has {group.size()} ranks, 1 was expected")
    return group


def device() -> "torch.device":
    """Return where this rank's tensors live."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

"""Each piece of cpu_backend, taken away in turn, in a process of its own: prints what megatron-core then says, as
JSON."""

import contextlib
import json

from megatron_papo.run.command_line import run


def main() -> None:
    import torch

    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed import cpu_backend, process_groups

    originals = {"current_device": torch.cuda.current_device, "synchronize": torch.cuda.synchronize}
    import megatron.core.tensor_parallel.random as rng

    rng_originals = {"_get_cuda_rng_state": rng._get_cuda_rng_state, "_set_cuda_rng_state": rng._set_cuda_rng_state}
    process_groups.initialize(ParallelConfig())

    @contextlib.contextmanager
    def without(owner, name, original):
        installed = getattr(owner, name)
        setattr(owner, name, original)
        yield
        setattr(owner, name, installed)

    @contextlib.contextmanager
    def without_mode():
        cpu_backend._mode.__exit__(None, None, None)
        yield
        cpu_backend._mode.__enter__()

    cases = {
        "current_device": (rotary, without(torch.cuda, "current_device", originals["current_device"])),
        "synchronize": (checkpoint_writer, without(torch.cuda, "synchronize", originals["synchronize"])),
        "_get_cuda_rng_state": (recompute, without(rng, "_get_cuda_rng_state", rng_originals["_get_cuda_rng_state"])),
        "_set_cuda_rng_state": (
            recompute_queues_nothing,
            without(rng, "_set_cuda_rng_state", rng_originals["_set_cuda_rng_state"]),
        ),
        "device argument": (gradient_norm, without_mode()),
        "type name": (clip, without_mode()),
    }
    results = {}
    for name, (action, removed) in cases.items():
        installed = outcome(action)
        with removed:
            results[name] = {"with": installed, "without": outcome(action)}
    results["twice"] = {"with": outcome(cpu_backend.install), "without": ""}
    process_groups.shutdown()
    print(json.dumps(results))


def outcome(action) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def rotary():
    from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding

    MultimodalRotaryEmbedding(kv_channels=8, rotary_percent=1.0)


def checkpoint_writer():
    import torch
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    FileSystemWriterAsync.preload_tensors([("file", "key", ([], [(None, torch.zeros(2))]))], True)


def recompute():
    import torch
    from megatron.core import tensor_parallel

    x = torch.ones(3, requires_grad=True)
    tensor_parallel.checkpoint(lambda y: y * 2, False, x).sum().backward()


def recompute_queues_nothing():
    """Without CUDA the original keeps every state for the day CUDA starts: memory that grows with each layer of each
    step."""
    import torch

    before = len(torch.cuda._queued_calls)
    recompute()
    if len(torch.cuda._queued_calls) > before:
        raise RuntimeError("calls were queued for CUDA")


def gradient_norm():
    import torch
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    from megatron_papo.distributed import process_groups

    get_grad_norm_fp32([torch.ones(3)], grad_stats_parallel_group=process_groups.tp_group())


def clip():
    import torch
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=2.0)


if __name__ == "__main__":
    run(main)

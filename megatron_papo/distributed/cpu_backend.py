"""megatron-core on a CPU: one torch function mode and four replaced names. Does nothing where CUDA is available.

megatron-core has no CPU backend: it writes device="cuda" into its schedules and optimizers and calls
torch.cuda.current_device() for its buffers. tests/distributed/test_cpu_backend.py shows for each piece that the pinned
release (0.16.1) still needs it, so that an upgrade which does not is noticed. megatron-core 0.19 needs
torch.cuda.current_stream as well.
"""

from collections.abc import Callable, Sequence

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_mode: "CudaAsCpu | None" = None


class CudaAsCpu(TorchFunctionMode):
    """While entered, a request for a CUDA tensor makes a CPU tensor, and a CPU tensor answers with its CUDA type name.

    The mechanism of torch.set_default_device: it acts in this thread only and replaces no function of torch.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:  # tied embeddings with pipeline parallelism
            return args[0]
        if (
            func is torch.Tensor.type and len(args) == 1 and not kwargs
        ):  # optimizers and clipping compare the name of the type
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":  # schedules, optimizers, clipping
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **kwargs)


def install() -> None:
    """Make megatron-core usable in this process on a machine without CUDA. Calling it again changes nothing."""
    global _mode
    if torch.cuda.is_available() or _mode is not None:
        return
    import megatron.core.tensor_parallel.random as megatron_random

    # buffers, rotary frequencies, gathers; a device where torch gives an int, which serves as well as an argument
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_, **__: None  # point-to-point communication, dist_checkpointing.save
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # recompute
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _mode = CudaAsCpu()
    _mode.__enter__()

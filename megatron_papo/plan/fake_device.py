"""A GPU that has sizes and no memory: tensors on it are torch's fake ones, which know shape and dtype, and no values.

    with FakeDevice(rank=3, parallel=config.parallel, ledger=ledger):
        ...  # the package's own code, as that rank of the layout would run it

Inside, whatever asks for a CUDA tensor gets a fake one, which says that it is on a GPU; whatever asks for a CPU tensor
gets a real one: what is computed from sizes alone (windows, positions, micro-batches) is really computed, as it is on a
GPU machine. A copy between the two moves no values. The process group is torch's fake one: this rank of the layout,
whose collectives return at once.

Fake tensors are CPU tensors to torch itself: in a build without CUDA autograd refuses others. So torch chooses its
kernels for CPUs; where those differ in memory from a GPU's, `GpuView` puts it right. What is replaced of torch and
megatron-core, because a value is read that is not there or a peer asked, stands with its reasons in `_replacements`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from megatron_papo.config import ParallelConfig
from megatron_papo.errors import UserError
from megatron_papo.plan.ledger import Ledger

DEVICE = torch.device("cpu")
"""What code inside gets where it asks which device is its own. Given as an argument, this object means the device; the
word "cpu", and no device at all, mean the host."""


@dataclass(frozen=True)
class Place:
    """Where a rank stands in a layout, by megatron-core's order."""

    rank: int
    tensor: int
    pipeline: int
    data: int

    @classmethod
    def of(cls, rank: int, parallel: ParallelConfig) -> "Place":
        tensor, data = parallel.tensor_model_parallel_size, parallel.data_parallel_size
        return cls(rank, rank % tensor, rank // (tensor * data), rank // tensor % data)


@dataclass(frozen=True)
class Replacement:
    """A name of somebody else's module, and what stands there meanwhile."""

    module: Any
    name: str
    value: Any


class GpuView(TorchFunctionMode):
    """Makes tensors fake that are asked of the device, and has fake ones behave as a GPU's."""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]  # a getter of C
            return isinstance(first, FakeTensor)
        if func is torch.Tensor.type and isinstance(first, FakeTensor) and len(args) == 1 and not kwargs:
            return func(first).replace("torch.", "torch.cuda.", 1)
        if func is torch.tensor and isinstance(first, list):
            args = (_read(first), *args[1:])
        if func is F.scaled_dot_product_attention and isinstance(kwargs.get("attn_mask"), CausalBias):
            # A name for what flash attention does by itself; on a CPU it would be written out.
            kwargs |= {"attn_mask": None, "is_causal": True}
        if kwargs.pop("pin_memory", False):
            return self._pinned(args[0], kwargs["dtype"])
        if func in (torch.Tensor.to, torch.Tensor.cuda):
            return self._moved(func, args, kwargs)
        device = kwargs.get("device")
        if device is not None and _is_own(device):
            with self.fake:
                return func(*args, **{**kwargs, "device": DEVICE})
        return func(*args, **kwargs)

    def _pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return host memory that is counted and not taken: one element stands for all."""
        tensor = torch.empty(1, dtype=dtype).expand(shape)
        self.ledger.pinned += tensor.numel() * tensor.element_size()
        return tensor

    def _moved(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensor, *rest = args
        wanted = [value for value in (*rest, kwargs.get("device")) if isinstance(value, torch.device | str)]
        to_device = func is torch.Tensor.cuda or any(_is_own(value) for value in wanted)
        if to_device and not isinstance(tensor, FakeTensor):
            tensor = self.fake.from_tensor(tensor)
            self.ledger.hold([tensor])
        if func is torch.Tensor.cuda:
            return tensor
        rest = [value for value in rest if not isinstance(value, torch.device | str)]
        kwargs.pop("device", None)
        return func(tensor, *rest, **kwargs) if rest or kwargs else tensor


def _read(values: Any) -> Any:
    """Return numbers for tensors that the host reads one by one: Ledger's answer to any."""
    if isinstance(values, list):
        return [_read(value) for value in values]
    return 1.0 if isinstance(values, FakeTensor) else values


def _is_own(device: object) -> bool:
    """Say whether an argument means the device and not the host."""
    return isinstance(device, torch.device | int) or str(device).startswith("cuda")


class FakeDevice:
    """While entered, this process is a rank of a layout on a fake GPU."""

    def __init__(self, rank: int, parallel: ParallelConfig, ledger: Ledger):
        self.rank, self.parallel, self.ledger = rank, parallel, ledger
        self.view = GpuView(ledger)
        self.expect([])

    def __enter__(self) -> Self:
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        from megatron_papo.distributed import process_groups

        with ExitStack() as stack:
            for replacement in self._replacements():
                _replace(stack, replacement)
            dist.init_process_group("fake", rank=self.rank, world_size=self.parallel.world_size, store=FakeStore())
            stack.callback(process_groups.shutdown)
            process_groups.make_groups(self.parallel, gloo=False)
            stack.enter_context(self.view)
            stack.enter_context(self.ledger)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _replacements(self) -> list[Replacement]:
        """Return what is replaced of others' code, each with its reason."""
        import megatron.core.tensor_parallel.random as megatron_random
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        return [
            # Asked for the device of buffers, weights and gradients.
            Replacement(torch.cuda, "current_device", lambda: DEVICE),
            # Nothing runs beside this thread.
            Replacement(torch.cuda, "synchronize", lambda *_, **__: None),
            # The optimizer asks all ranks which parameters they have: their layers are as many as this one's.
            Replacement(torch.distributed, "all_gather_object", _everyone_like_me),
            # The shapes that pipeline stages tell each other would be read from a tensor.
            Replacement(P2PCommunicator, "_communicate_shapes", self._shapes),
            # A subclass of tensors cannot be made where operations are counted; this one holds no numbers.
            Replacement(CausalBias, "__new__", _causal_bias),
            # Torch leaves modes out of a backward pass; what is computed again there is on the device, too.
            Replacement(
                megatron_random.CheckpointFunction,
                "backward",
                staticmethod(self._in_view(megatron_random.CheckpointFunction.backward)),
            ),
            # Recomputing restores the generator's state; there is no dropout, so it does not matter.
            Replacement(megatron_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
            Replacement(megatron_random, "_set_cuda_rng_state", lambda *_, **__: None),
        ]

    def _in_view(self, function: Callable) -> Callable:
        def in_view(*args: Any) -> Any:
            with self.view:
                return function(*args)

        return in_view

    def expect(self, shapes: Sequence[list[int]]) -> None:
        """Say what the stages next to this one are going to send: [s, b, h] of each micro-batch, in order."""
        self._from_before, self._from_after = iter(shapes), iter(shapes)

    def _shapes(self, send_next: object, send_prev: object, recv_prev: bool, recv_next: bool) -> Any:
        nothing = [0, 0, 0]
        return next(self._from_before) if recv_prev else nothing, next(self._from_after) if recv_next else nothing


def _replace(stack: ExitStack, replacement: Replacement) -> None:
    """Put something in a name's place until the stack is left. Raises UserError where the name is gone."""
    module, name = replacement.module, replacement.name
    if not hasattr(module, name):
        where = getattr(module, "__name__", str(module))
        raise UserError(f"plan: {where} has no {name} in this release: install the versions of requirements.txt")
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, replacement.value)


def _causal_bias(kind: type[torch.Tensor], *_: object) -> torch.Tensor:
    with _disable_current_modes():
        return torch.Tensor._make_subclass(kind, torch.empty(0))


def _everyone_like_me(objects: list, value: object, group: object = None) -> None:
    objects[:] = [value] * len(objects)

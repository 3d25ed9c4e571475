"""Which storages of a fake device exist, from the operation that makes them to their release: bytes held, now and at
most."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK = 512
"""CUDA's caching allocator hands out multiples of so many bytes."""
NO_KERNEL = frozenset(
    "view _unsafe_view detach slice transpose t permute unsqueeze squeeze split split_with_sizes alias expand"
    " as_strided select unbind empty empty_like empty_strided reshape new_empty new_empty_strided"
    " _local_scalar_dense".split()
)
"""Operations that launch no kernel."""


@dataclass
class Stretch:
    """What happened between two marks."""

    peak: int = 0
    """Most bytes held at once."""
    live: int = 0
    """Bytes held at its end."""
    kernels: int = 0
    communication: Counter[str] = field(default_factory=Counter)
    """Bytes of the arguments, by collective."""


class Ledger(TorchDispatchMode):
    """Counts while entered. Only fake tensors lie on the device: real ones are the host's.

    What the host reads of a device tensor is 1.0 where it holds floating-point numbers, and `integer` elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.pinned = 0
        """Bytes of host memory that the device can copy from."""
        self.stretches: dict[str, Stretch] = {}
        """By name, in order of their first mark; what is marked again goes on."""
        self.integer = 1
        """What the host reads next: the number of image tokens of a micro-batch is the one such number of a step."""
        self._times = 1
        self._sizes: dict[int, int] = {}
        self._now = self.mark("start")

    @property
    def phase(self) -> str:
        """The first word of the name of the present stretch."""
        return next(name for name, stretch in self.stretches.items() if stretch is self._now).partition("/")[0]

    def mark(self, name: str) -> Stretch:
        """Begin a stretch, and return it."""
        self._now = self.stretches.setdefault(name, Stretch())
        self._now.peak = max(self._now.peak, self.live)
        self._now.live = self.live
        return self._now

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Count towards a stretch, and afterwards again towards the one before."""
        before = self._now
        self.mark(name)
        yield
        self._now = before
        before.peak = max(before.peak, self.live)

    @contextmanager
    def counted(self, times: int) -> Iterator[None]:
        """Have kernels and communication count so many times."""
        self._times = times
        yield
        self._times = 1

    def hold(self, tensors: Sequence[torch.Tensor]) -> None:
        """Count these, where they are on the device and not counted yet."""
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                self._track(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name()
        if name == "aten::_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else self.integer
        if name == "aten::copy_" and isinstance(args[1], FakeTensor) and not isinstance(args[0], FakeTensor):
            return args[0]  # to the host: what arrives there has no values
        out = _in_place(func, args) if name in IN_PLACE_COLLECTIVES else func(*args, **(kwargs or {}))
        if not name.startswith("prim::"):
            self._count(name, args)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, FakeTensor):
                self._track(tensor)
        return out

    def _count(self, name: str, args: tuple) -> None:
        room, _, short = name.partition("::")
        if room == "c10d":
            tensors = (part for arg in args for part in (arg if isinstance(arg, list | tuple) else [arg]))
            self._now.communication[short.strip("_")] += self._times * sum(
                tensor.nbytes for tensor in tensors if isinstance(tensor, FakeTensor)
            )
        if short.partition(".")[0] not in NO_KERNEL:
            self._now.kernels += self._times

    def _track(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._sizes[key] = size
        self.live += size
        self._now.live = self.live
        self._now.peak = max(self._now.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._sizes.pop(key, None)
        self.live -= size
        self._now.live = self.live


IN_PLACE_COLLECTIVES = ("c10d::reduce_scatter_tensor_coalesced_", "c10d::allgather_into_tensor_coalesced_")
"""torch has no kernel of these for fake tensors. They take no memory of their own."""


def _in_place(func: Callable, args: tuple) -> object:
    """Return what a collective returns that has written into its arguments: a finished Work."""
    group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
    return torch.ops.c10d.barrier(torch.zeros(1), group, [], False, -1)

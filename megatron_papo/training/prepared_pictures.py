"""Pictures as the vision tower wants them: opened, resized and masked by threads before they are asked for, kept as
bytes, normalised where the model is."""

import os
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from megatron_papo.distributed.transfer import to_device
from megatron_papo.pictures import preprocess

Prepare = Callable[[], list[Tensor]]
"""Makes uint8 [patches, 588] of each of a prompt's pictures: preprocess.to_patch_bytes."""
AHEAD = 2
"""So many prompts for each thread are prepared, or being prepared, before they are asked for."""
MOST_THREADS = 8


class PreparedPictures:
    """The prompts' pictures, each prepared once while there is room. Only one thread may ask."""

    def __init__(self, max_bytes: int, threads: int):
        """Begin with none.

        Args:
            max_bytes: of host memory, for what is kept; what does not fit is prepared again when it is asked for again.
            threads: that prepare.
        """
        self._max_bytes, self._ahead = max_bytes, AHEAD * threads
        self._pool = ThreadPoolExecutor(threads, "pictures")
        self._kept: dict[Hashable, list[Tensor]] = {}
        self._bytes = 0
        self._expected: deque[tuple[Hashable, Prepare]] = deque()
        self._coming: dict[Hashable, Future[list[Tensor]]] = {}

    def expect(self, wanted: Mapping[Hashable, Prepare]) -> None:
        """Say what is going to be asked for, in this order, in place of what was said before."""
        for future in self._coming.values():
            future.cancel()
        self._coming.clear()
        self._expected = deque((key, prepare) for key, prepare in wanted.items() if key not in self._kept)
        self._start()

    def of(self, key: Hashable, prepare: Prepare) -> list[Tensor]:
        """Return a prompt's pictures. Raises what preparing them raised.

        Args:
            key: tells them from all others.
            prepare: makes them.
        """
        if key in self._kept:
            return self._kept[key]
        future = self._coming.pop(key, None)
        self._start()  # the threads go on while this one waits
        made = prepare() if future is None else future.result()
        size = sum(tensor.nbytes for tensor in made)
        if self._bytes + size <= self._max_bytes:
            self._kept[key], self._bytes = made, self._bytes + size
        return made

    def _start(self) -> None:
        while self._expected and len(self._coming) < self._ahead:
            key, prepare = self._expected.popleft()
            self._coming[key] = self._pool.submit(prepare)


def threads_for(ranks_here: int) -> int:
    """Return how many threads prepare pictures for one of so many processes of this machine."""
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // ranks_here))


def normalised(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [patches, 1176] pixel values of uint8 [patches, 588], on their device: the bits of preprocess.to_patches.

    Every level of a channel has one value, which is looked up: no device divides.
    """
    levels = torch.from_numpy(preprocess.normalised_levels())
    channels, count = levels.shape
    table = to_device(levels.to(dtype).flatten(), patches.device)
    offsets = to_device(torch.arange(0, channels * count, count, dtype=torch.int32), patches.device)
    index = patches.unflatten(1, (channels, -1)) + offsets[:, None]
    values = table.index_select(0, index.flatten()).view(index.shape)
    return values.unsqueeze(2).expand(-1, -1, preprocess.TEMPORAL, -1).flatten(1)

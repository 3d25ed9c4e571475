"""What a frozen vision tower says about pictures: each is encoded once, and kept on the host for the sweeps, steps and
iterations that show it again.

Each picture is encoded by itself, so that what comes out depends on it alone: not on its neighbours in a micro-batch,
nor on what is kept already. A run that was killed, or keeps nothing, therefore sees the same bits.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from megatron_papo.training.rows import Grid


class EncodedPictures:
    """The encoded pictures of this rank; the tensor-parallel ranks of the first stage ask for the same in the same
    order, since the tower is theirs together."""

    def __init__(self, encode: Callable[[Tensor, Grid], Tensor], max_bytes: int):
        """Begin with none.

        Args:
            encode: from [patches, 1176] of one picture and its grid to what is kept of it; without gradient.
            max_bytes: of host memory. What nobody has asked for longest leaves it first.
        """
        self._encode, self._max_bytes = encode, max_bytes
        self._kept: OrderedDict[Hashable, list[Tensor]] = OrderedDict()
        self._bytes = 0
        self._just_encoded: list[Grid] = []

    def knows(self, key: Hashable) -> bool:
        """Say whether the encoded pictures of a prompt are kept."""
        return key in self._kept

    def of(self, key: Hashable, patches: Callable[[], Sequence[Tensor]], grids: Sequence[Grid]) -> list[Tensor]:
        """Return the encoded pictures of a prompt.

        Args:
            key: tells these pictures from all others.
            patches: makes [patches, 1176] of each on the tower's device, where they are not kept.
            grids: of each.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        with torch.no_grad():
            encoded = [self._encode(of_picture, grid) for of_picture, grid in zip(patches(), grids, strict=True)]
        self._just_encoded += grids
        self._keep(key, encoded)
        return encoded

    def take_encoded(self) -> list[Grid]:
        """Return the grids of what was encoded since the call before."""
        grids, self._just_encoded = self._just_encoded, []
        return grids

    def forget(self) -> None:
        """Keep none: the tower has other weights."""
        self._kept.clear()
        self._bytes = 0

    def _keep(self, key: Hashable, encoded: list[Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in encoded)
        if size > self._max_bytes:
            return
        while self._bytes + size > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= sum(tensor.nbytes for tensor in oldest)
        self._kept[key] = [tensor.to("cpu", copy=True) for tensor in encoded]
        self._bytes += size

"""Boxes: parts of a row-major tensor that are a range on every axis, as torch_dist checkpoints hold them.

Pure functions on offsets and sizes.

A data-parallel rank's part of a parameter under DistributedOptimizer is a range of the flattened parameter, which is no
box. It is cut into the few boxes that it consists of, each of which lies in one piece in the range.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Self


@dataclass(frozen=True)
class Box:
    """Offsets and sizes on each axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    def moved(self, origin: tuple[int, ...]) -> Self:
        """Return the same box in a tensor in which this one's tensor begins at `origin`."""
        return type(self)(tuple(a + b for a, b in zip(origin, self.offsets, strict=True)), self.sizes)

    def below(self, index: int) -> Self:
        """Return the box in a tensor with an axis more in front, of which it takes one index."""
        return type(self)((index, *self.offsets), (1, *self.sizes))


def of_flat_range(first: int, last: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """Return the boxes that make up the values [first, last) of a flattened row-major tensor, in their order.

    At most 2 n - 1 for n axes: for a matrix the rest of a row, whole rows, the beginning of a row.
    """
    if first >= last:
        return
    if not shape:
        yield Box((), ())
    elif len(shape) == 1:
        yield Box((first,), (last - first,))
    else:
        inner = shape[1:]
        row = prod(inner)
        (top, begun), (bottom, left) = divmod(first, row), divmod(last, row)
        if top == bottom:
            yield from (box.below(top) for box in of_flat_range(begun, left, inner))
            return
        if begun:
            yield from (box.below(top) for box in of_flat_range(begun, row, inner))
            top += 1
        if top < bottom:
            yield Box((top, *[0] * len(inner)), (bottom - top, *inner))
        yield from (box.below(bottom) for box in of_flat_range(0, left, inner))


def of_at_most(limit: int, box: Box) -> Iterator[Box]:
    """Return a box cut into such of at most `limit` values, in the order in which its values lie."""
    if box.numel <= limit:
        yield box
        return
    inner = box.numel // box.sizes[0]
    step = max(1, limit // inner)
    for start in range(0, box.sizes[0], step):
        size = min(step, box.sizes[0] - start)
        part = Box((box.offsets[0] + start, *box.offsets[1:]), (size, *box.sizes[1:]))
        if part.numel <= limit:
            yield part
        else:  # a row of its own is too long
            row = Box(part.offsets[1:], part.sizes[1:])
            yield from (below.below(part.offsets[0]) for below in of_at_most(limit, row))


def common_part(one: Box, other: Box) -> Box | None:
    """Return what two boxes of a tensor share; None where that is nothing."""
    offsets, sizes = [], []
    for start, size, other_start, other_size in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True):
        first, last = max(start, other_start), min(start + size, other_start + other_size)
        if first >= last:
            return None
        offsets.append(first)
        sizes.append(last - first)
    return Box(tuple(offsets), tuple(sizes))

"""The comparison of any two checkpoints, tensor by tensor, in bounded memory."""

from collections.abc import Callable, Iterator

import torch

from megatron_papo.checkpoint.convert import MegatronCheckpoint, rows_at_once
from megatron_papo.checkpoint.hashed_files import new_tensor_hash, tensor_bytes
from megatron_papo.checkpoint.hf_files import HFCheckpoint, TensorInfo

Checkpoint = HFCheckpoint | MegatronCheckpoint
"""As convert.open_checkpoint returns it."""


def differences(
    first: Checkpoint, second: Checkpoint, progress: Callable[[int], object] = lambda count: None
) -> Iterator[str]:
    """Return one line per tensor in which two opened checkpoints differ: in presence, dtype, shape or any bit.

    progress: called with the bytes of the first one that were compared.
    """
    for name in sorted(first.tensors.keys() ^ second.tensors.keys()):
        yield f"{name}: only in {(first if name in first.tensors else second).directory}"
    for name in _in_reading_order(first, second):
        info, other = first.tensors[name], second.tensors[name]
        if info.shape != other.shape:
            yield f"{name}: {_kind(info)} against {_kind(other)}"
            continue
        largest, count, hashes = _compare(name, info, first, second, progress)
        what = f"{_kind(info)} against {_kind(other)}" if info.dtype != other.dtype else "values differ"
        if info.dtype != other.dtype or count:
            extent = f"{count} of {torch.Size(info.shape).numel()} values, at most by {largest:.3g}"
            yield f"{name}: {what}, {extent}, xxh3 {hashes[0]} {hashes[1]}"


def _in_reading_order(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Return the names that both have, so that a Megatron checkpoint reads each piece once."""
    leading = second if isinstance(second, MegatronCheckpoint) else first
    return [name for name in leading.tensors if name in first.tensors and name in second.tensors]


def _kind(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def _compare(
    name: str, info: TensorInfo, first: Checkpoint, second: Checkpoint, progress: Callable[[int], object]
) -> tuple[float, int, list[str]]:
    """Compare one tensor block by block.

    Returns the largest absolute difference, how many values differ in any bit or in their number, and both hashes.
    """
    largest, count, hashes = 0.0, 0, (new_tensor_hash(), new_tensor_hash())
    rows = info.shape[0] if info.shape else 1
    step = rows_at_once(info.shape, 8) if info.shape else 1  # differences are taken in float64
    for start in range(0, rows, step):
        part = (start, min(start + step, rows)) if info.shape else None
        a, b = first.read(name, part), second.read(name, part)
        for value, tensor in zip(hashes, (a, b)):
            value.update(tensor_bytes(tensor))
        if a.dtype != b.dtype or tensor_bytes(a) != tensor_bytes(b):
            same = a.double() == b.double() if a.dtype != b.dtype else _bits(a) == _bits(b)
            count += int((~same).sum())
            difference = (a.double() - b.double()).abs()[~same]
            largest = max(largest, float(difference.max())) if difference.numel() else largest
        progress(a.nbytes)
    return largest, count, [value.hexdigest() for value in hashes]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])

"""megatron-core's torch_dist checkpoints read piece by piece, without a model and without process groups.

What any layout saved is read here. Nothing untrusted is unpickled: `.metadata` is a pickle by its format and is read
with the dozen classes that belong in it.
"""

import os
import pickle
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from megatron_papo.checkpoint.boxes import Box, common_part
from megatron_papo.checkpoint.chunk_data import ChunkData, find_data
from megatron_papo.checkpoint.hashed_files import (
    BLOCK,
    open_for_reading,
    read_into,
    tensor_bytes,
)
from megatron_papo.checkpoint.hf_files import TensorInfo
from megatron_papo.errors import UserError
from megatron_papo.reading import read_json, reading, shown
from megatron_papo.run.manifest import require_weights

_AGAIN = "restore it or make it again"


class TorchDistCheckpoint:
    """A torch_dist directory opened for reading. Raises UserError if it is foreign, damaged or truncated."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        require_weights(self.directory)
        self.common = _read_common(self.directory)
        self.metadata = _read_metadata(self.directory / ".metadata")
        self.tensors: dict[str, TensorInfo] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        with reading(self.directory / ".metadata", _AGAIN):
            self._read_table()
            _check_sizes(self.directory, self.metadata)

    def _read_table(self) -> None:
        places = {
            (index.fqn, tuple(index.offset)): place
            for index, place in self.metadata.storage_data.items()
            if index.offset is not None
        }
        for key, entry in self.metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.tensors[key] = TensorInfo(entry.properties.dtype, tuple(entry.size))
                self._chunks[key] = [_Chunk(part, places.get((key, tuple(part.offsets)))) for part in entry.chunks]
                for chunk in self._chunks[key]:
                    inside = [
                        0 <= at <= at + size <= end
                        for at, size, end in zip(chunk.box.offsets, chunk.box.sizes, entry.size, strict=True)
                    ]
                    if not all(inside):
                        raise ValueError(f"a part of {key} lies outside of it")

    def require_plain(self) -> None:
        """Raise UserError where something else than a tensor is stored: megatron-core would unpickle it."""
        others = sorted(str(key) for key in self.metadata.state_dict_metadata.keys() - self.tensors.keys())
        if others:
            raise UserError(
                f"{self.directory}: {shown(others[0])} is no tensor but an object, which can run code: {_AGAIN}"
            )

    def chunks(self, key: str) -> list[tuple[tuple[int, ...], tuple[int, ...], str]]:
        """Return (offsets, sizes, file) of the parts in which a tensor was saved."""
        return [(chunk.box.offsets, chunk.box.sizes, chunk.place.relative_path) for chunk in self._placed(key)]

    def _placed(self, key: str) -> "list[_Chunk]":
        """Return the parts of a tensor. Raises UserError where .metadata does not say in which file one is."""
        if any(chunk.unplaced for chunk in self._chunks[key]):
            raise UserError(f"{self.directory}: .metadata does not say where a part of {key} is: {_AGAIN}")
        return self._chunks[key]

    def checksums(self, key: str) -> list[list[int]]:
        """Return, for each part in which a tensor was saved, its offsets and sizes and the CRC-32 of its data, as the
        files say; the data is not read."""
        rows = []
        for chunk in sorted(self._placed(key), key=lambda chunk: chunk.box.offsets):
            with _opened(self.directory / chunk.place.relative_path) as (file, path):
                data = chunk.find(file, path, self.tensors[key].dtype)
            rows.append([*chunk.box.offsets, *chunk.box.sizes, data.crc])
        return rows

    def read(self, key: str, layer: int | None, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return a tensor, or a part of it.

        The checksum of every chunk that was read to its end, in one go or in consecutive parts, is verified.

        Args:
            key: name of the tensor.
            layer: index on its first axis; None: all of it.
            rows: [first, last) on the first axis that remains; None: all.

        Raises UserError where the checkpoint does not hold all of it, or bits have changed.
        """
        info = self.tensors[key]
        shape = info.shape if layer is None else info.shape[1:]
        first, last = rows or (0, shape[0] if shape else 1)
        box = Box((first, *[0] * len(shape[1:])), (last - first, *shape[1:])) if shape else Box((), ())
        return self.read_box(key, box) if layer is None else self.read_box(key, box.below(layer))[0]

    def read_box(self, key: str, box: Box) -> torch.Tensor:
        """Return a part of a tensor, in its sizes.

        Raises UserError where the checkpoint does not hold all of it, or bits have changed (see read).
        """
        target = torch.empty(box.sizes, dtype=self.tensors[key].dtype)
        count = sum(self._read_chunk(chunk, box, target) for chunk in self._placed(key))
        if count != box.numel:
            raise UserError(f"{self.directory}: holds {count} of the {box.numel} values of {key}: {_AGAIN}")
        return target

    def _read_chunk(self, chunk: "_Chunk", box: Box, target: torch.Tensor) -> int:
        """Copy what a chunk has of a box into the target, which holds the box, and return the number of values."""
        shared = common_part(chunk.box, box)
        if shared is None:
            return 0
        part = target
        for axis, (at, size) in enumerate(zip(shared.offsets, shared.sizes)):
            part = part.narrow(axis, at - box.offsets[axis], size)
        steps = torch.empty(chunk.box.sizes, device="meta").stride()
        first = sum((at - a) * step for at, a, step in zip(shared.offsets, chunk.box.offsets, steps))
        count = 1 + sum((size - 1) * step for size, step in zip(shared.sizes, steps))  # to the last value
        span = (first * target.itemsize, (first + count) * target.itemsize)
        with _opened(self.directory / chunk.place.relative_path) as (file, path):
            data = chunk.find(file, path, target.dtype)
            if part.is_contiguous() and count == shared.numel:
                chunk.read(file, path, data, span, tensor_bytes(part))
            else:
                buffer = torch.empty(count, dtype=target.dtype)
                chunk.read(file, path, data, span, tensor_bytes(buffer))
                part.copy_(buffer.as_strided(shared.sizes, steps))
        return shared.numel


class _Chunk:
    """One saved part of a tensor, and how far its checksum has been followed."""

    def __init__(self, part: ChunkStorageMetadata, place: _StorageInfo | None):
        self.box, self._place = Box(tuple(part.offsets), tuple(part.sizes)), place
        self._data: ChunkData | None = None
        self._followed, self._crc = 0, 0

    @property
    def unplaced(self) -> bool:
        return self._place is None

    @property
    def place(self) -> _StorageInfo:
        if self._place is None:
            raise ValueError("no place in any file")
        return self._place

    def find(self, file: int, path: Path, dtype: torch.dtype) -> ChunkData:
        """Return where its data lies in the file, which is open. Raises UserError if it is not what .metadata says."""
        if self._data is None:
            if self.place.transform_descriptors:
                raise UserError(
                    f"{path}: its tensors are compressed or encrypted ({self.place.transform_descriptors}): not"
                    " supported"
                )
            data = find_data(file, self.place.offset, self.place.length, path)
            if data.dtype != dtype or data.num_bytes != self.box.numel * dtype.itemsize:
                raise UserError(
                    f"{path}: holds {data.dtype} {list(data.shape)} where .metadata says {dtype}"
                    f" {list(self.box.sizes)}: {_AGAIN}"
                )
            self._data = data
        return self._data

    def read(self, file: int, path: Path, data: ChunkData, span: tuple[int, int], target: memoryview) -> None:
        """Fill `target` with the bytes `span` [first, last) of the data, following the checksum.

        Args:
            file: descriptor of open_for_reading.
            path: of the file, for messages.
            data: where the data lies in it.
            span: first and last + 1 of the bytes to read.
            target: as many bytes.

        Raises UserError where the checksum is wrong.
        """
        start, end = span
        for at in range(start, end, BLOCK):
            block = target[at - start : min(at + BLOCK, end) - start]
            read_into(file, data.offset + at, block, path)
            if at == 0:
                self._followed, self._crc = 0, 0
            if at == self._followed:
                self._crc = zlib.crc32(block, self._crc)
                self._followed = at + len(block)
        if self._followed == data.num_bytes == end and self._crc != data.crc:
            raise UserError(
                f"{path}: the checksum of the data at byte {data.offset} is wrong, bits have changed: {_AGAIN}"
            )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, Path]]:
    file = open_for_reading(path)
    try:
        yield file, path
    finally:
        os.close(file)


def _read_common(directory: Path) -> dict:
    """Return the plain data beside the tensors, after a check that this is a torch_dist checkpoint."""
    path = directory / "metadata.json"
    backend = read_json(path, "give a Megatron checkpoint made by stage 3 or stage 5").get("sharded_backend")
    if backend != "torch_dist":
        raise UserError(f"{path}: sharded_backend is {backend!r}, only torch_dist is supported")
    for name in (".metadata", "common.pt"):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: missing from the checkpoint: {_AGAIN}")
    with reading(directory / "common.pt", f"damaged, or holding more than plain data: {_AGAIN}"):
        return dict(torch.load(directory / "common.pt", weights_only=True, map_location="cpu"))


_PLAIN = {
    "builtins": {"set", "frozenset", "slice", "range", "complex", "bytearray"},
    "collections": {"OrderedDict", "defaultdict"},
    "torch": {"Size", "device"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "torch.serialization": {"_get_layout"},
    "torch._C": {"_get_memory_format"},
    "torch.distributed.checkpoint.metadata": set(dcp_metadata.__all__) | {"_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name not in _PLAIN.get(module, ()):
            raise pickle.UnpicklingError(f"refuses to load {module}.{name}")
        return super().find_class(module, name)


def _read_metadata(path: Path) -> dcp_metadata.Metadata:
    with reading(path, f"damaged or foreign: {_AGAIN}"):
        with open(path, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, dcp_metadata.Metadata):
            raise pickle.UnpicklingError(f"holds a {type(metadata).__name__}")
        return metadata


def _check_sizes(directory: Path, metadata: dcp_metadata.Metadata) -> None:
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise UserError(f"{file}: missing from the checkpoint: {_AGAIN}")
        if file.stat().st_size < end:
            raise UserError(f"{file}: {file.stat().st_size} bytes, the checkpoint needs {end} (truncated): {_AGAIN}")

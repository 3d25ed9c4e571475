"""megatron-core's torch_dist checkpoints written piece by piece, by one process or by all ranks of a training.

Each rank writes the files __RANK_NUMBER.distcp, which are hashed while they are written; what lies where in them goes
into .metadata, which one rank writes once all are done. The same tensors make the same bytes: there is no random id,
path or plan of writers in it. Memory: a part of CHUNK_BYTES at a time and the four blocks of HashedWriter, whatever the
size of the tensors and wherever they lie.
"""

import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self, cast

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_papo.checkpoint.boxes import Box, of_at_most
from megatron_papo.checkpoint.hashed_files import HashedWriter, cannot_write
from megatron_papo.checkpoint.hf_files import TensorInfo
from megatron_papo.errors import UserError

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_FILE_BYTES = 4 << 30
"""A new file is begun after so many bytes."""
CHUNK_BYTES = 64 << 20
"""Of a tensor that a rank of a training writes at once: what is copied to the host, where it lies on a device."""


@dataclass
class WrittenChunks:
    """What one process has written."""

    places: dict[str, dict[Box, _StorageInfo]] = field(default_factory=dict)
    """Name of the tensor -> part of it -> where it lies."""
    hashes: dict[str, str] = field(default_factory=dict)
    """File name -> sha256."""


class ChunkWriter:
    """Writes one process's files of a checkpoint. A context manager; after it, .written is complete."""

    def __init__(self, directory: Path, rank: int = 0):
        """Write below an existing directory."""
        self.directory, self.written = directory, WrittenChunks()
        self._rank = rank
        self._file: HashedWriter | None = None

    def __enter__(self) -> Self:
        return self

    def write(self, key: str, offsets: tuple[int, ...], data: torch.Tensor) -> None:
        """Append a part of a tensor, which may lie anywhere.

        Args:
            key: name of the tensor.
            offsets: where the part begins.
            data: with as many axes as the tensor.
        """
        file = self._current_file()
        start = file.position
        stored = data.detach().cpu()
        # torch.save writes a tensor's whole storage: a copy where it is part of a larger one.
        stored = stored.contiguous() if stored.untyped_storage().nbytes() == stored.nbytes else stored.clone()
        torch.save(stored, cast(IO[bytes], file))  # which needs write() and flush() alone
        place = _StorageInfo(file.path.name, start, file.position - start)
        self.written.places.setdefault(key, {})[Box(tuple(offsets), tuple(data.shape))] = place

    def write_in_parts(self, key: str, offsets: tuple[int, ...], data: torch.Tensor) -> None:
        """The same in parts of CHUNK_BYTES, for large ones. The data is contiguous."""
        for box in of_at_most(CHUNK_BYTES // data.itemsize, Box((0,) * data.dim(), tuple(data.shape))):
            part = data
            for axis, (start, size) in enumerate(zip(box.offsets, box.sizes)):
                part = part.narrow(axis, start, size)
            self.write(key, box.moved(offsets).offsets, part)

    def _current_file(self) -> HashedWriter:
        if self._file is not None and self._file.position >= _FILE_BYTES:
            self._close_file()
        if self._file is None:
            name = f"__{self._rank}_{len(self.written.hashes)}.distcp"
            self._file = HashedWriter(self.directory / name).__enter__()
        return self._file

    def _close_file(self, kind: type[BaseException] | None = None, error: object = None, trace: object = None) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.__exit__(kind, error, trace)
            self.written.hashes[file.path.name] = file.sha256

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._close_file(kind, error, trace)


class TorchDistWriter:
    """Writes a checkpoint of weights alone from one tensor after the other, in any order. A context manager; after it,
    .hashes holds file -> sha256."""

    def __init__(self, directory: Path, infos: dict[str, TensorInfo]):
        """Write below an existing directory. infos: by Megatron key, of the whole tensors."""
        self._infos, self._writer = infos, ChunkWriter(directory)

    @property
    def hashes(self) -> dict[str, str]:
        return self._writer.written.hashes

    def __enter__(self) -> Self:
        return self

    def write(self, key: str, layer: int | None, first_row: int, tensor: torch.Tensor) -> None:
        """Append a tensor, or some of its rows.

        Args:
            key: name of the tensor.
            layer: where on the stacked first axis; None where nothing is stacked.
            first_row: where the rows begin.
            tensor: the rows.
        """
        if layer is not None:
            tensor = tensor[None]
        offsets = (*([] if layer is None else [layer]), first_row, *[0] * tensor.dim())[: tensor.dim()]
        self._writer.write(key, offsets, tensor)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._writer.__exit__(kind, error, trace)
        if kind is None:
            finish(self._writer.directory, self._infos, [self._writer.written], {})


def finish(
    directory: Path, infos: Mapping[str, TensorInfo], written: Iterable[WrittenChunks], common: Mapping[str, object]
) -> None:
    """Write what makes the files of all ranks a checkpoint.

    Args:
        directory: of the checkpoint.
        infos: of the whole tensors, by name.
        written: by each rank.
        common: plain data to be read back with them.

    Raises UserError where a part of a tensor was written by nobody, or by two, or a file system refuses.
    """
    chunks: dict[str, dict[Box, _StorageInfo]] = {key: {} for key in infos}
    count = dict.fromkeys(infos, 0)
    for part in written:
        for key, places in part.places.items():
            chunks[key] |= places
            count[key] += sum(box.numel for box in places)
    table: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for key, info in infos.items():
        if not sum(box.numel for box in chunks[key]) == count[key] == torch.Size(info.shape).numel():
            raise UserError(f"{directory}: not all of {key} was written, or some of it twice: make the output again")
        ordered = sorted(chunks[key], key=lambda box: box.offsets)
        parts = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in ordered]
        table[key] = TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(info.shape), parts)
        storage |= {MetadataIndex(key, torch.Size(box.offsets)): chunks[key][box] for box in ordered}
    try:
        with open(directory / ".metadata", "wb") as stream:
            pickle.dump(dcp_metadata.Metadata(table, storage_data=storage), stream)
        torch.save(dict(common), directory / "common.pt")
        (directory / "metadata.json").write_text(json.dumps(FORMAT))
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        raise cannot_write(directory, error if isinstance(error, OSError) else OSError(0, str(error)[:120]))

"""megatron-core's torch_dist checkpoints read and written piece by piece in one process, without a model and without process groups.

megatron_core.dist_checkpointing.load reads what is written here into a model of any TP x PP layout, and what any layout saved is read here.
Nothing untrusted is unpickled: `.metadata` is a pickle by its format and is read with the dozen classes that belong in it.
"""

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    SavePlan,
)
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_papo.checkpoint.hf_files import TensorInfo
from megatron_papo.checkpoint.name_map import Piece
from megatron_papo.errors import UserError

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_AGAIN = "restore it or make it again"


class TorchDistCheckpoint:
    """A torch_dist directory opened for reading. Raises UserError if it is foreign, damaged or truncated."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        _check_format(self.directory)
        self.metadata = _read_metadata(self.directory / ".metadata")
        _check_sizes(self.directory, self.metadata)
        self._reader = FileSystemReader(self.directory)
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self.tensors = {
            key: TensorInfo(entry.properties.dtype, tuple(entry.size))
            for key, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, key: str, layer: int | None) -> torch.Tensor:
        """A whole tensor, or one index of its first axis."""
        info = self.tensors[key]
        offsets = [0] * len(info.shape)
        sizes = list(info.shape)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        target = torch.empty(sizes, dtype=info.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, self.metadata.state_dict_metadata[key], [wanted])
        found = sum(item.lengths.numel() for item in items)
        if found != target.numel():
            raise UserError(f"{self.directory}: holds {found} of the {target.numel()} values of {key}: {_AGAIN}")
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(target)).wait()
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.directory}: cannot read {key} ({' '.join(str(error).split())[:120]}): {_AGAIN}")
        return target if layer is None else target[0]


class _IntoTensor(DefaultLoadPlanner):
    """Lets the file reader fill one tensor."""

    def __init__(self, target: torch.Tensor):
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item):
        target = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item, tensor):
        pass


def write_pieces(directory: Path, pieces: list[Piece], dtypes: dict[str, torch.dtype], read: Callable[[Piece], torch.Tensor]) -> None:
    """Writes a checkpoint of `pieces`, calling read(piece) for one after the other: one piece is in memory at a time.

    dtypes: by Megatron key.
    """
    writer = FileSystemWriter(directory, single_file_per_rank=True, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp_save({}, storage_writer=writer, planner=_LazyPlanner(pieces, dtypes, read), no_dist=True)
        except CheckpointException as error:  # wraps what happened in read() and in the file system
            raise cause_of(error, directory)
    make_reproducible(directory)
    torch.save({}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_FORMAT))


def cause_of(error: CheckpointException, directory: Path) -> Exception:
    """What really went wrong on some rank; a UserError where the file system refused (a full disk)."""
    cause = next((failure for failure, _ in error.failures.values()), error)
    return UserError(f"{directory}: cannot write: {cause.strerror}") if isinstance(cause, OSError) else cause


def make_reproducible(directory: Path) -> None:
    """Takes a random id, the path and the writers' plans out of `.metadata`: the same tensors then make the same bytes."""
    metadata = _read_metadata(directory / ".metadata")
    vars(metadata).pop("all_local_plans", None)
    metadata.storage_meta = None
    with open(directory / ".metadata", "wb") as stream:
        pickle.dump(metadata, stream)


class _LazyPlanner(DefaultSavePlanner):
    """Announces every piece with its shape and makes its data when the writer comes to it."""

    def __init__(self, pieces, dtypes, read):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._items = {}
        self._read = read
        for piece in pieces:
            item = _write_item(piece, dtypes[piece.megatron])
            self._items[item.index] = (item, piece)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([item for item, _ in self._items.values()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        piece = self._items[write_item.index][1]
        data = self._read(piece).contiguous()
        return data if piece.layer is None else data[None]


def _write_item(piece: Piece, dtype: torch.dtype) -> WriteItem:
    stacked = piece.layer is not None
    size = torch.Size([piece.num_layers] * stacked + list(piece.megatron_shape))
    offsets = torch.Size(([piece.layer] if stacked else []) + [0] * len(piece.megatron_shape))
    chunk = ChunkStorageMetadata(offsets, torch.Size([1] * stacked + list(piece.megatron_shape)))
    return WriteItem(
        index=MetadataIndex(piece.megatron, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=dtype), size=size),
    )


def _check_format(directory: Path) -> None:
    path = directory / "metadata.json"
    try:
        backend = json.loads(path.read_text()).get("sharded_backend")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): give a Megatron checkpoint made by stage 3 or stage 5")
    if backend != "torch_dist":
        raise UserError(f"{path}: sharded_backend is {backend!r}, only torch_dist is supported")
    for name in (".metadata", "common.pt"):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: missing from the checkpoint: {_AGAIN}")
    try:
        torch.load(directory / "common.pt", weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises almost anything on a damaged file
        raise UserError(f"{directory / 'common.pt'}: damaged or holding more than plain data ({type(error).__name__}): {_AGAIN}")


_PLAIN = {
    "builtins": {"set", "frozenset", "slice", "range", "complex", "bytearray"},
    "collections": {"OrderedDict", "defaultdict"},
    "torch": {"Size", "device"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "torch.serialization": {"_get_layout"},
    "torch._C": {"_get_memory_format"},
    "torch.distributed.checkpoint.metadata": set(dcp_metadata.__all__) | {"_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name not in _PLAIN.get(module, ()):
            raise pickle.UnpicklingError(f"refuses to load {module}.{name}")
        return super().find_class(module, name)


def _read_metadata(path: Path) -> dcp_metadata.Metadata:
    try:
        with open(path, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, dcp_metadata.Metadata):
            raise pickle.UnpicklingError(f"holds a {type(metadata).__name__}")
        return metadata
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path}: damaged or foreign ({' '.join(str(error).split())[:120]}): {_AGAIN}")


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

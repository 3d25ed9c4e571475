"""Hugging Face checkpoint directories, tensor by tensor: safetensors in one file or sharded, under their original
names.

A checkpoint is written back with the files, names and order it had: where the dtype is the same, so is every byte.
Nothing is unpickled.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from megatron_papo.checkpoint.hashed_files import HashedReader, HashedWriter, open_for_reading, read_into, tensor_bytes
from megatron_papo.checkpoint.model_files import INDEX, SINGLE, read_index, weight_files
from megatron_papo.checkpoint.name_map import disk_name
from megatron_papo.checkpoint.proof import PROOF
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.reading import reading
from megatron_papo.run.manifest import MANIFEST, PRUNED, FileName

HEADERS = "safetensors_headers.json"
"""Beside the small files in a Megatron checkpoint: the header of each safetensors file, as it was."""
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Size = Annotated[int, Field(ge=0, lt=1 << 48)]
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class HFCheckpoint:
    """A checkpoint directory opened for reading. Raises UserError if it is incomplete, damaged, pickled or foreign."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.hf = read_hf_config(self.directory)
        self.headers = {name: _read_header(self.directory / name) for name in weight_files(self.directory)}
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[str, int]] = {}
        """Official name -> file and the offset of its data there."""
        self.file_hashes: dict[str, str] = {}
        """File -> sha256, of those that read_in_order has read."""
        for file, header in self.headers.items():
            for name, entry in header_entries(header).items():
                self._add(file, name, entry)
        self._check_index()

    def _add(self, file: str, name: str, entry: dict) -> None:
        path = self.directory / file
        if entry["dtype"] not in _DTYPES:
            raise UserError(
                f"{path}: tensor {name} has dtype {entry['dtype']}, only plain floating-point checkpoints are supported"
            )
        if disk_name(name) in self.tensors:
            raise UserError(
                f"{path}: tensor {name} is in the checkpoint twice: remove the files that do not belong to it"
            )
        start, end = entry["data_offsets"]
        if end - start != TensorInfo(_DTYPES[entry["dtype"]], tuple(entry["shape"])).num_bytes:
            raise UserError(
                f"{path}: tensor {name} has {end - start} bytes for shape {entry['shape']}: copy the checkpoint again"
            )
        self.tensors[disk_name(name)] = TensorInfo(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
        self._places[disk_name(name)] = (file, 8 + len(self.headers[file].encode()) + entry["data_offsets"][0])

    def _check_index(self) -> None:
        index = self.directory / INDEX
        if not index.is_file():
            return
        listed = {disk_name(name): file for name, file in read_index(index).items()}
        wrong = sorted(
            name
            for name in listed.keys() | self._places.keys()
            if listed.get(name) != self._places.get(name, (None,))[0]
        )
        if wrong:
            raise UserError(
                f"{index}: does not agree with the files on {', '.join(wrong[:8])}: copy the checkpoint again"
            )

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return one tensor by its official on-disk name, or its rows [first, last)."""
        file, offset = self._places[name]
        info = self.tensors[name]
        shape = info.shape
        if rows is not None:
            offset += rows[0] * (info.num_bytes // shape[0])
            shape = (rows[1] - rows[0], *shape[1:])
        target = torch.empty(shape, dtype=info.dtype)
        descriptor = open_for_reading(self.directory / file)
        try:
            read_into(descriptor, offset, tensor_bytes(target), self.directory / file)
        finally:
            os.close(descriptor)
        return target

    def place(self, name: str) -> tuple[str, int]:
        """Return (file, offset of the data in it)."""
        return self._places[name]

    def read_in_order(self, rows_at_once: Callable[[str], int | None]) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Return all tensors in the order of the files: (name, first row, rows).

        They are whole (first row 0) where rows_at_once(name) is None.

        Every byte of the weight files is read once, so that afterwards .file_hashes holds their sha256.
        """
        for file, header in self.headers.items():
            names = sorted(
                (name for name, place in self._places.items() if place[0] == file),
                key=lambda name: self._places[name][1],
            )
            with HashedReader(self.directory / file) as reader:
                if bytes(reader.read(8 + len(header.encode())).numpy())[8:] != header.encode():
                    raise UserError(f"{self.directory / file}: has changed since it was opened: start again")
                for name in names:
                    info = self.tensors[name]
                    step = rows_at_once(name)
                    if step is None:
                        yield name, 0, reader.read(info.num_bytes).view(info.dtype).reshape(info.shape)
                        continue
                    for first in range(0, info.shape[0], step):
                        count = min(step, info.shape[0] - first)
                        data = reader.read(info.num_bytes // info.shape[0] * count)
                        yield name, first, data.view(info.dtype).reshape(count, *info.shape[1:])
            self.file_hashes[file] = reader.sha256


def _read_header(path: Path) -> str:
    """Return the JSON text that begins a safetensors file, checked against the file's size. Raises UserError."""
    with reading(path, "not a complete safetensors file: copy the checkpoint again"):
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= path.stat().st_size - 8:
                raise ValueError("the header is cut off")
            text = stream.read(length).decode()
        end = _check_entries(header_entries(text))
    if path.stat().st_size != 8 + length + end:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes, its header announces {8 + length + end}: copy the checkpoint again"
        )
    return text


def _check_entries(entries: dict[str, dict]) -> int:
    """Return the bytes of data that a header announces.

    Raises ValueError where tensors overlap, leave gaps or have impossible shapes.
    """
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        start, stop = entry["data_offsets"]
        if start != end or stop < start:
            raise ValueError(f"the data of {name[:80]} does not follow on what stands before it")
        end = stop
    return end


def header_entries(header: str) -> dict[str, dict]:
    """Return tensor name -> dtype, shape and data_offsets. Raises ValueError for anything that is no header."""
    entries = _HEADER.validate_json(header)
    return {name: entry.model_dump() for name, entry in entries.items() if isinstance(entry, _Entry)}


class _Entry(BaseModel):
    """One tensor in the header of a safetensors file."""

    model_config = ConfigDict(strict=True, extra="forbid")
    dtype: str = Field(max_length=16)
    shape: list[Size] = Field(max_length=16)
    data_offsets: list[Size] = Field(min_length=2, max_length=2)


_HEADER = TypeAdapter(dict[str, _Entry | dict[str, str]])
"""The text under __metadata__ is of another form, and nothing else is."""
_HEADERS = TypeAdapter(dict[FileName, str])


def copy_small_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, processor, templates: all top-level files but weights, hidden ones and our own
    records."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        is_ours = file.name in (MANIFEST, PRUNED, PROOF, HEADERS)
        if file.is_file() and file.suffix not in _WEIGHTS and not is_ours and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)


def correct_config(directory: Path, dtypes: set[torch.dtype], headers: dict[str, str], tied: bool) -> None:
    """Make config.json true for loaders, only where it is not.

    The tie flag: transformers 5.12 does not see one that stands only inside text_config (as 4.57 wrote it) and loads a
    random lm_head. The dtype, which loaders cast to, and the index's total size, where training changed the dtype.
    """
    config = json.loads((directory / "config.json").read_text())
    if tied and not config.get("tie_word_embeddings"):
        _write_json(directory / "config.json", {**config, "tie_word_embeddings": True})
    _correct_dtype(directory, dtypes, headers)


def _write_json(path: Path, tree: dict) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")


def _correct_dtype(directory: Path, dtypes: set[torch.dtype], headers: dict[str, str]) -> None:
    original = {entry["dtype"] for header in headers.values() for entry in header_entries(header).values()}
    if {_CODES[dtype] for dtype in dtypes} == original or len(dtypes) != 1:
        return
    dtype = next(iter(dtypes))
    config = json.loads((directory / "config.json").read_text())
    for section in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if section and key in section:
                section[key] = str(dtype).removeprefix("torch.")
    _write_json(directory / "config.json", config)
    if (directory / INDEX).is_file():
        index = json.loads((directory / INDEX).read_text())
        shapes = [entry["shape"] for header in headers.values() for entry in header_entries(header).values()]
        index["metadata"] = {
            **index.get("metadata", {}),
            "total_size": sum(TensorInfo(dtype, tuple(s)).num_bytes for s in shapes),
        }
        _write_json(directory / INDEX, index)


def save_headers(headers: dict[str, str], target: Path) -> None:
    """Write down file name -> header text."""
    (target / HEADERS).write_text(json.dumps(headers))


def load_headers(directory: Path) -> dict[str, str]:
    """Return file name -> header text, as save_headers wrote them. Raises UserError."""
    path = directory / HEADERS
    cure = "convert the Hugging Face checkpoint again: .venv/bin/python -m stages.stage3_convert_to_megatron"
    with reading(path, cure):
        headers = _HEADERS.validate_json(path.read_bytes())
        for file, header in headers.items():
            _check_entries(header_entries(header))
            if Path(file).name != file:
                raise ValueError(f"{file} is no name of a file")
    return headers


def write_weights(
    directory: Path, headers: dict[str, str], tensors: Callable[[list[str]], Iterable[torch.Tensor]]
) -> dict[str, str]:
    """Write the safetensors files of a checkpoint, each from beginning to end, and return their sha256 by name.

    Args:
        directory: of the checkpoint.
        headers: file -> header, as headers_for makes them.
        tensors: returns the data of the tensors of these official names in this order, whole or in blocks of rows.

    Raises UserError where the data is not what the header announces, or a file system refuses.
    """
    hashes = {}
    for file, header in headers.items():
        size = 8 + len(header.encode()) + sum(_num_bytes(entry) for entry in header_entries(header).values())
        with HashedWriter(directory / file) as writer:
            writer.write(len(header.encode()).to_bytes(8, "little") + header.encode())
            for block in tensors([disk_name(name) for name in names_in_order(header)]):
                writer.write(tensor_bytes(block))
        if writer.position != size:
            raise UserError(f"{directory / file}: {writer.position} bytes of data for {size}: the models do not match")
        hashes[file] = writer.sha256
    return hashes


def _num_bytes(entry: dict) -> int:
    start, end = entry["data_offsets"]
    return end - start


def _with_dtypes(header: str, dtypes: dict[str, torch.dtype]) -> str:
    entries = header_entries(header)
    codes = {name: _CODES[dtypes[disk_name(name)]] for name in entries}
    if all(entry["dtype"] == codes[name] for name, entry in entries.items()):
        return header
    infos = {name: TensorInfo(_DTYPES[codes[name]], tuple(entries[name]["shape"])) for name in names_in_order(header)}
    return _header_text(infos, json.loads(header).get("__metadata__", {"format": "pt"}))


def names_in_order(header: str) -> list[str]:
    """Return the names in a header, in the order of their data."""
    entries = header_entries(header)
    return sorted(entries, key=lambda name: tuple(entries[name]["data_offsets"]))


def headers_for(headers: dict[str, str], infos: dict[str, TensorInfo], shard_bytes: int | None) -> dict[str, str]:
    """Return file -> header of a checkpoint to write.

    Args:
        headers: of the checkpoint that it comes from.
        infos: official name -> dtype and shape to write.
        shard_bytes: None: the given files and names, with new headers where a dtype differs. Else the tensors in the
            same order under official names, in files of at most so many bytes; a larger tensor has a file to itself.
    """
    if shard_bytes is None:
        return {
            file: _with_dtypes(header, {name: info.dtype for name, info in infos.items()})
            for file, header in headers.items()
        }
    shards: list[list[str]] = [[]]
    filled = 0
    for name in (disk_name(name) for _, header in sorted(headers.items()) for name in names_in_order(header)):
        if shards[-1] and filled + infos[name].num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += infos[name].num_bytes
    count = len(shards)
    files = (
        [SINGLE] if count == 1 else [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    )
    return {
        file: _header_text({name: infos[name] for name in names}, {"format": "pt"})
        for file, names in zip(files, shards)
    }


def _header_text(infos: dict[str, TensorInfo], metadata: dict) -> str:
    rows, offset = {}, 0
    for name, info in infos.items():
        rows[name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.num_bytes],
        }
        offset += info.num_bytes
    text = json.dumps({"__metadata__": metadata, **rows}, separators=(",", ":"))
    return text + " " * (-len(text.encode()) % 8)  # the format wants the data to begin at a multiple of 8


def write_index(directory: Path, headers: dict[str, str], infos: dict[str, TensorInfo]) -> None:
    """Write the index of a checkpoint of several files; none where there is one."""
    (directory / INDEX).unlink(missing_ok=True)
    if len(headers) > 1:
        weight_map = {name: file for file, header in headers.items() for name in names_in_order(header)}
        total = sum(info.num_bytes for info in infos.values())
        _write_json(
            directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )

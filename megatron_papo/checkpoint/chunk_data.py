"""Where the numbers of one chunk of a torch_dist checkpoint lie in its file, found without loading or unpickling them.

A chunk is what torch.save wrote for one tensor: a zip archive with data.pkl (dtype, shape, strides) and data/0 (the
numbers, not compressed), each with a CRC-32. data.pkl is read with the four names that belong in it; anything else is
refused.
"""

import collections
import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_papo.checkpoint.hashed_files import read_into
from megatron_papo.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_LOCAL_HEADER = 30
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class ChunkData:
    offset: int
    """Of the first byte, in the file."""
    num_bytes: int
    crc: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def find_data(file: int, start: int, length: int, path: Path) -> ChunkData:
    """Return where the data of one archive lies in its file. Raises UserError if it is not a plain tensor.

    Args:
        file: descriptor of open_for_reading.
        start: of the archive in the file.
        length: of the archive.
        path: of the file, for messages.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(_Slice(file, start, length, path))) as archive:
            entries = {name.partition("/")[2]: name for name in archive.namelist()}
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise ValueError("big-endian")
            key, dtype, shape = _TensorPickle(io.BytesIO(archive.read(entries["data.pkl"]))).load()
            data = archive.getinfo(entries[f"data/{key}"])
        if data.compress_type != zipfile.ZIP_STORED or data.file_size != dtype.itemsize * torch.Size(shape).numel():
            raise ValueError(f"{data.file_size} bytes for shape {list(shape)}")
        header = bytearray(_LOCAL_HEADER)
        read_into(file, start + data.header_offset, memoryview(header), path)
        if header[:4] != b"PK\x03\x04":
            raise ValueError("no data header")
        skipped = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))  # name and padding
        offset = data.header_offset + _LOCAL_HEADER + skipped
        if offset + data.file_size > length:
            raise ValueError("the data lies outside")
        return ChunkData(start + offset, data.file_size, data.CRC, dtype, shape)
    except Exception as error:  # a damaged archive or pickle raises almost anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path}: damaged at byte {start} ({reason}): restore it or make it again")


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: int, start: int, length: int, path: Path):
        self._file, self._start, self._length, self._path, self._at = file, start, length, path, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, self._length)[whence]
        if at < 0:
            raise OSError("seek before the beginning")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: "WriteableBuffer") -> int:
        view = memoryview(target)
        count = max(0, min(len(view), self._length - self._at))
        read_into(self._file, self._start + self._at, view[:count], self._path)
        self._at += count
        return count


class _TensorPickle(pickle.Unpickler):
    """Reads data.pkl as (key of the data, dtype, shape) of one contiguous tensor."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"refuses to load {module}.{name}")

    def persistent_load(self, identity: tuple) -> tuple[str, torch.dtype]:
        kind, dtype, key, _, _ = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("not a tensor")
        return str(key), dtype


def _describe(
    storage: tuple[str, torch.dtype], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> tuple[str, torch.dtype, tuple[int, ...]]:
    """Stand in for torch's function that would make the tensor."""
    contiguous = torch.empty(shape, device="meta").stride()
    if offset != 0 or any(size > 1 and step != wanted for size, step, wanted in zip(shape, strides, contiguous)):
        raise pickle.UnpicklingError("not a contiguous tensor")
    return (*storage, tuple(shape))

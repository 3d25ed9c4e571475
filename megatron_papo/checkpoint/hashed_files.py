"""Sequential reading and writing of large files with their sha256 computed alongside, leaving the page cache as it was.

Checkpoints are larger than memory: pages that will not be used again are given back at once, so that a conversion neither drives out
what other programs keep there nor waits for the kernel to find room. sha256 runs in a thread of its own (hashlib releases the GIL).
"""

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from megatron_papo.errors import UserError

BLOCK = 16 << 20
"""Bytes per read, and per write-back that is asked for."""
_KEPT = 256 << 20
"""Pages written so long ago are on disk by now and can be dropped."""
_SMALL = 1 << 16
"""Writes below this are gathered."""


def new_tensor_hash():
    """Of a tensor's bytes in row-major order, fed in blocks: XXH3, 128 bits. 20 times faster than sha256: it finds accidents, not attacks."""
    return xxhash.xxh3_128()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, as hashes and files take them."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def tensor_hash(tensor: torch.Tensor) -> str:
    """new_tensor_hash of a whole tensor."""
    return xxhash.xxh3_128(tensor_bytes(tensor)).hexdigest()


def cannot_write(path: Path, error: OSError) -> UserError:
    """What to say when a file system refuses."""
    return UserError(f"{path}: cannot write: {error.strerror}: nothing was left behind; free space or choose another --output")


class _Sha256:
    """sha256 fed from one thread and computed in another, in order."""

    def __init__(self):
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._running: deque[Future] = deque()

    def update(self, data) -> None:
        """data must not change until wait() or the update after next."""
        if len(self._running) > 1:
            self._running.popleft().result()
        self._running.append(self._pool.submit(self._hash.update, data))

    def wait(self) -> None:
        while self._running:
            self._running.popleft().result()

    def close(self) -> str:
        self.wait()
        self._pool.shutdown()
        return self._hash.hexdigest()


class HashedWriter:
    """A new file, written from beginning to end. A context manager; after it, .sha256 and .position (bytes). Raises UserError on a full disk."""

    def __init__(self, path: Path):
        self.path, self.position, self.sha256 = path, 0, None
        self._small = bytearray()
        self._written = self._dropped = 0
        self._hash = _Sha256()

    def __enter__(self):
        try:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise cannot_write(self.path, error)
        return self

    def write(self, data) -> int:
        """Bytes or a memoryview; on return it may be changed."""
        size = len(data)
        self.position += size
        if size < _SMALL:
            self._small += data
            return size
        self._flush_small()
        self._append(data)
        return size

    def flush(self) -> None:
        """torch.save calls it; close() is what counts."""

    def _flush_small(self) -> None:
        if self._small:
            small, self._small = self._small, bytearray()
            self._append(small)

    def _append(self, data) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK):
            block = view[start : start + BLOCK]
            self._hash.update(block)
            self._write_block(block)
        self._hash.wait()

    def _write_block(self, block: memoryview) -> None:
        try:
            while block:
                count = os.write(self._file, block)
                # On written pages this starts the write-back; those that are on disk already are dropped.
                os.posix_fadvise(self._file, self._written, count, os.POSIX_FADV_DONTNEED)
                self._written += count
                block = block[count:]
        except OSError as error:
            raise cannot_write(self.path, error)
        if self._written - self._dropped > 2 * _KEPT:
            os.posix_fadvise(self._file, self._dropped, _KEPT, os.POSIX_FADV_DONTNEED)
            self._dropped += _KEPT

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self._flush_small()
                os.fsync(self._file)
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise cannot_write(self.path, error)
        finally:
            os.close(self._file)
            self.sha256 = self._hash.close()


class HashedReader:
    """A file read from beginning to end. A context manager; after it, .sha256 of what was read."""

    def __init__(self, path: Path):
        self.path, self.position, self.sha256 = path, 0, None
        self._hash = _Sha256()

    def __enter__(self):
        self._file = os.open(self.path, os.O_RDONLY)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self

    def read(self, size: int) -> torch.Tensor:
        """The next `size` bytes; they must not be changed. Raises UserError if there are fewer."""
        data = torch.empty(size, dtype=torch.uint8)
        view = memoryview(data.numpy())
        for start in range(0, size, BLOCK):
            block = view[start : start + BLOCK]
            read_into(self._file, self.position, block, self.path)
            self._hash.update(block)
            os.posix_fadvise(self._file, self.position, len(block), os.POSIX_FADV_DONTNEED)
            self.position += len(block)
        return data

    def __exit__(self, kind, error, trace):
        os.close(self._file)
        self.sha256 = self._hash.close()


def read_into(file: int, offset: int, view: memoryview, path: Path) -> None:
    """Fills `view` from a file descriptor. Raises UserError where the file ends or cannot be read."""
    while len(view):
        try:
            count = os.preadv(file, [view], offset)
        except OSError as error:
            raise UserError(f"{path}: cannot read: {error.strerror}: copy the checkpoint again")
        if not count:
            raise UserError(f"{path}: ended at byte {offset} while it was read: copy the checkpoint again")
        view, offset = view[count:], offset + count

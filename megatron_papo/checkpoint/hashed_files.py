"""Sequential reading and writing of large files with their sha256 computed alongside, leaving the page cache as it was.

Checkpoints are larger than memory: pages that will not be used again are given back at once, so that a conversion
neither drives out what other programs keep there nor waits for the kernel to find room. sha256 and reading ahead run in
threads of their own (hashlib, file and tensor operations release the GIL).
"""

import errno
import fcntl
import hashlib
import mmap
import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Self, TypeVar

import torch
import xxhash

from megatron_papo.errors import UserError

_Item = TypeVar("_Item")

BLOCK = 16 << 20
"""Bytes per read and write."""
_BUFFERS = 4
_ALIGNED = 4096
"""What O_DIRECT asks of addresses and sizes."""


def new_tensor_hash() -> xxhash.xxh3_128:
    """Return a hash to feed with a tensor's bytes in row-major order, in blocks: XXH3, 128 bits.

    20 times faster than sha256: it finds accidents, not attacks.
    """
    return xxhash.xxh3_128()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, as hashes and files take them."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return new_tensor_hash of a whole tensor, in hex."""
    return xxhash.xxh3_128(tensor_bytes(tensor)).hexdigest()


def cannot_write(path: Path, error: OSError) -> UserError:
    """Return what to say when a file system refuses."""
    return UserError(
        f"{path}: cannot write: {error.strerror}: nothing was left behind; free space or choose another --output"
    )


class _Sha256:
    """A sha256 that is fed from one thread and computed in another, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._running: deque[Future] = deque()

    def update(self, data: memoryview) -> None:
        """Hash more data, which must not change until wait() or the update after next."""
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
    """A new file, written from beginning to end. A context manager; after it, .sha256 and .position (bytes). Raises
    UserError on a full disk.

    Written past the page cache where the file system can (O_DIRECT), which costs a third of the processor time; blocks
    are hashed and written in two threads while the next one is filled.
    """

    def __init__(self, path: Path):
        self.path, self.position, self.sha256 = path, 0, ""
        self._hash = hashlib.sha256()
        self._pools = (ThreadPoolExecutor(1), ThreadPoolExecutor(1))
        self._buffers = [mmap.mmap(-1, BLOCK) for _ in range(_BUFFERS)]
        self._running: deque[tuple[Future, Future]] = deque()
        """Of the blocks before the current one, oldest first."""
        self._number = self._filled = 0

    def __enter__(self) -> Self:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            try:
                self._file = os.open(self.path, flags | os.O_DIRECT, 0o666)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._file = os.open(self.path, flags, 0o666)  # a file system in memory, for example
        except OSError as error:
            raise cannot_write(self.path, error)
        return self

    def write(self, data: bytes | memoryview) -> int:
        """Append data, which may be changed on return, and return its size."""
        view = memoryview(data).cast("B")
        size = len(view)
        self.position += size
        while view:
            part = view[: BLOCK - self._filled]
            memoryview(self._buffers[self._number])[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BLOCK:
                self._start_block()
        return size

    def flush(self) -> None:
        """torch.save calls it; leaving the context is what counts."""

    def _start_block(self) -> None:
        """Hand the current buffer over and take the next, when that is free again."""
        buffer, size = memoryview(self._buffers[self._number]), self._filled
        padded = -(-size // _ALIGNED) * _ALIGNED  # of the last block; cut off again in the end
        hashing, writing = self._pools
        self._running.append(
            (hashing.submit(self._hash.update, buffer[:size]), writing.submit(self._write_all, buffer[:padded]))
        )
        self._number, self._filled = (self._number + 1) % _BUFFERS, 0
        if len(self._running) == _BUFFERS:
            self._wait_for_oldest()

    def _write_all(self, block: memoryview) -> None:
        while block:
            try:
                block = block[os.write(self._file, block) :]
            except OSError as error:
                flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                    raise
                # Where room for a whole block is lacking, O_DIRECT cannot say so: without it the next attempt does.
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~os.O_DIRECT)

    def _wait_for_oldest(self) -> None:
        try:
            for future in self._running.popleft():
                future.result()
        except OSError as error:
            raise cannot_write(self.path, error)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        try:
            if kind is None:
                if self._filled:
                    self._start_block()
                while self._running:
                    self._wait_for_oldest()
                os.ftruncate(self._file, self.position)
                os.fsync(self._file)
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as refused:
            raise cannot_write(self.path, refused)
        finally:
            for pool in self._pools:
                pool.shutdown()
            os.close(self._file)
            self.sha256 = self._hash.hexdigest()


class HashedReader:
    """A file read from beginning to end. A context manager; after it, .sha256 of what was read."""

    def __init__(self, path: Path):
        self.path, self.position, self.sha256 = path, 0, ""
        self._hash = _Sha256()

    def __enter__(self) -> Self:
        self._file = open_for_reading(self.path)
        return self

    def read(self, size: int) -> torch.Tensor:
        """Return the next `size` bytes; they must not be changed. Raises UserError if there are fewer."""
        data = torch.empty(size, dtype=torch.uint8)
        view = memoryview(data.numpy().data)
        for start in range(0, size, BLOCK):
            block = view[start : start + BLOCK]
            read_into(self._file, self.position, block, self.path)
            self._hash.update(block)
            self.position += len(block)
        return data

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        os.close(self._file)
        self.sha256 = self._hash.close()


def ahead(items: Iterable[_Item], depth: int = 2) -> Iterator[_Item]:
    """Return the items in their order, made in another thread up to `depth` ahead; its exceptions are raised here."""
    made: queue.Queue[tuple[Literal["item"], _Item] | tuple[Literal["end"], BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[Literal["item"], _Item] | tuple[Literal["end"], BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                made.put(entry, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("end", error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            entry = made.get()
            if entry[0] == "item":
                yield entry[1]
            elif entry[1] is None:
                return
            else:
                raise entry[1]
    finally:
        stopped.set()
        thread.join()


def open_for_reading(path: Path) -> int:
    """Return a descriptor for read_into, past the page cache where the file system can. Raises UserError."""
    try:
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror}): restore it or make it again")


_thread = threading.local()


def read_into(file: int, offset: int, view: memoryview, path: Path) -> None:
    """Fill `view` from a descriptor of open_for_reading.

    Args:
        file: the descriptor.
        offset: of the first byte in the file.
        view: where the bytes go.
        path: of the file, for messages.

    Raises UserError where the file ends or cannot be read.
    """
    if not hasattr(_thread, "buffer"):
        _thread.buffer = memoryview(mmap.mmap(-1, BLOCK + 2 * _ALIGNED))
    while len(view):
        skipped = offset % _ALIGNED
        wanted = min(-(-(skipped + len(view)) // _ALIGNED) * _ALIGNED, len(_thread.buffer))
        try:
            count = os.preadv(file, [_thread.buffer[:wanted]], offset - skipped) - skipped
        except OSError as error:
            raise UserError(f"{path}: cannot read: {error.strerror}: restore it or make it again")
        if count <= 0:
            raise UserError(f"{path}: ended at byte {offset} while it was read: copy it or make it again")
        count = min(count, len(view))
        view[:count] = _thread.buffer[skipped : skipped + count]
        view, offset = view[count:], offset + count

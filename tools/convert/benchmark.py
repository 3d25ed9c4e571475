"""Measures both directions of conversion against a plain copy of the same files on the same disk.

The checkpoint has the geometry of a published model and distinct random bfloat16 values. Each step starts with its
source out of the page cache and ends when all it wrote is on disk. seconds_copy is the mean of a plain copy of the
source and one of the Megatron files; beside it stands a copy in large blocks that gives pages back at once, which is
faster where the kernel is slow to find room for its page cache. The conversions are the commands a user types, in
processes of their own, from start to exit: with reading back, hashing, manifest, proof. identical: all files of the
round trip, weights, index and config.json, have the sha256 of those it began with, which are deleted on the way so that
twice the model's size is enough.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_papo.checkpoint.hashed_files import BLOCK
from megatron_papo.checkpoint.hf_files import TensorInfo, headers_for, write_index
from megatron_papo.checkpoint.name_map import pieces
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.run.stage_output import file_hash
from tools.convert.geometry import config_tree

SHARD_BYTES = 4_000_000_000
SPARE = 1 << 30
"""Bytes of the disk to leave free."""


def benchmark(geometry: str, directory: Path | None) -> dict:
    """Return what was measured, as plain data. Leaves nothing behind. Raises UserError where the disk is too small."""
    if directory is not None and not directory.is_dir():
        raise UserError(f"--directory {directory}: no such directory: make it, or give another")
    try:
        with tempfile.TemporaryDirectory(prefix="convert_benchmark_", dir=directory) as root:
            return _measure(geometry, Path(root))
    except OSError as error:
        place = directory or tempfile.gettempdir()
        raise UserError(f"{place}: {error.strerror or error}: give --directory a place to write, with enough room")


def _measure(geometry: str, root: Path) -> dict:
    source, megatron, back = root / "source", root / "megatron", root / "back"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config_tree(geometry), indent=2))
    infos = {
        name: TensorInfo(torch.bfloat16, shape)
        for piece in pieces(read_hf_config(source))
        for name, shape in sorted(piece.hf_shapes.items())
    }
    total = sum(info.num_bytes for info in infos.values())
    free = shutil.disk_usage(root).free
    if free < 2 * total + SPARE:
        raise UserError(
            f"{root.parent}: {geometry} needs {(2 * total + SPARE) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: choose"
            " another --directory"
        )
    _say(f"making a {geometry} checkpoint of {total / 1e9:.2f} GB")
    make_checkpoint(source, dict(sorted(infos.items())))
    hashes = {file.name: file_hash(file) for file in source.iterdir()}
    copies = _copies(source, root / "copy")
    to_megatron = _command("to-megatron", "--hf", source, "--output", megatron, source=source)
    shutil.rmtree(source)
    copies = [sum(pair) / 2 for pair in zip(copies, _copies(megatron, root / "copy"))]
    to_hf = _command("to-hf", "--megatron", megatron, "--output", back, source=megatron)
    copy, in_blocks = copies
    identical = all((back / name).is_file() and file_hash(back / name) == value for name, value in hashes.items())
    return {
        "geometry": geometry,
        "bytes": total,
        "seconds_copy": round(copy, 6),
        "seconds_copy_in_blocks": round(in_blocks, 6),
        "seconds_to_megatron": round(to_megatron[0], 6),
        "seconds_to_hf": round(to_hf[0], 6),
        "ratio_to_megatron": round(to_megatron[0] / copy, 3),
        "ratio_to_hf": round(to_hf[0] / copy, 3),
        "ratio_to_megatron_in_blocks": round(to_megatron[0] / in_blocks, 3),
        "ratio_to_hf_in_blocks": round(to_hf[0] / in_blocks, 3),
        "peak_resident_bytes": max(to_megatron[1], to_hf[1]),
        "identical": identical,
        "load_average": round(os.getloadavg()[0], 1),
    }


def make_checkpoint(directory: Path, infos: dict[str, TensorInfo], seed: int = 0) -> None:
    """Write safetensors files with random values of less than 2 in magnitude; no two tensors are alike.

    infos: in the order of the files.
    """
    random = np.random.Generator(np.random.SFC64(seed))
    for file, header in (headers := headers_for({"all": _header(infos)}, infos, SHARD_BYTES)).items():
        size = sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
        )
        with open(directory / file, "wb") as stream:
            stream.write(len(header.encode()).to_bytes(8, "little") + header.encode())
            for start in range(0, size, BLOCK):
                count = min(BLOCK, size - start)
                bits = random.integers(0, 1 << 64, size=-(-count // 8), dtype=np.uint64, endpoint=False)
                bits &= np.uint64(0xBFFF_BFFF_BFFF_BFFF)  # without the top bit of each exponent: finite and below 2
                stream.write(bits.view(np.uint8)[:count].data)
                stream.flush()
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.fsync(stream.fileno())
    write_index(directory, headers, infos)


def _header(infos: dict[str, TensorInfo]) -> str:
    offsets = np.cumsum([0, *(info.num_bytes for info in infos.values())]).tolist()
    rows = {
        name: {"dtype": "BF16", "shape": list(info.shape), "data_offsets": [offsets[i], offsets[i + 1]]}
        for i, (name, info) in enumerate(infos.items())
    }
    return json.dumps(rows)


def _copies(source: Path, target: Path) -> list[float]:
    """Return the seconds of the two ways to copy a directory."""
    return [_copy(source, target, way) for way in (shutil.copyfile, _copy_in_blocks)]


def _copy(source: Path, target: Path, way: Callable) -> float:
    _forget(source)
    started = time.perf_counter()
    for file in sorted(file for file in source.rglob("*") if file.is_file()):
        copied = target / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        way(file, copied)
        descriptor = os.open(copied, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - started
    _say(f"copy of {source.name} ({way.__name__.strip('_')}): {seconds:.2f} s")
    shutil.rmtree(target)
    return seconds


def _copy_in_blocks(source: Path, target: Path) -> None:
    """Copy with the block size and the page cache treated as the conversion does, without hashing."""
    buffer = memoryview(bytearray(BLOCK))
    with open(source, "rb", buffering=0) as reading, open(target, "wb", buffering=0) as writing:
        while count := reading.readinto(buffer):
            writing.write(buffer[:count])
            for stream in (reading, writing):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _command(*arguments: str | Path, source: Path) -> tuple[float, int]:
    """Run a command of tools.convert and return seconds and peak resident bytes."""
    _forget(source)
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "tools.convert", *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"tools.convert {arguments[0]} ended with exit status {process.returncode}")
    seconds = time.perf_counter() - started
    _say(
        f"{arguments[0]}: {seconds:.2f} s, {usage.ru_maxrss / 1024**2:.2f} GiB resident,"
        f" {usage.ru_utime + usage.ru_stime:.1f} s of processor time"
    )
    return seconds, usage.ru_maxrss * 1024


def _forget(directory: Path) -> None:
    """Take the files out of the page cache."""
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _say(text: str) -> None:
    print(f"{text} (load {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)

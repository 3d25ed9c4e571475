"""Proof that a conversion kept every bit, and the comparison of any two checkpoints.

proof.json: which tool converted what; per tensor the hash of what was read from the source (in the dtype asked for) and of what came out
of the finished checkpoint, read again from disk and taken back through the inverse layout.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_papo.checkpoint.hashed_files import new_tensor_hash, tensor_bytes
from megatron_papo.checkpoint.hf_files import PROOF
from megatron_papo.errors import UserError
from megatron_papo.manifest import file_hash, git_commit, read_manifest

VERSION = 2
TOOL = "megatron_papo tools.convert 2"
"""Name and version of what writes proofs; the second part rises when a conversion of the same source would give other bytes."""
MADE_BY_CONVERSION = {"stage3_convert_to_megatron": "hf_to_megatron", "stage6_convert_to_hf": "megatron_to_hf"}


def write_proof(
    directory: Path, conversion: str, files: dict[str, str], dtype: torch.dtype | None, source: dict[str, str], read_back: dict[str, str]
) -> None:
    """Writes proof.json. Raises UserError, naming tensors, if the checkpoint does not hold what was converted.

    files: of the source, name -> sha256. source, read_back: by tensor.
    """
    wrong = sorted(name for name in source.keys() | read_back.keys() if source.get(name) != read_back.get(name))
    rows = {name: {"source_xxh3_128": source.get(name), "read_back_xxh3_128": read_back.get(name)} for name in sorted(source | read_back)}
    proof = {
        "version": VERSION,
        "tool": TOOL,
        "git_commit": git_commit(),
        "conversion": conversion,
        "dtype": str(dtype).removeprefix("torch.") if dtype else "as in the source",
        "passed": not wrong,
        "source_sha256": dict(sorted(files.items())),
        "tensors": rows,
    }
    (directory / PROOF).write_text(json.dumps(proof, indent=1))
    if wrong:
        raise UserError(f"{directory}: {len(wrong)} tensors read back differ from the source ({', '.join(wrong[:8])}): convert again")


def require_proof(directory: Path) -> dict:
    """The proof that the checkpoint's conversion kept every tensor. Raises UserError if it is missing, damaged or failed."""
    path = Path(directory) / PROOF
    try:
        proof = json.loads(path.read_text())
        if proof.get("version") != VERSION:
            raise UserError(f"{path}: proof version {proof.get('version')}, expected {VERSION}: convert the checkpoint again")
        rows = proof["tensors"].values()
        good = proof["passed"] is True and bool(rows) and all(row["source_xxh3_128"] == row["read_back_xxh3_128"] for row in rows)
    except FileNotFoundError:
        raise UserError(f"{path}: missing: this checkpoint was not made by stage 3 or stage 6: convert it again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged proof ({error!r}): convert the checkpoint again")
    if not good:
        raise UserError(f"{path}: the conversion was not exact: convert the checkpoint again")
    return proof


def require_proof_if_converted(directory: Path) -> None:
    """require_proof of a checkpoint that a conversion made, which its manifest (or its proof) says; others need none."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    made_by = None if manifest is None else manifest.get("stage")
    if made_by in MADE_BY_CONVERSION or (directory / PROOF).exists():
        require_proof(directory)


def proved_tensors(directory: Path) -> dict[str, str]:
    """Official name -> hash, of a Megatron checkpoint that was converted from Hugging Face; nothing of one that was trained."""
    if not (Path(directory) / PROOF).exists():
        return {}
    proof = require_proof(directory)
    if proof["conversion"] != "hf_to_megatron":
        return {}
    return {name: row["read_back_xxh3_128"] for name, row in proof["tensors"].items()}


def small_file_hashes(directory: Path) -> dict[str, str]:
    """sha256 of the files of a Megatron checkpoint that say what is where; its tensors are hashed one by one."""
    names = [".metadata", "common.pt", "metadata.json"]
    return {name: file_hash(directory / name) for name in names}


def differences(first, second, progress=lambda count: None) -> Iterator[str]:
    """One line per tensor in which two opened checkpoints (convert.open_checkpoint) differ: presence, dtype, shape or any bit."""
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
            yield f"{name}: {what}, {count} of {torch.Size(info.shape).numel()} values, at most by {largest:.3g}, xxh3 {hashes[0]} {hashes[1]}"


def _in_reading_order(first, second) -> list[str]:
    """The names that both have, so that a Megatron checkpoint reads each piece once."""
    leading = second if hasattr(second, "pieces") else first
    return [name for name in leading.tensors if name in first.tensors and name in second.tensors]


def _kind(info) -> str:
    return f"{info.dtype} {list(info.shape)}"


def _compare(name, info, first, second, progress) -> tuple[float, int, tuple[str, str]]:
    """(largest absolute difference, number of values that differ in any bit or in their number, hashes), block by block."""
    from megatron_papo.checkpoint.convert import rows_at_once

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
    return largest, count, tuple(value.hexdigest() for value in hashes)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])

"""Proof that a conversion kept every bit, and the comparison of any two checkpoints.

proof.json: per tensor the sha256 of what was read from the source and of what came out of the finished checkpoint, read again from disk
and taken back through the inverse layout.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_papo.checkpoint.hf_files import PROOF, tensor_bytes
from megatron_papo.errors import UserError

VERSION = 1


def tensor_hash(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def write_proof(directory: Path, conversion: str, source: dict[str, str], read_back: dict[str, str]) -> None:
    """Writes proof.json. Raises UserError, naming tensors, if the checkpoint does not hold what was converted."""
    wrong = sorted(name for name in source.keys() | read_back.keys() if source.get(name) != read_back.get(name))
    rows = {name: {"source_sha256": source.get(name), "read_back_sha256": read_back.get(name)} for name in sorted(source | read_back)}
    proof = {"version": VERSION, "conversion": conversion, "passed": not wrong, "tensors": rows}
    (directory / PROOF).write_text(json.dumps(proof, indent=1))
    if wrong:
        raise UserError(f"{directory}: {len(wrong)} tensors read back differ from the source ({', '.join(wrong[:8])}): convert again")


def require_proof(directory: Path) -> None:
    """Raises UserError unless the checkpoint carries a proof that its conversion kept every tensor."""
    path = Path(directory) / PROOF
    try:
        proof = json.loads(path.read_text())
        rows = proof["tensors"].values()
        good = proof["passed"] is True and bool(rows) and all(row["source_sha256"] == row["read_back_sha256"] for row in rows)
    except FileNotFoundError:
        raise UserError(f"{path}: missing: this checkpoint was not made by stage 3 or stage 6: convert it again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged proof ({error!r}): convert the checkpoint again")
    if proof.get("version") != VERSION:
        raise UserError(f"{path}: proof version {proof.get('version')}, expected {VERSION}: convert the checkpoint again")
    if not good:
        raise UserError(f"{path}: the conversion was not exact: convert the checkpoint again")


def differences(first, second, progress=lambda count: None) -> Iterator[str]:
    """One line per tensor in which two opened checkpoints (convert.open_checkpoint) differ: presence, dtype, shape or any bit."""
    for name in sorted(first.tensors.keys() ^ second.tensors.keys()):
        yield f"{name}: only in {(first if name in first.tensors else second).directory}"
    for name, info in first.tensors.items():
        other = second.tensors.get(name)
        if other is None:
            continue
        if info != other:
            yield f"{name}: {info.dtype} {list(info.shape)} against {other.dtype} {list(other.shape)}"
            continue
        a, b = first.read(name), second.read(name)
        if not torch.equal(torch.from_numpy(tensor_bytes(a)), torch.from_numpy(tensor_bytes(b))):
            yield f"{name}: values differ, at most by {(a.double() - b.double()).abs().max().item():.3g}"
        progress(info.num_bytes)

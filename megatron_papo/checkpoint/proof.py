"""Proof that a conversion kept every bit.

proof.json: which tool converted what; per tensor the hash of what was read from the source (in the dtype asked for) and
of what came out of the finished checkpoint, read again from disk and taken back through the inverse layout.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_papo.errors import UserError
from megatron_papo.reading import read_record
from megatron_papo.run.describing import git_commit
from megatron_papo.run.manifest import Entry, Manifest, read_manifest
from megatron_papo.run.stage_output import file_hash

if TYPE_CHECKING:
    import torch

PROOF = "proof.json"
VERSION = 2
TOOL = "megatron_papo tools.convert 2"
"""Name and version of what writes proofs; the second part rises when a conversion of the same source would give other
bytes."""
MADE_BY_CONVERSION = {"stage3_convert_to_megatron": "hf_to_megatron", "stage6_convert_to_hf": "megatron_to_hf"}


Conversion = Literal["hf_to_megatron", "megatron_to_hf"]


class TensorProof(Entry):
    """Hashes of one tensor; None on the side that lacks it."""

    source_xxh3_128: str | None
    read_back_xxh3_128: str | None


class Proof(Entry):
    """proof.json."""

    version: int
    tool: str = ""
    git_commit: str | None = None
    conversion: Conversion
    dtype: str = ""
    passed: bool
    source_sha256: dict[str, str] = {}
    tensors: dict[str, TensorProof]


def write_proof(
    directory: Path,
    conversion: Conversion,
    files: dict[str, str],
    dtype: "torch.dtype | None",
    source: dict[str, str],
    read_back: dict[str, str],
) -> None:
    """Write proof.json. Raises UserError, naming tensors, if the checkpoint does not hold what was converted.

    Args:
        directory: of the finished checkpoint.
        conversion: hf_to_megatron or megatron_to_hf.
        files: name -> sha256, of the source's.
        dtype: what was converted to; None: each tensor's own.
        source: tensor -> hash of what was read, in the dtype that was written.
        read_back: tensor -> hash of what the finished checkpoint holds.
    """
    wrong = sorted(name for name in source.keys() | read_back.keys() if source.get(name) != read_back.get(name))
    rows = {
        name: TensorProof(source_xxh3_128=source.get(name), read_back_xxh3_128=read_back.get(name))
        for name in sorted(source | read_back)
    }
    proof = Proof(
        version=VERSION,
        tool=TOOL,
        git_commit=git_commit(),
        conversion=conversion,
        dtype=str(dtype).removeprefix("torch.") if dtype else "as in the source",
        passed=not wrong,
        source_sha256=dict(sorted(files.items())),
        tensors=rows,
    )
    (directory / PROOF).write_text(json.dumps(proof.model_dump(), indent=1))
    if wrong:
        raise UserError(
            f"{directory}: {len(wrong)} tensors read back differ from the source ({', '.join(wrong[:8])}): convert"
            " again"
        )


def require_proof(directory: Path) -> Proof:
    """Return the proof that the checkpoint's conversion kept every tensor.

    Raises UserError if it is missing, damaged or failed.
    """
    path = Path(directory) / PROOF
    if not path.is_file():
        raise UserError(f"{path}: missing: this checkpoint was not made by stage 3 or stage 6: convert it again")
    proof = read_record(path, Proof, "damaged proof: convert the checkpoint again")
    if proof.version != VERSION:
        raise UserError(f"{path}: proof version {proof.version}, expected {VERSION}: convert the checkpoint again")
    kept = all(row.source_xxh3_128 == row.read_back_xxh3_128 for row in proof.tensors.values())
    if not proof.passed or not proof.tensors or not kept:
        raise UserError(f"{path}: the conversion was not exact: convert the checkpoint again")
    return proof


def require_proof_if_converted(directory: Path) -> Proof | None:
    """Return require_proof of a checkpoint that a conversion made, and None for others, which need none."""
    return require_proof_if_made_by_conversion(directory, read_manifest(directory))


def require_proof_if_made_by_conversion(directory: Path, manifest: Manifest | None) -> Proof | None:
    """Do so where the manifest has been read already; without one, a proof.json says that it was a conversion."""
    made_by = None if manifest is None else manifest.stage
    return require_proof(directory) if made_by in MADE_BY_CONVERSION or (directory / PROOF).exists() else None


def proved_tensors(proof: Proof | None) -> dict[str, str]:
    """Return official name -> hash, as the proof of a conversion to Megatron says; nothing where it is another's."""
    if proof is None or proof.conversion != "hf_to_megatron":
        return {}
    return {name: row.read_back_xxh3_128 or "" for name, row in proof.tensors.items()}


def small_file_hashes(directory: Path) -> dict[str, str]:
    """Return the sha256 of the files of a Megatron checkpoint that say what is where, by name; its tensors are hashed
    one by one."""
    names = [".metadata", "common.pt", "metadata.json"]
    return {name: file_hash(directory / name) for name in names}

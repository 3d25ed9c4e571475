"""A conversion as a stage: from a source directory to a published output with manifest and proof. What stages 3 and 6
and tools.convert share.

The source is hashed while it is converted, not before: a large checkpoint is read once. Where the output exists
already, it is hashed first.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from tqdm import tqdm

from megatron_papo.checkpoint.model_files import model_fingerprint
from megatron_papo.checkpoint.proof import require_proof_if_made_by_conversion
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HF_FILES, HFConfig
from megatron_papo.run.console import SECONDS_BETWEEN_LINES, is_terminal
from megatron_papo.run.manifest import read_manifest
from megatron_papo.run.room import require_room
from megatron_papo.run.stage_output import (
    Input,
    StageOutput,
    content_fingerprint,
    file_hash,
    require_place,
    verify_files,
)

if TYPE_CHECKING:
    import torch

    from megatron_papo.checkpoint.convert import HFCheckpoint, MegatronCheckpoint

WEIGHTS = (".distcp",)
"""Files of a Megatron checkpoint of which a conversion reads only the model's tensors: their checksums are verified
instead."""


class Options(TypedDict, total=False):
    """What a conversion is asked for beside source and output; what is not given does not enter the fingerprint."""

    dtype: str
    """To convert every tensor to, e.g. "bfloat16"."""
    shard_bytes: int
    """To cut the files at; to Hugging Face only."""


def to_megatron(
    source: Path, output: Path, options: Options, check: Callable[[HFConfig], None] = lambda hf: None
) -> None:
    """Convert a Hugging Face checkpoint to a Megatron one. Raises UserError, leaving nothing behind.

    Args:
        source: directory that stage 1 or 2 made, or one from outside.
        output: directory to make.
        options: only `dtype`.
        check: called with the model's architecture before anything is written.
    """
    _ask_for_huge_pages()
    require_place(output)
    _require_directory(source, "give --hf the directory of a Qwen2.5-VL checkpoint")
    if (source / "metadata.json").is_file() and not (source / "config.json").is_file():
        raise UserError(f"{source}: is a Megatron checkpoint already: give --hf a Hugging Face one, or use to-hf")
    manifest = read_manifest(source)
    fingerprint = manifest.fingerprint if manifest else model_fingerprint(source) if output.exists() else _LATER
    made_from = {"hf": Input(source, fingerprint, verify=False)}
    out = StageOutput("stage3_convert_to_megatron", output, {}, made_from, options)
    if out.done:
        out.announce_done()
        return
    from megatron_papo.checkpoint.convert import HFCheckpoint, hf_to_megatron

    require_proof_if_made_by_conversion(source, manifest)
    checkpoint = HFCheckpoint(source)
    check(checkpoint.hf)
    dtype = torch_dtype(options.get("dtype"))
    _require_space(output, checkpoint, dtype)
    with out, byte_progress("convert to Megatron and verify", checkpoint) as progress:
        written = hf_to_megatron(checkpoint, out.partial, progress, dtype)
        if manifest is None:
            out.complete_input("hf", model_fingerprint(source, written.source))
        else:
            verify_files(source, written.source)
        out.hashes |= written.target
        out.counts["tensors"] = len(checkpoint.tensors)


def to_hf(source: Path, output: Path, options: Options, started: float | None = None) -> None:
    """Convert a Megatron checkpoint to a Hugging Face one. Raises UserError, leaving nothing behind.

    Args:
        source: directory that stage 3 or 5 made, or one from outside.
        output: directory to make.
        options: dtype, shard_bytes.
        started: time.time() from which the manifest's seconds count; None: the start of this process.
    """
    _ask_for_huge_pages()
    require_place(output)
    _require_directory(source, "give --megatron the directory of a Megatron checkpoint")
    if (source / "config.json").is_file() and not (source / "metadata.json").is_file():
        raise UserError(f"{source}: is a Hugging Face checkpoint: give --megatron a Megatron one, or use to-megatron")
    manifest = read_manifest(source)
    fingerprint = manifest.fingerprint if manifest else _of_megatron(source) if output.exists() else _LATER
    made_from = {"megatron": Input(source, fingerprint, verify=False)}
    out = StageOutput("stage6_convert_to_hf", output, {}, made_from, options, started)
    if out.done:
        out.announce_done()
        return
    from megatron_papo.checkpoint.convert import MegatronCheckpoint, megatron_to_hf
    from megatron_papo.checkpoint.model_card import write_model_card

    verify_files(source, only_sizes=WEIGHTS)
    proof = require_proof_if_made_by_conversion(source, manifest)
    checkpoint = MegatronCheckpoint(source, proof)
    dtype = torch_dtype(options.get("dtype"))
    _require_space(output, checkpoint, dtype)
    with out, byte_progress("convert to Hugging Face and verify", checkpoint) as progress:
        written = megatron_to_hf(checkpoint, out.partial, progress, dtype, options.get("shard_bytes"))
        write_model_card(out.partial, manifest, checkpoint)
        if manifest is None:
            out.complete_input("megatron", megatron_fingerprint(checkpoint))
        out.hashes |= written.target
        out.counts["tensors"] = len(checkpoint.tensors)


@contextmanager
def byte_progress(
    title: str, checkpoint: "HFCheckpoint | MegatronCheckpoint", passes: int = 2
) -> Iterator[Callable[[int], object]]:
    """Show a progress bar by bytes over all tensors of an opened checkpoint, `passes` times (written, read back)."""
    total = passes * sum(info.num_bytes for info in checkpoint.tensors.values())
    pause = 0.5 if is_terminal() else SECONDS_BETWEEN_LINES
    with tqdm(desc=title, total=total, unit="B", unit_scale=True, unit_divisor=1024, mininterval=pause) as bar:
        yield bar.update


_LATER = "not known yet"
"""The fingerprint of a source from outside, until it has been read."""


def _ask_for_huge_pages() -> None:
    """Let torch ask the kernel for huge pages, if it is not imported yet.

    Memory for tensors is otherwise got at 2.4 GB/s, slower than the disk.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _require_directory(source: Path, hint: str) -> None:
    if not source.is_dir():
        raise UserError(f"{source}: not there, or not a directory: {hint}")


def _of_megatron(source: Path) -> str:
    from megatron_papo.checkpoint.convert import MegatronCheckpoint

    return megatron_fingerprint(MegatronCheckpoint(source))


def megatron_fingerprint(checkpoint: "MegatronCheckpoint") -> str:
    """Return what identifies a Megatron checkpoint that no stage made, by the content that an export reads of it.

    That is hf/, the plain data in common.pt, and the model's tensors by the checksums that their files carry: what
    belongs to the optimizer is not read.
    """
    stored = checkpoint.stored
    tensors = {
        piece.megatron: [str(stored.tensors[piece.megatron].dtype), stored.checksums(piece.megatron)]
        for piece in checkpoint.pieces
    }
    small = [content_fingerprint(checkpoint.directory / HF_FILES), file_hash(checkpoint.directory / "common.pt")]
    return hashlib.sha256(json.dumps([small, tensors], sort_keys=True).encode()).hexdigest()


def torch_dtype(name: str | None) -> "torch.dtype | None":
    """Return torch.float32 for "float32", and None for None."""
    import torch

    return None if name is None else getattr(torch, name)


def _require_space(output: Path, checkpoint: "HFCheckpoint | MegatronCheckpoint", dtype: "torch.dtype | None") -> None:
    """Raise UserError where the output cannot fit; a quota may still refuse later."""
    needed = sum(
        info.num_bytes // info.dtype.itemsize * (dtype or info.dtype).itemsize for info in checkpoint.tensors.values()
    )
    require_room(output, needed)

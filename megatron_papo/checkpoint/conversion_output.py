"""A conversion as a stage: from a source directory to a published output with manifest and proof. What stages 3 and 6
and tools.convert share.

The source is hashed while it is converted, not before: a large checkpoint is read once. Where the output exists
already, it is hashed first.
"""

import os
import shutil
from pathlib import Path

# torch then asks the kernel for huge pages: memory for tensors is otherwise got at 2.4 GB/s, slower than the disk. It
# must be set before.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from megatron_papo.checkpoint.model_files import model_fingerprint
from megatron_papo.checkpoint.proof import require_proof_if_converted
from megatron_papo.errors import UserError
from megatron_papo.run.stage_output import (
    Input,
    StageOutput,
    content_fingerprint,
    read_manifest,
    verify_files,
)

WEIGHTS = (".distcp",)
"""Files of a Megatron checkpoint of which a conversion reads only the model's tensors: their checksums are verified
instead."""


def to_megatron(source: Path, output: Path, options: dict, check=lambda hf: None) -> None:
    """Hugging Face -> Megatron. options: dtype, only where given. check: called with the model's HFConfig before
    anything is written."""
    out = _output(
        "stage3_convert_to_megatron",
        output,
        "hf",
        source,
        "give --hf the directory of a Qwen2.5-VL checkpoint",
        options,
    )
    if out.done:
        out.announce_done()
        return
    from megatron_papo.checkpoint.convert import HFCheckpoint, hf_to_megatron
    from megatron_papo.checkpoint.progress import byte_progress

    require_proof_if_converted(source)
    checkpoint = HFCheckpoint(source)
    check(checkpoint.hf)
    dtype = torch_dtype(options.get("dtype"))
    _require_space(output, checkpoint, dtype)
    with out, byte_progress("convert to Megatron and verify", checkpoint) as progress:
        written = hf_to_megatron(checkpoint, out.partial, progress, dtype)
        if read_manifest(source) is None:
            out.complete_input("hf", model_fingerprint(source, written.source))
        else:
            verify_files(source, written.source)
        out.hashes |= written.target
        out.counts["tensors"] = len(checkpoint.tensors)


def to_hf(source: Path, output: Path, options: dict, started: float | None = None) -> None:
    """Megatron -> Hugging Face. options: dtype, shard_bytes, only where given. started: see StageOutput.started; None:
    with the process."""
    out = _output(
        "stage6_convert_to_hf",
        output,
        "megatron",
        source,
        "give --megatron the directory of a Megatron checkpoint",
        options,
    )
    out.started = started or out.started
    if out.done:
        out.announce_done()
        return
    from megatron_papo.checkpoint.convert import MegatronCheckpoint, megatron_to_hf
    from megatron_papo.checkpoint.model_card import write_model_card
    from megatron_papo.checkpoint.progress import byte_progress

    verify_files(source, only_sizes=WEIGHTS)
    require_proof_if_converted(source)
    checkpoint = MegatronCheckpoint(source)
    dtype = torch_dtype(options.get("dtype"))
    _require_space(output, checkpoint, dtype)
    with out, byte_progress("convert to Hugging Face and verify", checkpoint) as progress:
        written = megatron_to_hf(checkpoint, out.partial, progress, dtype, options.get("shard_bytes"))
        write_model_card(out.partial, source, checkpoint)
        if read_manifest(source) is None:
            out.complete_input("megatron", _fingerprint_without_hashing(source))
        out.hashes |= written.target
        out.counts["tensors"] = len(checkpoint.tensors)


def _output(stage: str, output: Path, name: str, source: Path, hint: str, options: dict) -> StageOutput:
    if not source.is_dir():
        raise UserError(f"{source}: not there, or not a directory: {hint}")
    manifest = read_manifest(source)
    if manifest is not None:
        fingerprint = manifest["fingerprint"]
    elif not output.exists():
        fingerprint = "not known yet"
    elif name == "megatron":
        fingerprint = _fingerprint_without_hashing(source)
    else:
        fingerprint = model_fingerprint(source)
    # The source is hashed while it is read.
    return StageOutput(stage, output, {}, {name: Input(source, fingerprint, verify=False)}, options)


def _fingerprint_without_hashing(source: Path) -> str:
    """Of a Megatron checkpoint that no stage made: its small files, and the sizes of those with the tensors."""
    sizes = {file.name: f"{file.stat().st_size} bytes" for file in source.iterdir() if file.name.endswith(WEIGHTS)}
    return content_fingerprint(source, sizes)


def torch_dtype(name: str | None):
    """float32 -> torch.float32; None stays None."""
    import torch

    return None if name is None else getattr(torch, name)


def _require_space(output: Path, checkpoint, dtype) -> None:
    """Raises UserError where the output cannot fit; a quota may still refuse later."""
    needed = sum(
        info.num_bytes // info.dtype.itemsize * (dtype or info.dtype).itemsize for info in checkpoint.tensors.values()
    )
    parent = next(folder for folder in Path(output).absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"{output}: needs {needed / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free: free space or choose"
            " another --output"
        )

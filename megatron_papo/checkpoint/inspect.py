"""What a checkpoint holds, without reading its tensors: sizes, dtypes, files, step, and the layout it was saved
from."""

from collections import Counter
from pathlib import Path

import torch

from megatron_papo.checkpoint.convert import OPTIMIZER_PREFIXES, MegatronCheckpoint, open_checkpoint
from megatron_papo.checkpoint.hf_files import names_in_order
from megatron_papo.checkpoint.proof import PROOF, require_proof
from megatron_papo.errors import UserError
from megatron_papo.run.manifest import read_manifest


def describe(directory: Path) -> dict[str, object]:
    """Return what a checkpoint holds as plain data for JSON.

    Raises UserError where it is incomplete, damaged or foreign.
    """
    checkpoint = open_checkpoint(directory)
    hf, infos = checkpoint.hf, checkpoint.tensors.values()
    facts: dict[str, object] = {
        "format": "megatron torch_dist" if isinstance(checkpoint, MegatronCheckpoint) else "hugging face safetensors",
        "parameters": sum(torch.Size(info.shape).numel() for info in infos),
        "bytes": sum(info.num_bytes for info in infos),
        "tensors": len(infos),
        "dtypes": dict(Counter(str(info.dtype).removeprefix("torch.") for info in infos)),
        "tie_word_embeddings": hf.tie_word_embeddings,
        "vocabulary": hf.text.vocab_size,
        "text": {
            "layers": hf.text.num_layers,
            "hidden": hf.text.hidden_size,
            "mlp": hf.text.intermediate_size,
            "heads": hf.text.num_heads,
            "key_value_groups": hf.text.num_kv_groups,
        },
        "vision": {
            "layers": hf.vision.depth,
            "hidden": hf.vision.hidden_size,
            "mlp": hf.vision.intermediate_size,
            "heads": hf.vision.num_heads,
        },
        "names": "official",
    }
    if isinstance(checkpoint, MegatronCheckpoint):
        facts |= _megatron(checkpoint)
    else:
        facts["files"] = {file: (directory / file).stat().st_size for file in checkpoint.headers}
        if any(
            name not in checkpoint.tensors for header in checkpoint.headers.values() for name in names_in_order(header)
        ):
            facts["names"] = "in-memory (transformers' module names)"
    manifest = read_manifest(directory)
    facts["made_by"] = None if manifest is None else {"stage": manifest.stage, "git_commit": manifest.git_commit}
    facts["proof"] = _proof(directory)
    return facts


def _megatron(checkpoint: MegatronCheckpoint) -> dict[str, object]:
    stored = checkpoint.stored
    optimizer = [key for key in stored.tensors if key.startswith(OPTIMIZER_PREFIXES)]
    state = stored.common.get("state", {})
    return {
        "step": state.get("step"),
        "optimizer_bytes": sum(stored.tensors[key].num_bytes for key in optimizer),
        "saved_from": stored.common.get("saved_from")
        or {"tensor_model_parallel_size": _tensor_parallel_size(checkpoint)},
        "files": {file.name: file.stat().st_size for file in sorted(checkpoint.directory.glob("*.distcp"))},
    }


def _tensor_parallel_size(checkpoint: MegatronCheckpoint) -> int:
    """Return in how many parts the first layer's attention output, which tensor parallelism cuts along its columns, was
    saved."""
    chunks = checkpoint.stored.chunks("language_model.decoder.layers.self_attention.linear_proj.weight")
    return len({offsets[2] for offsets, _, _ in chunks if offsets[0] == 0})


def _proof(directory: Path) -> str:
    if not (directory / PROOF).exists():
        return "none"
    try:
        proof = require_proof(directory)
        return f"passed: {proof.conversion} of {len(proof.tensors)} tensors by {proof.tool}"
    except UserError as error:
        return f"FAILED: {error}"

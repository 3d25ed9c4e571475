"""Logits of two checkpoints on one seeded picture and prompt: Hugging Face ones by transformers, Megatron ones by this
package's model.

What hashes cannot show, that a checkpoint means the same to both programs, this does. In float32, one model in memory
at a time.
"""

from pathlib import Path

import psutil
import torch

from megatron_papo.checkpoint.convert import MegatronCheckpoint, open_checkpoint
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.model.position_ids import mrope_position_ids

TOLERANCE = 1e-3
"""Of the largest logit difference, relative to the largest logit: float32 rounding makes 1e-6 of a tiny model and grows
with depth."""
_GRID = (1, 12, 20)
_SEED = 20250707


def compare_logits(first: Path, second: Path) -> list[str]:
    """Print the largest difference and return one line per complaint. Raises UserError where a model does not fit into
    memory."""
    a, b = (logits_of(directory) for directory in (first, second))
    if a.shape != b.shape:
        return [f"logits have shapes {list(a.shape)} and {list(b.shape)}"]
    difference = (a - b).abs().max().item()
    relative = difference / a.abs().max().item()
    print(
        f"logits: largest difference {difference:.3g}, {relative:.3g} of the largest logit, over {a.shape[0]} tokens"
        " and one picture"
    )
    return [] if relative <= TOLERANCE else [f"logits differ by {relative:.3g} of the largest logit"]


def logits_of(directory: Path) -> torch.Tensor:
    """Return the logits of seeded_prompt, [tokens, vocabulary] in float32. Raises UserError where memory is short."""
    checkpoint = open_checkpoint(directory)
    needed = 4 * sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())
    available = psutil.virtual_memory().available
    if 1.3 * needed > available:
        raise UserError(
            f"{directory}: --logits needs {1.3 * needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are free:"
            " compare without it"
        )
    prompt = seeded_prompt(checkpoint.hf)
    run = _megatron if isinstance(checkpoint, MegatronCheckpoint) else _transformers
    with torch.no_grad():
        return run(directory, checkpoint.hf, *prompt)


def seeded_prompt(hf: HFConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids [1, s] with one picture in the middle, position ids [3, 1, s] and pixels."""
    random = torch.Generator().manual_seed(_SEED)
    special = {hf.image_token_id, hf.video_token_id, hf.vision_start_token_id, hf.vision_end_token_id}
    words = torch.randint(0, hf.text.vocab_size, (64,), generator=random).tolist()
    words = [word for word in words if word not in special][:32]
    merge = hf.vision.spatial_merge_size
    picture = [hf.image_token_id] * (_GRID[1] * _GRID[2] // merge**2)
    start, end = ([] if token is None else [token] for token in (hf.vision_start_token_id, hf.vision_end_token_id))
    ids = torch.tensor(words[:16] + start + picture + end + words[16:])
    pixels = torch.randn(_GRID[1] * _GRID[2], hf.vision.patch_values, generator=random)
    return ids[None], mrope_position_ids(ids, [_GRID], hf.image_token_id)[:, None], pixels


def _transformers(
    directory: Path, hf: HFConfig, ids: torch.Tensor, positions: torch.Tensor, pixels: torch.Tensor
) -> torch.Tensor:
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    config.tie_word_embeddings = hf.tie_word_embeddings  # transformers 5.12 does not see one that 4.57 wrote
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, config=config, dtype=torch.float32).eval()
    return model(
        input_ids=ids, position_ids=positions, pixel_values=pixels, image_grid_thw=torch.tensor([_GRID])
    ).logits[0]


def _megatron(
    directory: Path, hf: HFConfig, ids: torch.Tensor, positions: torch.Tensor, pixels: torch.Tensor
) -> torch.Tensor:
    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed import process_groups
    from megatron_papo.model.qwen2_5_vl import build_model

    process_groups.initialize(ParallelConfig())
    model = build_model(hf, dtype=torch.float32, sequence_parallel=False, recompute="none")
    megatron_files.load_weights(directory, model)
    device = process_groups.device()
    logits = model(ids.to(device), positions.to(device), pixels.to(device), [_GRID])[0].float().cpu()
    process_groups.destroy()
    return logits

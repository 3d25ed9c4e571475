"""The parts of the supervised cold start: data order, batches, the loss as a module, DeepSpeed's configuration.

The loss is the mean of -log p over all target tokens of the global batch: every rank adds up its own tokens' terms and
divides by the number of tokens of the whole batch, which it knows beforehand, so neither the micro-batch size nor the
number of processes changes it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_papo.config import DataConfig, SftConfig
from megatron_papo.data.chat import expand_image_pads
from megatron_papo.model.position_ids import mrope_position_ids
from megatron_papo.pictures import preprocess
from megatron_papo.run.records import Prompt
from megatron_papo.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration


def batch_indices(num_samples: int, step: int, global_batch_size: int, seed: int) -> list[int]:
    """Return the indices of the samples of one optimizer step. The order is a seeded permutation per epoch.

    Args:
        num_samples: in the data set.
        step: from 0.
        global_batch_size: samples of a step.
        seed: of the run.
    """
    orders: dict[int, np.ndarray] = {}
    indices = []
    for position in range(step * global_batch_size, (step + 1) * global_batch_size):
        epoch, offset = divmod(position, num_samples)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng(derive_seed(seed, "sft_order", epoch)).permutation(num_samples)
        indices.append(int(orders[epoch][offset]))
    return indices


def learning_rate(config: SftConfig, step: int) -> float:
    """Return the learning rate of optimizer step `step`, from 0: a linear warm-up, then constant."""
    return config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))


@dataclass
class SftBatch:
    """b rows (prompt, target) padded on the right to s tokens; N target tokens in all."""

    input_ids: Tensor
    """[b, s]"""
    position_ids: Tensor
    """[3, b, s]"""
    pixel_values: Tensor
    """[patches, 1176]"""
    image_grid_thw: Tensor
    """[images, 3]"""
    has_images: bool
    """False: pixel_values is one black picture that belongs to no row."""
    predicting_positions: Tensor
    """[N]: index into the flattened [b * s] of the position whose logits predict each target token."""
    target_tokens: Tensor
    """[N]"""

    def to(self, device: torch.device) -> dict[str, Tensor | bool]:
        """Return it on a device, as keyword arguments of TargetLoss."""
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}


def collate(prompts: list[Prompt], root: Path, data: DataConfig, image_token_id: int) -> SftBatch:
    """Return a batch of prompts that have targets.

    Args:
        prompts: the rows.
        root: directory that their pictures are read from.
        data: how pictures are resized.
        image_token_id: the image-pad token.

    Raises UserError for a missing or damaged picture.
    """
    targets = [_target_of(prompt) for prompt in prompts]
    tokens, grids, patches = [], [], []
    for prompt, target in zip(prompts, targets, strict=True):
        pictures = preprocess.load_images(root, prompt.images, preprocess.PictureSettings.of(data))
        grids.append([preprocess.grid_of(picture) for picture in pictures])
        patches += [torch.from_numpy(preprocess.to_patches(picture)) for picture in pictures]
        tokens.append(expand_image_pads(prompt.token_ids, image_token_id, grids[-1]) + target)
    length = max(map(len, tokens))
    input_ids = torch.zeros(len(prompts), length, dtype=torch.long)
    position_ids = torch.zeros(3, len(prompts), length, dtype=torch.long)
    predicting = []
    for row, (target, ids) in enumerate(zip(targets, tokens, strict=True)):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        position_ids[:, row, : len(ids)] = mrope_position_ids(ids, grids[row], image_token_id)
        end = row * length + len(ids) - 1
        predicting.append(torch.arange(end - len(target), end))
    return SftBatch(
        input_ids,
        position_ids,
        torch.cat(patches) if patches else torch.zeros(16, 3 * 2 * 14 * 14),
        torch.tensor([grid for row in grids for grid in row] or [(1, 4, 4)]),
        bool(patches),
        torch.cat(predicting),
        torch.tensor([token for target in targets for token in target]),
    )


def _target_of(prompt: Prompt) -> list[int]:
    if prompt.target_token_ids is None:
        raise ValueError(f"prompt {prompt.id} has no target")
    return prompt.target_token_ids


class TargetLoss(torch.nn.Module):
    """A Hugging Face Qwen2.5-VL whose forward pass returns the summed -log p of the target tokens."""

    def __init__(self, model: "Qwen2_5_VLForConditionalGeneration"):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        has_images: bool,
        predicting_positions: Tensor,
        target_tokens: Tensor,
    ) -> Tensor:
        """Return a float32 scalar for SftBatch's fields. Only positions that predict a target become logits.

        Every rank runs the same modules in the same order, pictures or not: ZeRO's collectives follow the order of the
        modules, and a rank that skipped the vision tower would leave the others waiting. No attention mask: padding is
        on the right, where a causal model cannot look.
        """
        features = self.model.model.visual(pixel_values, grid_thw=image_grid_thw).pooler_output
        embeddings = self.model.get_input_embeddings()(input_ids)
        if has_images:
            is_image = (input_ids == self.model.config.image_token_id)[..., None]
            embeddings = embeddings.masked_scatter(is_image, features.to(embeddings.dtype))
        else:
            embeddings = embeddings + 0.0 * features.sum()
        decoder = self.model.model.language_model
        hidden = decoder(inputs_embeds=embeddings, position_ids=position_ids, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden.flatten(0, 1)[predicting_positions])
        return torch.nn.functional.cross_entropy(logits.float(), target_tokens, reduction="sum")


def deepspeed_config(config: SftConfig, dtype: str) -> dict:
    """Return the configuration for deepspeed.initialize."""
    zero: dict[str, object] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.global_batch_size // (config.micro_batch_size * config.processes),
        "gradient_clipping": config.clip_grad,
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
        # torch's AdamW: the same numbers as DeepSpeed's own, and no C++ compiler at run time.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }

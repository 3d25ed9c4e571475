"""What transformers makes of a checkpoint: the judge of tools.check_server and tools.gpu_acceptance.

Its own rotary positions, its own attention; the pixels are those of megatron_papo/pictures, which equal its processor's
(tests/pictures/test_preprocess.py).
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_papo.errors import UserError
from megatron_papo.reading import reading

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_papo.pictures.preprocess import PictureSettings
    from megatron_papo.training.rows import Grid, TrainingRollout

MERGER = "merger.mlp.2.weight"
"""The end of the name of the vision tower's last matrix, whatever comes before it: all that is seen passes it."""


class Reference:
    """A checkpoint in transformers, on one device."""

    def __init__(self, hf_dir: Path, dtype: "torch.dtype", device: "torch.device"):
        """Raises UserError where transformers cannot load it, or memory is short."""
        import torch
        from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

        from megatron_papo.model.hf_config import read_hf_config

        self.directory, self.hf = hf_dir, read_hf_config(hf_dir)
        require_memory(hf_dir, dtype, device)
        with reading(hf_dir, "give --hf a Hugging Face checkpoint of Qwen2.5-VL"):
            config = AutoConfig.from_pretrained(hf_dir, trust_remote_code=False)
            config.tie_word_embeddings = self.hf.tie_word_embeddings  # transformers 5.12 misses one that 4.57 wrote
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                hf_dir, config=config, dtype=dtype, attn_implementation="sdpa"
            )
        self.model = torch.nn.Module.to(model, device).eval()
        self.device, self.dtype = device, dtype
        self._takes_types = "mm_token_type_ids" in inspect.signature(self.model.forward).parameters

    def response_logits(
        self, prompt: Sequence[int], response: Sequence[int], pixels: "Tensor | None", grids: Sequence["Grid"]
    ) -> "Tensor":
        """Return the logits that predict each response token, float32 [tokens, vocabulary].

        Args:
            prompt: token ids, the image-pad tokens repeated for their pictures.
            response: token ids.
            pixels: [patches, 1176] of all pictures; None without any.
            grids: (1, rows, columns) of each picture.
        """
        import torch

        tokens = torch.tensor([[*prompt, *response]], device=self.device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if pixels is not None:
            inputs["pixel_values"] = pixels.to(self.device, self.dtype)
            inputs["image_grid_thw"] = torch.tensor(list(grids), device=self.device)
        if self._takes_types:
            inputs["mm_token_type_ids"] = (tokens == self.hf.image_token_id).long()
        return self.model(**inputs).logits[0, len(prompt) - 1 : -1].float()

    def statistics(
        self, row: "TrainingRollout", root: Path, settings: "PictureSettings", forbidden: Sequence[int] = ()
    ) -> tuple["Tensor", "Tensor"]:
        """Return log-probs and entropies at a rollout's response tokens, [tokens] each, without gradient.

        Args:
            row: the rollout.
            root: the directory that the pictures' paths start from.
            settings: how they are opened and resized.
            forbidden: token ids that are never sampled: the distribution is over the others.
        """
        import torch

        with torch.no_grad():
            prompt, response_ids = row.prompt_token_ids, row.rollout.response_token_ids
            logits = self.response_logits(prompt, response_ids, pixels_of(row, root, settings), row.grids)
            logits = logits.double() / row.rollout.temperature
            if forbidden:
                logits[:, list(forbidden)] = -torch.inf
            log_probs = torch.log_softmax(logits, -1)
            response = torch.tensor(response_ids, device=self.device)
            entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
            return log_probs.gather(-1, response[:, None])[:, 0].cpu(), entropy.cpu()

    def negate_merger(self) -> None:
        """Change the sign of the vision tower's last matrix, as write_negated does in a checkpoint."""
        import torch

        [weight] = [parameter for name, parameter in self.model.named_parameters() if name.endswith(MERGER)]
        with torch.no_grad():
            weight.neg_()


def pixels_of(row: "TrainingRollout", root: Path, settings: "PictureSettings") -> "Tensor | None":
    """Return float32 [patches, 1176] of all pictures of a rollout; None where it has none."""
    import torch

    from megatron_papo.pictures.preprocess import load_images, to_patches

    if not row.grids:
        return None
    pictures = load_images(root, row.rollout.images, settings)
    return torch.cat([torch.from_numpy(to_patches(picture)) for picture in pictures])


def bytes_of(hf_dir: Path, dtype: "torch.dtype") -> int:
    """Return the bytes of a checkpoint's weights in a dtype. Raises UserError for one that cannot be read."""
    from megatron_papo.checkpoint.hf_files import HFCheckpoint

    tensors = HFCheckpoint(hf_dir).tensors.values()
    return sum(info.num_bytes // info.dtype.itemsize for info in tensors) * dtype.itemsize


def require_memory(hf_dir: Path, dtype: "torch.dtype", device: "torch.device") -> None:
    """Raise UserError where a checkpoint's weights do not fit into what a device has free."""
    import psutil
    import torch

    needed = 1.2 * bytes_of(hf_dir, dtype)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"{hf_dir}: transformers needs {needed / 1e9:.1f} GB on {device.type}, {free / 1e9:.1f} GB are free: use"
            " another machine, or free some"
        )


def write_negated(hf_dir: Path, target: Path) -> None:
    """Make a checkpoint that differs from another in the sign of the vision tower's last matrix, so that it sees other
    pictures and reads the same text. Files that are the same are links.

    Raises UserError where the checkpoint has no such matrix.
    """
    from safetensors.torch import load_file, save_file

    from megatron_papo.checkpoint.hf_files import HFCheckpoint

    checkpoint = HFCheckpoint(hf_dir)
    official = f"visual.{MERGER}"
    if official not in checkpoint.tensors:
        raise UserError(f"{hf_dir}: no tensor {official}: give --hf a checkpoint of Qwen2.5-VL")
    changed, _ = checkpoint.place(official)
    for file in sorted(hf_dir.iterdir()):
        if file.is_file() and file.name != changed:
            (target / file.name).symlink_to(file.resolve())
    with reading(target, "make room there"):
        tensors = load_file(hf_dir / changed)
        [name] = [name for name in tensors if name.endswith(MERGER)]  # as that file spells it
        tensors[name] = -tensors[name]
        save_file(tensors, target / changed, metadata={"format": "pt"})

"""Parts of the network that training leaves as they are (model.freeze): no gradient, no optimizer state, no decay."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PARTS = {
    "vision_tower": ("vision_model.patch_embed.", "vision_model.decoder."),
    "merger": ("vision_model.merger_",),
    "embeddings": ("language_model.embedding.",),
}
"""Part -> how Megatron's names of its parameters begin. The tower ends with the norm before the merger's two linear
maps."""
TIED_OUTPUT = "language_model.output_layer."
"""Where embeddings and output layer share their weights, the last pipeline stage holds a copy under this name."""


def is_frozen(name: str, parts: Sequence[str], tied: bool) -> bool:
    """Say whether a parameter belongs to one of the parts.

    Args:
        name: Megatron's.
        parts: of model.freeze.
        tied: whether embeddings and output layer share their weights.
    """
    starts = [start for part in parts for start in PARTS[part]]
    if tied and "embeddings" in parts:
        starts.append(TIED_OUTPUT)
    return name.startswith(tuple(starts))


def freeze(model: "torch.nn.Module", parts: Sequence[str], tied: bool) -> None:
    """Take the gradient from the parameters of these parts. model: Qwen2_5_VL, this rank's pipeline stage."""
    for name, parameter in model.named_parameters():
        if is_frozen(name, parts, tied):
            parameter.requires_grad_(False)

"""How tensors of a Hugging Face checkpoint lie in megatron-core's, each layout beside its inverse. Pure functions;
every one is a permutation.

A layout turns the tensors of one row of name_map.py into the one Megatron tensor (at tensor-parallel size 1) and back,
bit for bit. They work on meta tensors too, which is how name_map.py derives shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig


@dataclass(frozen=True)
class Layout:
    to_megatron: Callable[[list[Tensor], HFConfig], Tensor]
    to_hf: Callable[[Tensor, HFConfig], list[Tensor]]


def _one(tensors: list[Tensor], hf: HFConfig) -> Tensor:
    return tensors[0]


def _one_back(tensor: Tensor, hf: HFConfig) -> list[Tensor]:
    return [tensor]


def _query_groups(tensors: list[Tensor], hf: HFConfig) -> Tensor:
    """q [heads * d, ...], k and v [groups * d, ...] -> per group: its queries, its key, its value."""
    parts = [tensor.unflatten(0, (hf.text.num_kv_groups, -1)) for tensor in tensors]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _query_groups_back(tensor: Tensor, hf: HFConfig) -> list[Tensor]:
    queries = hf.text.num_heads // hf.text.num_kv_groups * hf.text.head_dim
    grouped = tensor.unflatten(0, (hf.text.num_kv_groups, -1))
    return [part.flatten(0, 1) for part in grouped.split([queries, hf.text.head_dim, hf.text.head_dim], dim=1)]


def _vision_heads(tensors: list[Tensor], hf: HFConfig) -> Tensor:
    """[q of all heads; k of all heads; v of all heads] -> per head: q, k, v."""
    return tensors[0].unflatten(0, (3, hf.vision.num_heads, -1)).transpose(0, 1).flatten(0, 2)


def _vision_heads_back(tensor: Tensor, hf: HFConfig) -> list[Tensor]:
    return [tensor.unflatten(0, (hf.vision.num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)]


def _gate_up(tensors: list[Tensor], hf: HFConfig) -> Tensor:
    return torch.cat(tensors)


def _gate_up_back(tensor: Tensor, hf: HFConfig) -> list[Tensor]:
    return list(tensor.chunk(2))


def _flat_patch(tensors: list[Tensor], hf: HFConfig) -> Tensor:
    """Convolution kernel [h, channels, time, rows, columns] -> linear weight [h, patch_values]."""
    return tensors[0].flatten(1)


def _flat_patch_back(tensor: Tensor, hf: HFConfig) -> list[Tensor]:
    vision = hf.vision
    return [tensor.unflatten(1, (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size))]


def _tied_twice(tensors: list[Tensor], hf: HFConfig) -> Tensor:
    """Some tied checkpoints carry the output layer all the same: it must be the embedding. Raises UserError."""
    if tensors[0].device.type != "meta" and not torch.equal(*tensors):
        raise UserError(
            "config.json says tie_word_embeddings, but lm_head.weight differs from embed_tokens.weight: correct either"
        )
    return tensors[0]


def _tied_twice_back(tensor: Tensor, hf: HFConfig) -> list[Tensor]:
    return [tensor, tensor]


LAYOUTS = {
    "same": Layout(_one, _one_back),
    "query_groups": Layout(_query_groups, _query_groups_back),
    "vision_heads": Layout(_vision_heads, _vision_heads_back),
    "gate_up": Layout(_gate_up, _gate_up_back),
    "flat_patch": Layout(_flat_patch, _flat_patch_back),
    "tied_twice": Layout(_tied_twice, _tied_twice_back),
}

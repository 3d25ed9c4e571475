"""The table: which tensors of a Hugging Face Qwen2.5-VL become which tensor of the Megatron model. Data, and its
expansion for one model.

Hugging Face names are those on disk (the official ones); `*` is the layer. megatron-core stacks the layers of a tensor
on a first axis. Shapes are written in the dimensions of `_dimensions`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_papo.checkpoint.layouts import LAYOUTS, Layout
from megatron_papo.model.hf_config import HFConfig


class MappingRow(NamedTuple):
    """One Megatron tensor and the Hugging Face tensors that it is made of."""

    megatron: str
    hf: Mapping[str, tuple[str, ...]]
    """Name -> shape."""
    layout: str = "same"


_TEXT, _VISION = "language_model.decoder.layers.", "vision_model.decoder.layers."

TEXT_LAYER = [
    MappingRow(_TEXT + "input_layernorm.weight", {"model.layers.*.input_layernorm.weight": ("hidden",)}),
    MappingRow(
        _TEXT + "self_attention.linear_qkv.weight",
        {
            "model.layers.*.self_attn.q_proj.weight": ("queries", "hidden"),
            "model.layers.*.self_attn.k_proj.weight": ("keys", "hidden"),
            "model.layers.*.self_attn.v_proj.weight": ("keys", "hidden"),
        },
        "query_groups",
    ),
    MappingRow(
        _TEXT + "self_attention.linear_qkv.bias",
        {
            "model.layers.*.self_attn.q_proj.bias": ("queries",),
            "model.layers.*.self_attn.k_proj.bias": ("keys",),
            "model.layers.*.self_attn.v_proj.bias": ("keys",),
        },
        "query_groups",
    ),
    MappingRow(
        _TEXT + "self_attention.linear_proj.weight", {"model.layers.*.self_attn.o_proj.weight": ("hidden", "queries")}
    ),
    MappingRow(_TEXT + "pre_mlp_layernorm.weight", {"model.layers.*.post_attention_layernorm.weight": ("hidden",)}),
    MappingRow(
        _TEXT + "mlp.linear_fc1.weight",
        {
            "model.layers.*.mlp.gate_proj.weight": ("ffn", "hidden"),
            "model.layers.*.mlp.up_proj.weight": ("ffn", "hidden"),
        },
        "gate_up",
    ),
    MappingRow(_TEXT + "mlp.linear_fc2.weight", {"model.layers.*.mlp.down_proj.weight": ("hidden", "ffn")}),
]

VISION_LAYER = [
    MappingRow(_VISION + "input_layernorm.weight", {"visual.blocks.*.norm1.weight": ("v_hidden",)}),
    MappingRow(
        _VISION + "self_attention.linear_qkv.weight",
        {"visual.blocks.*.attn.qkv.weight": ("v_qkv", "v_hidden")},
        "vision_heads",
    ),
    MappingRow(
        _VISION + "self_attention.linear_qkv.bias", {"visual.blocks.*.attn.qkv.bias": ("v_qkv",)}, "vision_heads"
    ),
    MappingRow(
        _VISION + "self_attention.linear_proj.weight", {"visual.blocks.*.attn.proj.weight": ("v_hidden", "v_hidden")}
    ),
    MappingRow(_VISION + "self_attention.linear_proj.bias", {"visual.blocks.*.attn.proj.bias": ("v_hidden",)}),
    MappingRow(_VISION + "pre_mlp_layernorm.weight", {"visual.blocks.*.norm2.weight": ("v_hidden",)}),
    MappingRow(
        _VISION + "mlp.linear_fc1.weight",
        {
            "visual.blocks.*.mlp.gate_proj.weight": ("v_ffn", "v_hidden"),
            "visual.blocks.*.mlp.up_proj.weight": ("v_ffn", "v_hidden"),
        },
        "gate_up",
    ),
    MappingRow(
        _VISION + "mlp.linear_fc1.bias",
        {"visual.blocks.*.mlp.gate_proj.bias": ("v_ffn",), "visual.blocks.*.mlp.up_proj.bias": ("v_ffn",)},
        "gate_up",
    ),
    MappingRow(_VISION + "mlp.linear_fc2.weight", {"visual.blocks.*.mlp.down_proj.weight": ("v_hidden", "v_ffn")}),
    MappingRow(_VISION + "mlp.linear_fc2.bias", {"visual.blocks.*.mlp.down_proj.bias": ("v_hidden",)}),
]

ONCE = [
    MappingRow("language_model.decoder.final_layernorm.weight", {"model.norm.weight": ("hidden",)}),
    MappingRow(
        "vision_model.patch_embed.weight",
        {"visual.patch_embed.proj.weight": ("v_hidden", "channels", "frames", "patch", "patch")},
        "flat_patch",
    ),
    MappingRow("vision_model.decoder.final_layernorm.weight", {"visual.merger.ln_q.weight": ("v_hidden",)}),
    MappingRow("vision_model.merger_fc1.weight", {"visual.merger.mlp.0.weight": ("v_cell", "v_cell")}),
    MappingRow("vision_model.merger_fc1.bias", {"visual.merger.mlp.0.bias": ("v_cell",)}),
    MappingRow("vision_model.merger_fc2.weight", {"visual.merger.mlp.2.weight": ("hidden", "v_cell")}),
    MappingRow("vision_model.merger_fc2.bias", {"visual.merger.mlp.2.bias": ("hidden",)}),
]

_EMBEDDING = {"model.embed_tokens.weight": ("vocabulary", "hidden")}
_HEAD = {"lm_head.weight": ("vocabulary", "hidden")}
UNTIED = [
    MappingRow("language_model.embedding.word_embeddings.weight", _EMBEDDING),
    MappingRow("language_model.output_layer.weight", _HEAD),
]
TIED = [MappingRow("language_model.embedding.word_embeddings.weight", _EMBEDDING)]
TIED_TWICE = [MappingRow("language_model.embedding.word_embeddings.weight", {**_EMBEDDING, **_HEAD}, "tied_twice")]


@dataclass(frozen=True)
class Piece:
    """One row at one layer: what is read, permuted and written at a time."""

    megatron: str
    layer: int | None
    """Index on the stacked first axis of the Megatron tensor; None where nothing is stacked."""
    num_layers: int
    megatron_shape: tuple[int, ...]
    """Of this piece, without the stacked axis."""
    hf_shapes: dict[str, tuple[int, ...]]
    layout: Layout

    @property
    def name(self) -> str:
        return self.megatron if self.layer is None else f"{self.megatron}[{self.layer}]"


def pieces(hf: HFConfig, tied_head_on_disk: bool = False) -> list[Piece]:
    """Every tensor of the model exactly once. tied_head_on_disk: a tied checkpoint that carries lm_head.weight all the
    same."""
    head = UNTIED if not hf.tie_word_embeddings else TIED_TWICE if tied_head_on_disk else TIED
    expanded = [_piece(row, None, 1, hf) for row in ONCE + head]
    for rows, count in ((TEXT_LAYER, hf.text.num_layers), (VISION_LAYER, hf.vision.depth)):
        expanded += [_piece(row, layer, count, hf) for layer in range(count) for row in rows]
    return expanded


def disk_name(name: str) -> str:
    """Return the official name of a tensor that was saved under transformers' in-memory name."""
    return re.sub(r"^model\.visual\.", "visual.", re.sub(r"^model\.language_model\.", "model.", name))


def _piece(row: MappingRow, layer: int | None, count: int, hf: HFConfig) -> Piece:
    sizes, layout = _dimensions(hf), LAYOUTS[row.layout]
    shapes = {name.replace("*", str(layer)): tuple(sizes[side] for side in shape) for name, shape in row.hf.items()}
    combined = layout.to_megatron([torch.empty(shape, device="meta") for shape in shapes.values()], hf)
    return Piece(row.megatron, layer, count, tuple(combined.shape), shapes, layout)


def _dimensions(hf: HFConfig) -> dict[str, int]:
    text, vision = hf.text, hf.vision
    return {
        "vocabulary": text.vocab_size,
        "hidden": text.hidden_size,
        "ffn": text.intermediate_size,
        "queries": text.num_heads * text.head_dim,
        "keys": text.num_kv_groups * text.head_dim,
        "v_hidden": vision.hidden_size,
        "v_ffn": vision.intermediate_size,
        "v_qkv": 3 * vision.hidden_size,
        "v_cell": vision.hidden_size * vision.spatial_merge_size**2,
        "channels": vision.in_channels,
        "frames": vision.temporal_patch_size,
        "patch": vision.patch_size,
    }

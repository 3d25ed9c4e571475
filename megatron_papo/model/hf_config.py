"""The architecture of a Qwen2.5-VL checkpoint, read from its config.json without transformers.

Three spellings of the same facts are in circulation and all are read: the official flat file (text fields at top level,
rope_theta and rope_scaling), the nested one of transformers 4.5x (text_config, the tie flag only inside it) and that of
transformers 5 (text_config.rope_parameters).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_papo.errors import UserError

HF_FILES = "hf"
"""Sub-directory of a Megatron checkpoint with the small files of the Hugging Face checkpoint it came from."""


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_groups: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    """How many rotary frequencies follow the temporal, the row and the column position; their sum is head_dim / 2."""
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    """Side of an attention window, in pixels."""
    full_attention_layers: tuple[int, ...]
    """Layers, from 0, that attend to the whole picture instead of a window."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened patch: 3 * 2 * 14 * 14 = 1176 in every published model."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class HFConfig:
    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]
    """Tokens that end a response: generation_config.json's when it names any, else config.json's."""


def read_hf_config(directory: Path) -> HFConfig:
    """The architecture of a Hugging Face checkpoint, or of a Megatron checkpoint made from one. Raises UserError."""
    directory = Path(directory)
    path = directory / "config.json"
    if not path.is_file() and (directory / HF_FILES / "config.json").is_file():
        path = directory / HF_FILES / "config.json"
    tree = _read_json(path)
    if tree.get("model_type") != "qwen2_5_vl":
        raise UserError(
            f"{path}: model_type is {tree.get('model_type')!r}, only qwen2_5_vl is supported: give a Qwen2.5-VL"
            " checkpoint"
        )
    try:
        return HFConfig(text=_text(tree), vision=_vision(tree), **_top_level(tree, path))
    except KeyError as error:
        raise UserError(f"{path}: missing key {error.args[0]}: this is not a complete Qwen2.5-VL configuration")
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: not a Qwen2.5-VL configuration: {error}")


def _read_json(path: Path) -> dict:
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror}): give the directory of a Qwen2.5-VL checkpoint")
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): copy the checkpoint again")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected an object: give the directory of a Qwen2.5-VL checkpoint")
    return tree


def _text(tree: dict) -> TextConfig:
    fields = tree.get("text_config") or tree
    rope = fields.get("rope_parameters") or {
        **(fields.get("rope_scaling") or {}),
        "rope_theta": fields.get("rope_theta"),
    }
    if rope.get("rope_theta") is None:
        raise KeyError("rope_theta")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise ValueError(f"rope type {kind} is not supported, only the plain one of the published models")
    time, row, column = rope["mrope_section"]
    text = TextConfig(
        vocab_size=int(fields["vocab_size"]),
        hidden_size=int(fields["hidden_size"]),
        intermediate_size=int(fields["intermediate_size"]),
        num_layers=int(fields["num_hidden_layers"]),
        num_heads=int(fields["num_attention_heads"]),
        num_kv_groups=int(fields.get("num_key_value_heads") or fields["num_attention_heads"]),
        rms_norm_eps=float(fields["rms_norm_eps"]),
        rope_theta=float(rope["rope_theta"]),
        mrope_section=(int(time), int(row), int(column)),
        max_position_embeddings=int(fields["max_position_embeddings"]),
    )
    if (
        fields.get("hidden_act", "silu") != "silu"
        or fields.get("use_sliding_window")
        or fields.get("attention_dropout")
    ):
        raise ValueError("hidden_act other than silu, sliding windows and attention dropout are not supported")
    if text.hidden_size % text.num_heads or text.num_heads % text.num_kv_groups:
        raise ValueError(
            f"{text.num_heads} heads in {text.num_kv_groups} groups do not divide hidden_size {text.hidden_size} evenly"
        )
    if 2 * sum(text.mrope_section) != text.head_dim or len(text.mrope_section) != 3:
        raise ValueError(
            f"mrope_section {list(text.mrope_section)} must be three numbers that add up to half of head_dim"
            f" {text.head_dim}"
        )
    return text


def _vision(tree: dict) -> VisionConfig:
    fields = tree["vision_config"]
    vision = VisionConfig(
        depth=int(fields["depth"]),
        hidden_size=int(fields["hidden_size"]),
        intermediate_size=int(fields["intermediate_size"]),
        num_heads=int(fields["num_heads"]),
        out_hidden_size=int(fields["out_hidden_size"]),
        in_channels=int(fields.get("in_channels") or fields.get("in_chans") or 3),
        patch_size=int(fields.get("patch_size", 14)),
        temporal_patch_size=int(fields.get("temporal_patch_size", 2)),
        spatial_merge_size=int(fields.get("spatial_merge_size", 2)),
        window_size=int(fields.get("window_size", 112)),
        full_attention_layers=tuple(int(layer) for layer in fields["fullatt_block_indexes"]),
    )
    if fields.get("hidden_act", "silu") != "silu":
        raise ValueError("a vision hidden_act other than silu is not supported")
    if vision.hidden_size % vision.num_heads or vision.head_dim % 4:
        raise ValueError(f"vision hidden_size {vision.hidden_size} / {vision.num_heads} heads must be a multiple of 4")
    if vision.out_hidden_size != int((tree.get("text_config") or tree)["hidden_size"]):
        raise ValueError(f"vision out_hidden_size {vision.out_hidden_size} differs from the text hidden_size")
    return vision


def _top_level(tree: dict, path: Path) -> dict:
    text = tree.get("text_config") or {}
    tied = tree["tie_word_embeddings"] if "tie_word_embeddings" in tree else text.get("tie_word_embeddings", False)
    generation = path.with_name("generation_config.json")
    eos = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    for tokens in (tree, text):
        eos = tokens.get("eos_token_id") if eos is None else eos
    return dict(
        tie_word_embeddings=bool(tied),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        **{
            name: int(tree[name])
            for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        },
    )

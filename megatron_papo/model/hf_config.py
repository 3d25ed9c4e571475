"""The architecture of a Qwen2.5-VL checkpoint, read from its config.json without transformers.

Three spellings of the same facts are in circulation and all are read: the official flat file (text fields at top level,
rope_theta and rope_scaling), the nested one of transformers 4.5x (text_config, the tie flag only inside it) and that of
transformers 5 (text_config.rope_parameters).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from megatron_papo.errors import UserError
from megatron_papo.reading import in_short, read_json, shown

HF_FILES = "hf"
"""Sub-directory of a Megatron checkpoint with the small files of the Hugging Face checkpoint it came from."""
_COPY = "copy the checkpoint again, or give the directory of a Qwen2.5-VL checkpoint"

Size = Annotated[int, Field(gt=0, lt=1 << 31)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Positive = Annotated[float, Field(gt=0)]
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=_STRICT)
class TextConfig:
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_layers: Size
    num_heads: Size
    num_kv_groups: Size
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)]
    rope_theta: Positive
    mrope_section: tuple[Size, Size, Size]
    """How many rotary frequencies follow the temporal, the row and the column position; their sum is head_dim / 2."""
    max_position_embeddings: Size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, config=_STRICT)
class VisionConfig:
    depth: Size
    hidden_size: Size
    intermediate_size: Size
    num_heads: Size
    out_hidden_size: Size
    in_channels: Size
    patch_size: Size
    temporal_patch_size: Size
    spatial_merge_size: Size
    window_size: Size
    """Side of an attention window, in pixels."""
    full_attention_layers: tuple[TokenId, ...]
    """Layers, from 0, that attend to the whole picture instead of a window."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened patch: 3 * 2 * 14 * 14 = 1176 in every published model."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, config=_STRICT)
class HFConfig:
    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    image_token_id: TokenId
    video_token_id: TokenId
    vision_start_token_id: TokenId | None
    vision_end_token_id: TokenId | None
    """Both: None where the file does not say; nothing is computed with them."""
    eos_token_ids: tuple[TokenId, ...]
    """Tokens that end a response: generation_config.json's when it names any, else config.json's."""


class _Supported(BaseModel):
    """What this package computes with one value only, wherever a file states it."""

    model_config = _STRICT
    hidden_act: Literal["silu"] = "silu"
    use_sliding_window: Literal[False] | None = None
    attention_dropout: Annotated[float, Field(ge=0, le=0)] | None = None
    quantization_config: None = None
    compression_config: None = None
    configuration_files: None = None
    """transformers would read another file than config.json."""


def read_hf_config(directory: Path) -> HFConfig:
    """The architecture of a Hugging Face checkpoint, or of a Megatron checkpoint made from one. Raises UserError."""
    directory = Path(directory)
    path = directory / "config.json"
    if not path.is_file() and (directory / HF_FILES / "config.json").is_file():
        path = directory / HF_FILES / "config.json"
    tree = read_json(path, _COPY)
    if tree.get("model_type") != "qwen2_5_vl":
        kind = shown(repr(tree.get("model_type")))
        raise UserError(f"{path}: model_type is {kind}, only qwen2_5_vl is supported: give a Qwen2.5-VL checkpoint")
    try:
        text, vision = _section(tree, "text_config"), _section(tree, "vision_config")
        # Each fact stands in text_config, at top level, or in both: then the section counts, as for transformers.
        flat = {**tree, **{key: value for key, value in text.items() if value is not None}}
        for section in (flat, vision):
            _Supported.model_validate(section)
        config = HFConfig(
            text=_text(flat),
            vision=_vision(vision),
            tie_word_embeddings=tree.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            image_token_id=flat["image_token_id"],
            video_token_id=flat["video_token_id"],
            vision_start_token_id=flat.get("vision_start_token_id"),
            vision_end_token_id=flat.get("vision_end_token_id"),
            eos_token_ids=_eos_token_ids(path, tree, text),
        )
        _check(config)
        return config
    except KeyError as error:
        raise UserError(f"{path}: missing key {error.args[0]}: this is not a complete Qwen2.5-VL configuration")
    except ValidationError as error:
        raise UserError(f"{path}: not a Qwen2.5-VL configuration: {in_short(error)}")
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: not a Qwen2.5-VL configuration: {shown(error)}")


def _section(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section of config.json; an empty one where it is missing or null."""
    section = tree.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{name} is no object")
    return section


def _text(fields: dict[str, Any]) -> TextConfig:
    rope = {"rope_theta": fields.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):  # of before and since transformers 5
        rope |= {key: value for key, value in _section(fields, name).items() if value is not None}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise ValueError(f"rope type {kind} is not supported, only the plain one of the published models")
    return TextConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        num_kv_groups=_first(fields, "num_key_value_heads", "num_attention_heads"),
        rms_norm_eps=fields["rms_norm_eps"],
        rope_theta=_first(rope, "rope_theta"),
        mrope_section=_tuple(_first(rope, "mrope_section")),
        max_position_embeddings=_first(fields | {"default": 32768}, "max_position_embeddings", "default"),
    )


def _vision(fields: dict[str, Any]) -> VisionConfig:
    return VisionConfig(
        depth=fields["depth"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_heads=fields["num_heads"],
        out_hidden_size=fields["out_hidden_size"],
        in_channels=_first(fields | {"published": 3}, "in_channels", "in_chans", "published"),
        patch_size=fields.get("patch_size", 14),
        temporal_patch_size=fields.get("temporal_patch_size", 2),
        spatial_merge_size=fields.get("spatial_merge_size", 2),
        window_size=fields.get("window_size", 112),
        full_attention_layers=_tuple(fields["fullatt_block_indexes"]),
    )


def _check(config: HFConfig) -> None:
    """Raise ValueError where numbers do not belong together."""
    text, vision = config.text, config.vision
    if text.hidden_size % text.num_heads or text.num_heads % text.num_kv_groups:
        raise ValueError(
            f"{text.num_heads} heads in {text.num_kv_groups} groups do not divide hidden_size {text.hidden_size} evenly"
        )
    if 2 * sum(text.mrope_section) != text.head_dim:
        raise ValueError(
            f"mrope_section {list(text.mrope_section)} must be three numbers that add up to half of head_dim"
            f" {text.head_dim}"
        )
    if vision.hidden_size % vision.num_heads or vision.head_dim % 4:
        raise ValueError(f"vision hidden_size {vision.hidden_size} / {vision.num_heads} heads must be a multiple of 4")
    if vision.out_hidden_size != text.hidden_size:
        raise ValueError(f"vision out_hidden_size {vision.out_hidden_size} differs from the text hidden_size")
    for name, number in (("image_token_id", config.image_token_id), ("video_token_id", config.video_token_id)):
        if number >= text.vocab_size:
            raise ValueError(f"{name} {number} lies beyond vocab_size {text.vocab_size}")
    if any(layer >= vision.depth for layer in vision.full_attention_layers):
        raise ValueError(f"fullatt_block_indexes {list(vision.full_attention_layers)} of {vision.depth} vision layers")


def _first(fields: Mapping[str, Any], *names: str) -> Any:
    """Return the value of the first of these keys that is there and not null. Raises KeyError."""
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    if value is None:
        raise KeyError(names[0])
    return value


def _tuple(value: Any) -> Any:
    """Return a list of JSON as the tuple that a frozen field wants, anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def _eos_token_ids(path: Path, tree: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    generation = path.with_name("generation_config.json")
    files = [read_json(generation, _COPY)] if generation.is_file() else []
    named = [fields["eos_token_id"] for fields in (*files, tree, text) if fields.get("eos_token_id") is not None]
    first = named[0] if named else []
    return _tuple(first if isinstance(first, list) else [first])

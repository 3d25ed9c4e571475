"""A tiny Qwen2.5-VL with random weights: the real architecture (windowed vision attention, mrope, grouped queries) at
0.4 M parameters."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_papo.synthetic.tiny_tokenizer import make_tiny_tokenizer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TinySizes:
    """The default is what the demo trains; tests choose others."""

    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    vision_hidden_size: int = 64
    vision_intermediate_size: int = 192
    vision_depth: int = 2
    vision_heads: int = 4
    full_attention_layers: tuple[int, ...] = (1,)
    window_size: int = 112
    vocab_size: int = 448
    tied: bool = True
    initializer_range: float = 0.08
    """With transformers' 0.02 a model this narrow does not learn to see within hundreds of steps."""
    random_biases_and_norms: bool = False
    """Transformers starts biases at 0 and norms at 1, which would hide a mix-up of two of them from a test."""

    @property
    def mrope_section(self) -> tuple[int, int, int]:
        """Rotary frequencies per coordinate, 2 : 3 : 3 as in the published models."""
        half = self.hidden_size // self.num_heads // 2
        spatial = half * 3 // 8
        return half - 2 * spatial, spatial, spatial


def make_tiny_model(directory: Path, seed: int, sizes: TinySizes = TinySizes()) -> None:
    """Write a Hugging Face checkpoint that transformers (4.57 to 5.x) and SGLang load: float32 safetensors with the
    official names.

    The same seed gives the same bytes.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    from megatron_papo.checkpoint.name_map import disk_name

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    make_tiny_tokenizer(directory, sizes.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    config = _official_config(sizes, tokenizer.convert_tokens_to_ids)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(directory, trust_remote_code=False))
        if sizes.random_biases_and_norms:
            _randomise(model, sizes.initializer_range)
    tensors = {disk_name(name): tensor for name, tensor in model.state_dict().items()}
    if sizes.tied:
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id")} | {
        "pad_token_id": config["bos_token_id"]
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    (directory / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR, indent=2))


def _randomise(model: "torch.nn.Module", spread: float) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * spread + (0.0 if name.endswith("bias") else 1.0))


def _official_config(sizes: TinySizes, token_id: Callable[[str], object]) -> dict:
    """Return config.json in the flat spelling of the published checkpoints, which every version of transformers and
    SGLang reads alike."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "vision_token_id": token_id("<|vision_pad|>"),
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": sizes.initializer_range,
        "intermediate_size": sizes.intermediate_size,
        "max_position_embeddings": 4096,
        "max_window_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": list(sizes.mrope_section)},
        "sliding_window": 4096,
        "use_sliding_window": False,
        "tie_word_embeddings": sizes.tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": sizes.vocab_size,
        "vision_config": {
            "depth": sizes.vision_depth,
            "hidden_act": "silu",
            "hidden_size": sizes.vision_hidden_size,
            "initializer_range": sizes.initializer_range,
            "intermediate_size": sizes.vision_intermediate_size,
            "num_heads": sizes.vision_heads,
            "in_channels": 3,
            "in_chans": 3,
            "out_hidden_size": sizes.hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": sizes.window_size,
            "fullatt_block_indexes": list(sizes.full_attention_layers),
        },
    }


_PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

"""config.json of the published Qwen2.5-VL models, as far as it decides on tensors, and a tiny one of the same shape."""

# fmt: off
_TEXT = {
    #       hidden heads kv layers MLP    vocabulary tied
    "tiny": (64,   8,    2, 4,     88,    260,       True),
    "3b":   (2048, 16,   2, 36,    11008, 151936,    True),
    "7b":   (3584, 28,   4, 28,    18944, 152064,    False),
    "32b":  (5120, 40,   8, 64,    27648, 152064,    False),
    "72b":  (8192, 64,   8, 80,    29568, 152064,    False),
}
_VISION = {
    #       hidden heads layers MLP
    "tiny": (32,   4,    3,     44),
    "3b":   (1280, 16,   32,    3420),
    "7b":   (1280, 16,   32,    3420),
    "32b":  (1280, 16,   32,    3456),
    "72b":  (1280, 16,   32,    3456),
}
# fmt: on
NAMES = tuple(_TEXT)


def config_tree(name: str) -> dict:
    """Return the flat config.json of Qwen/Qwen2.5-VL-<NAME>-Instruct, or of a tiny model."""
    hidden, heads, groups, layers, mlp, vocabulary, tied = _TEXT[name]
    vision_hidden, vision_heads, vision_layers, vision_mlp = _VISION[name]
    half = hidden // heads // 2
    spatial = half * 3 // 8
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * spatial, spatial, spatial]},
        **{
            f"{what}_token_id": vocabulary - back
            for back, what in enumerate(("video", "image", "vision_end", "vision_start", "eos"), start=1)
        },
        "vision_config": {
            "depth": vision_layers,
            "hidden_act": "silu",
            "hidden_size": vision_hidden,
            "intermediate_size": vision_mlp,
            "num_heads": vision_heads,
            "in_channels": 3,
            "in_chans": 3,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [layer for layer in range(vision_layers) if layer % 8 == 7] or [1],
        },
    }

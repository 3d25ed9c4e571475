"""read_hf_config on the three spellings of config.json, against transformers' own reading, and on files that do not
belong."""

import json

import pytest

from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HF_FILES, read_hf_config
from tests.workers import random_model

OFFICIAL_3B = {  # as published, Qwen/Qwen2.5-VL-3B-Instruct
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
OFFICIAL_7B = {
    **OFFICIAL_3B,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vision_config": {**OFFICIAL_3B["vision_config"], "out_hidden_size": 3584},
    "vocab_size": 152064,
}


def write(directory, tree, name="config.json"):
    (directory / name).write_text(json.dumps(tree))
    return directory


def test_official_flat_file(tmp_path):
    hf = read_hf_config(write(tmp_path, OFFICIAL_3B))
    assert (hf.text.num_layers, hf.text.head_dim, hf.text.num_kv_groups, hf.text.mrope_section) == (
        36,
        128,
        2,
        (16, 24, 24),
    )
    assert (hf.vision.full_attention_layers, hf.vision.patch_values, hf.vision.head_dim) == ((7, 15, 23, 31), 1176, 80)
    assert hf.tie_word_embeddings and hf.eos_token_ids == (151645,) and hf.image_token_id == 151655


def test_generation_config_names_the_tokens_that_end_a_response(tmp_path):
    write(tmp_path, {"eos_token_id": [151645, 151643]}, "generation_config.json")
    assert read_hf_config(write(tmp_path, OFFICIAL_3B)).eos_token_ids == (151645, 151643)


@pytest.mark.parametrize("tied", [True, False])
def test_every_spelling_says_the_same(tmp_path, tied):
    config = random_model.hf_config(tied)
    config.save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    expected = read_hf_config(tmp_path)
    assert expected.text.rope_theta == config.text_config.rope_parameters["rope_theta"] == 1e6
    assert expected.text.intermediate_size == config.text_config.intermediate_size
    assert expected.vision.intermediate_size == config.vision_config.intermediate_size
    assert expected.tie_word_embeddings is tied
    # transformers 4.57: the tie flag and the token ids only inside text_config, rope the old way
    text = {key: value for key, value in new["text_config"].items() if key != "rope_parameters"}
    text |= {
        "rope_theta": 1e6,
        "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]},
        "tie_word_embeddings": tied,
    }
    old = {key: value for key, value in new.items() if key not in ("tie_word_embeddings", "eos_token_id")} | {
        "text_config": text
    }
    assert read_hf_config(write(tmp_path, old)) == expected
    # official: flat
    flat = {**old, **text, "model_type": "qwen2_5_vl"}
    del flat["text_config"]
    assert read_hf_config(write(tmp_path, flat)) == expected


def test_a_megatron_checkpoint_is_read_through_its_folder(tmp_path):
    (tmp_path / HF_FILES).mkdir()
    write(tmp_path / HF_FILES, OFFICIAL_7B)
    assert read_hf_config(tmp_path).text.vocab_size == 152064


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen2_vl"}, "model_type"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 23]}}, "mrope_section"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "mrope_section": [16, 24, 24]}}, "rope type yarn"),
        ({"use_sliding_window": True}, "sliding"),
        ({"num_key_value_heads": 3}, "3 groups"),
        ({"vocab_size": None}, "not a Qwen2.5-VL"),
    ],
)
def test_foreign_configurations_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        read_hf_config(write(tmp_path, {**OFFICIAL_3B, **change}))
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_missing_keys_and_files_are_named(tmp_path):
    with pytest.raises(UserError, match="config.json: cannot be read"):
        read_hf_config(tmp_path / "nothing")
    without = {key: value for key, value in OFFICIAL_3B.items() if key != "intermediate_size"}
    with pytest.raises(UserError, match="missing key intermediate_size"):
        read_hf_config(write(tmp_path, without))
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match="not JSON"):
        read_hf_config(tmp_path)


TEXT_NUMBERS = ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size"]


@pytest.mark.parametrize("value", [0, -1, 1.5, 1 << 70, "16", True, None, [], {}], ids=repr)
@pytest.mark.parametrize("key", TEXT_NUMBERS)
def test_impossible_sizes_are_refused(tmp_path, key, value):
    with pytest.raises(UserError, match="config.json: ") as said:
        read_hf_config(write(tmp_path, {**OFFICIAL_3B, key: value}))
    assert len(said.value.lines) == 1


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({**OFFICIAL_3B, "rope_theta": float("nan")}),
        json.dumps({**OFFICIAL_3B, "rms_norm_eps": float("inf")}),
        json.dumps({**OFFICIAL_3B, "rms_norm_eps": -1.0}),
        json.dumps({**OFFICIAL_3B, "rope_theta": 0}),
        json.dumps(OFFICIAL_3B).replace("1000000.0", "1e999"),
        json.dumps({**OFFICIAL_3B, "rope_scaling": [1]}),
        json.dumps({**OFFICIAL_3B, "rope_scaling": {"mrope_section": [16, 24, "24"]}}),
        json.dumps({**OFFICIAL_3B, "vision_config": []}),
        json.dumps({**OFFICIAL_3B, "vision_config": {**OFFICIAL_3B["vision_config"], "depth": -32}}),
        json.dumps({**OFFICIAL_3B, "vision_config": {**OFFICIAL_3B["vision_config"], "fullatt_block_indexes": [99]}}),
        json.dumps({**OFFICIAL_3B, "text_config": 3}),
        json.dumps({**OFFICIAL_3B, "image_token_id": 151936}),
        json.dumps({**OFFICIAL_3B, "eos_token_id": "151645"}),
        json.dumps({**OFFICIAL_3B, "tie_word_embeddings": "yes"}),
        json.dumps({**OFFICIAL_3B, "quantization_config": {"quant_method": "awq"}}),
        json.dumps({**OFFICIAL_3B, "configuration_files": ["config.4.57.0.json"]}),
        "[" * 100_000,
        "\xff",
    ],
)
def test_impossible_configurations_are_one_line(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="config.json: ") as said:
        read_hf_config(tmp_path)
    assert len(said.value.lines) == 1 and len(str(said.value)) < 600


@pytest.mark.parametrize(
    "key", ["vision_start_token_id", "vision_end_token_id", "max_position_embeddings", "eos_token_id", "torch_dtype"]
)
def test_keys_that_nothing_computes_with_may_be_missing(tmp_path, key):
    without = {name: value for name, value in OFFICIAL_3B.items() if name != key}
    assert read_hf_config(write(tmp_path, without)).text.hidden_size == 2048


@pytest.mark.parametrize("move", [("image_token_id", "video_token_id"), ("vocab_size",), ("rope_theta",)])
def test_a_fact_may_stand_in_the_section_or_above(tmp_path, move):
    expected = read_hf_config(write(tmp_path, OFFICIAL_3B))
    below = {key: OFFICIAL_3B[key] for key in move}
    tree = {key: value for key, value in OFFICIAL_3B.items() if key not in move} | {"text_config": below}
    assert read_hf_config(write(tmp_path, tree)) == expected
    new = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [16, 24, 24]}}
    tree = {key: value for key, value in OFFICIAL_3B.items() if not key.startswith("rope")} | {"text_config": new}
    assert read_hf_config(write(tmp_path, tree)) == expected

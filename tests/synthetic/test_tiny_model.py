"""The tiny checkpoint is one that transformers itself could have written: same names, shapes and meaning of its
configuration."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model
from megatron_papo.synthetic.tiny_tokenizer import SPECIAL_TOKENS

OTHER = TinySizes(
    hidden_size=96,
    intermediate_size=160,
    num_layers=3,
    num_heads=6,
    num_kv_heads=3,
    vision_hidden_size=80,
    vision_intermediate_size=112,
    vision_depth=3,
    vision_heads=5,
    full_attention_layers=(0, 2),
    window_size=56,
    vocab_size=512,
    tied=False,
    random_biases_and_norms=True,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_hf):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_hf)


@pytest.mark.parametrize("sizes", [TinySizes(), OTHER], ids=["demo", "other"])
def test_equal_to_what_transformers_saves(sizes, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    make_tiny_model(tmp_path / "a", 5, sizes)
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report.values()), report
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == sizes.tied
    model.save_pretrained(tmp_path / "b")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (
        sizes.hidden_size, sizes.num_layers, sizes.num_heads, sizes.num_kv_heads,
    )  # fmt: skip
    assert text.vocab_size == sizes.vocab_size and text.intermediate_size == sizes.intermediate_size
    assert sum(text.rope_parameters["mrope_section"]) * 2 == sizes.hidden_size // sizes.num_heads
    assert (vision.depth, vision.num_heads, vision.window_size) == (
        sizes.vision_depth,
        sizes.vision_heads,
        sizes.window_size,
    )
    assert tuple(vision.fullatt_block_indexes) == sizes.full_attention_layers
    assert vision.hidden_size == sizes.vision_hidden_size and vision.out_hidden_size == sizes.hidden_size
    assert abs(ours["model.embed_tokens.weight"].std() - sizes.initializer_range) < 0.01
    biases = torch.cat([tensor for name, tensor in ours.items() if name.endswith("bias")])
    assert (biases.std() > 0.01) == sizes.random_biases_and_norms


def test_demo_size_and_same_bytes_for_the_same_seed(tiny_hf, tmp_path):
    tensors = load_file(tiny_hf / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == 393_280
    assert "lm_head.weight" not in tensors
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_tiny_model(tmp_path / name, seed)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    same = [file for file in files if (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()]
    assert same == files
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (tmp_path / "c" / "model.safetensors").read_bytes()


def test_config_is_in_the_official_flat_spelling(tiny_hf):
    config = json.loads((tiny_hf / "config.json").read_text())
    assert (
        "text_config" not in config
        and config["rope_scaling"]["type"] == "mrope"
        and config["tie_word_embeddings"] is True
    )
    assert config["vocab_size"] % 64 == 0
    assert json.loads((tiny_hf / "generation_config.json").read_text())["eos_token_id"] == config["eos_token_id"]


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in (
        "How many squares are there?",
        "naïve Größe 数学 🙂\t x² \n\n 12345",
        "<think>I count 3 squares.</think>\\boxed{3}",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 448
    assert len(set(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))) == len(SPECIAL_TOKENS)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_demo_prompts_and_responses_are_short(tokenizer):
    assert len(tokenizer("<think>I count 3 squares.</think>\\boxed{3}<|im_end|>")["input_ids"]) <= 14
    assert len(tokenizer("How many squares are there?")["input_ids"]) <= 6


def test_chat_template(tokenizer):
    content = [{"type": "image"}, {"type": "text", "text": "How many?"}, {"type": "image"}]
    user = {"role": "user", "content": content}
    expected = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How"
        " many?<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == expected
    system = {"role": "system", "content": "Be brief."}
    with_system = tokenizer.apply_chat_template([system, user], tokenize=False, add_generation_prompt=True)
    assert with_system == "<|im_start|>system\nBe brief.<|im_end|>\n" + expected

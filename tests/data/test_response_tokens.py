"""What a response may consist of, by the files of a checkpoint: where SGLang would stop, and what it may sample."""

import json

import pytest

from megatron_papo.data.response_tokens import response_tokens
from megatron_papo.errors import UserError

VOCABULARY = {"a": 0, "b": 1, "<|endoftext|>": 2, "<|im_end|>": 3, "<|image_pad|>": 4}


def write(directory, config=None, **files):
    (directory / "config.json").write_text(json.dumps({"vocab_size": 7} if config is None else config))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    "config, files, ends",
    [
        ({"vocab_size": 7, "eos_token_id": 3}, {}, {3}),
        ({"vocab_size": 7, "eos_token_id": 3}, {"generation_config": {"eos_token_id": [3, 2]}}, {2, 3}),
        ({"text_config": {"vocab_size": 7, "eos_token_id": 2}}, {"generation_config": {}}, {2}),
        ({"vocab_size": 7}, {"tokenizer_config": {"eos_token": "<|im_end|>"}}, {3}),
        ({"vocab_size": 7}, {"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, {3}),
        ({"vocab_size": 7}, {"tokenizer_config": {"eos_token": None}}, set()),
    ],
)
def test_every_file_may_name_an_end_of_turn(tmp_path, config, files, ends):
    tokens = response_tokens(write(tmp_path, config, **files), VOCABULARY)
    assert tokens.ends == ends and tokens.vocabulary_size == 7
    assert tokens.forbidden == (4, 5, 6)  # the picture's token, and what pads the embedding


@pytest.mark.parametrize("wrong", ["x", [["y"]], {"z": 1}])
def test_ends_that_are_no_ids_name_the_file(tmp_path, wrong):
    write(tmp_path, generation_config={"eos_token_id": wrong})
    with pytest.raises(UserError, match="generation_config.json: "):
        response_tokens(tmp_path, VOCABULARY)

"""A model directory is told apart by what is read of it."""

import os
import re
import shutil

import pytest

from megatron_papo.checkpoint.hf_files import HFCheckpoint
from megatron_papo.checkpoint.model_files import files_read, model_fingerprint
from megatron_papo.errors import UserError
from megatron_papo.run.stage_output import file_hash
from megatron_papo.synthetic.tiny_model import make_tiny_model
from tests.workers import random_model


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A model of one file."""
    directory = tmp_path_factory.mktemp("single") / "model"
    make_tiny_model(directory, seed=1)
    return directory


@pytest.fixture(scope="module")
def original(tmp_path_factory, single):
    """A sharded model with a tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "model"
    shutil.copytree(single, directory)
    (directory / "model.safetensors").unlink()
    random_model.save(random_model.make(False), directory, max_shard_size="400KB")
    for name in ("vocab.json", "merges.txt", "processor_config.json", "special_tokens_map.json"):
        (directory / name).write_text(f"{name}, for example")
    return directory


@pytest.fixture
def model(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


READ = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]


def test_moved_or_downloaded_again_it_is_the_same(original, tmp_path):
    before = model_fingerprint(original)
    copied = shutil.copytree(original, tmp_path / "deep" / "copy", copy_function=shutil.copyfile)
    os.utime(copied / "config.json", (1, 1))
    assert model_fingerprint(copied) == before
    linked = tmp_path / "snapshot"  # as the Hub's cache lays it out
    linked.mkdir()
    for number, file in enumerate(sorted(original.iterdir())):
        shutil.copyfile(file, tmp_path / f"blob{number}")
        (linked / file.name).symlink_to(tmp_path / f"blob{number}")
    assert model_fingerprint(linked) == before


def test_what_nobody_reads_does_not_count(model):
    before = model_fingerprint(model)
    for name in ("README.md", "LICENSE", ".gitattributes", ".DS_Store", "trainer_state.json", "training_args.bin"):
        (model / name).write_text("anything")
    for name in (".git", ".cache/huggingface/download"):
        (model / name).mkdir(parents=True)
        (model / name / "config.json").write_text("{}")
    (model / "._model.safetensors").write_bytes(b"of a file browser")
    assert model_fingerprint(model) == before
    assert files_read(model) == READ


@pytest.mark.parametrize("name", READ)
def test_a_changed_byte_is_another_model(model, name):
    before = model_fingerprint(model)
    content = (model / name).read_bytes()
    at = content.index(b'"total_size": ') + 14 if name.endswith("index.json") else len(content) - 1
    changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    (model / name).write_bytes(changed)
    assert model_fingerprint(model) != before
    (model / name).write_bytes(content)
    assert model_fingerprint(model) == before


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.json",
        "added_tokens.json",
        "video_preprocessor_config.json",
        "tokenizer.model",
        "additional_chat_templates/tool_use.jinja",
    ],
)
def test_another_file_that_is_read_is_another_model(model, name):
    before = model_fingerprint(model)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("new")
    assert model_fingerprint(model) != before
    (model / name).unlink()
    assert model_fingerprint(model) == before


@pytest.mark.parametrize(
    "name",
    [
        "model_backup.safetensors",  # SGLang loads every safetensors file where there is no index
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "consolidated.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "config.4.57.0.json",
        "tokenizer.4.0.json",
        "adapter_config.json",
        "quantize_config.json",
        "hf_quant_config.json",
    ],
)
def test_two_models_in_one_directory_are_refused_with_both_names(single, tmp_path, name):
    model = shutil.copytree(single, tmp_path / "model")
    before = model_fingerprint(model)
    (model / name).write_bytes((model / "model.safetensors").read_bytes() if "index" not in name else b"{}")
    for reader in (model_fingerprint, HFCheckpoint):
        with pytest.raises(UserError, match=rf"{re.escape(name)} lies beside model.safetensors: .*: remove one"):
            reader(model)
    (model / name).unlink()
    assert model_fingerprint(model) == before
    (model / "pytorch_model.bin").write_bytes(b"nobody takes it where there are safetensors")
    assert model_fingerprint(model) == before


def test_an_index_with_shards_and_a_single_file_are_two_models(model, single):
    shutil.copyfile(single / "model.safetensors", model / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors lies beside model.safetensors.index.json and the files it"):
        model_fingerprint(model)
    (model / "model.safetensors").unlink()
    model_fingerprint(model)


@pytest.mark.parametrize("content", ["[]", "1", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[" * 5000,
                                     '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": "' + "n" * 300 + '"}}',
                                     '{"weight_map": {"a": "b\\u0000"}}', "\xff"])  # fmt: skip
def test_an_index_that_is_none_is_one_line(model, content):
    (model / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="model.safetensors.index.json: .*damaged index: copy the checkpoint again"):
        model_fingerprint(model)


def test_hashes_that_are_known_are_not_taken_again(model):
    shard = "model-00001-of-00003.safetensors"
    before = model_fingerprint(model)
    assert model_fingerprint(model, {shard: file_hash(model / shard)}) == before
    assert model_fingerprint(model, {shard: "another"}) != before  # control: the hash is used
    assert model_fingerprint(model, {"README.md": "another"}) == before


def test_an_incomplete_model_is_refused(model, tmp_path):
    (model / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors named in .* is not there"):
        model_fingerprint(model)
    with pytest.raises(UserError, match="nothing: not there, or not a directory"):
        model_fingerprint(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "model.safetensors.index.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["dangling", "loop", "directory"])
def test_names_without_a_file_are_named(model, name, kind):
    path = model / name
    path.unlink()
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else "../../blobs/1234")
    cure = "a directory where a file" if kind == "directory" else "a link to nothing: copy the checkpoint again, links"
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {cure}"):
        model_fingerprint(model)

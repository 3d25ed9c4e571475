"""What an exported checkpoint carries besides weights: a flat config.json, the small files, a model card; and what
inspect says of it."""

import json
import shutil
import sys

import pytest
import torch
import yaml

from megatron_papo.checkpoint import config_json, conversion_output, model_card
from megatron_papo.checkpoint.convert import HFCheckpoint, hf_to_megatron
from megatron_papo.checkpoint.inspect import describe
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.run.manifest import read_manifest
from tests.workers import random_model

FROM_4_57 = {  # written by transformers 4.57.6 for the sizes of tests.workers.random_model, tied
    "dtype": "float32",
    "image_token_id": 250,
    "model_type": "qwen2_5_vl",
    "text_config": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.1,
        "intermediate_size": 88,
        "layer_types": ["full_attention", "full_attention", "full_attention", "full_attention"],
        "max_position_embeddings": 512,
        "max_window_layers": 80,
        "model_type": "qwen2_5_vl_text",
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 260,
    },
    "transformers_version": "4.57.6",
    "video_token_id": 251,
    "vision_config": {
        "depth": 3,
        "fullatt_block_indexes": [1],
        "hidden_act": "silu",
        "hidden_size": 32,
        "in_channels": 3,
        "initializer_range": 0.1,
        "intermediate_size": 44,
        "model_type": "qwen2_5_vl",
        "num_heads": 4,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 4,
        "window_size": 112,
    },
    "vision_end_token_id": 253,
    "vision_start_token_id": 252,
}
CARD = """---
license: other
license_name: qwen-research
language: [en]
pipeline_tag: something-else
---
# The base model
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A tied checkpoint as transformers 5 saves it, with the files a published one has, and its Megatron
    counterpart."""
    root = tmp_path_factory.mktemp("exports")
    random_model.save(random_model.make(True), root / "hf")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "chat_template.json",
        "vocab.json",
        "merges.txt",
    ):
        (root / "hf" / name).write_text(f'{{"this is": "{name}"}}')
    (root / "hf" / "README.md").write_text(CARD)
    conversion_output.to_megatron(root / "hf", root / "megatron", {})
    return root


def test_small_files_travel_and_config_becomes_flat(converted, tmp_path):
    conversion_output.to_hf(converted / "megatron", tmp_path / "back", {})
    names = {
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "chat_template.json",
        "vocab.json",
        "merges.txt",
    }
    for name in names | {"generation_config.json", "README.md"}:
        assert (tmp_path / "back" / name).read_bytes() == (converted / "hf" / name).read_bytes()
    tree = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "text_config" not in tree and "text_config" in json.loads((converted / "hf" / "config.json").read_text())


@pytest.mark.parametrize("version", ["5", "4.57"])
def test_a_nested_config_and_its_flat_spelling_are_one_model(converted, tmp_path, version):
    """To this package, and to transformers: the same weights give the same logits, tie included."""
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    source = shutil.copytree(converted / "hf", tmp_path / "source")
    if version == "4.57":
        (source / "config.json").write_text(json.dumps(FROM_4_57))
    flat = shutil.copytree(source, tmp_path / "flat")
    config_json.flatten(flat, True)
    assert read_hf_config(flat) == read_hf_config(source) == read_hf_config(converted / "hf")
    theirs = AutoConfig.from_pretrained(flat)
    reference = AutoConfig.from_pretrained(converted / "hf")
    for key in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "intermediate_size",
        "rms_norm_eps",
        "eos_token_id",
    ):
        assert getattr(theirs.text_config, key) == getattr(reference.text_config, key), key
    assert (
        theirs.text_config.rope_parameters["mrope_section"] == [1, 1, 2]
        and theirs.text_config.rope_parameters["rope_theta"] == 1e6
    )
    assert theirs.tie_word_embeddings is True and theirs.image_token_id == 250
    assert theirs.architectures == ["Qwen2_5_VLForConditionalGeneration"]
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = [
            Qwen2_5_VLForConditionalGeneration.from_pretrained(path)(input_ids=ids).logits
            for path in (flat, converted / "hf")
        ]
    assert torch.equal(*logits)


def test_a_flat_config_stays_as_it_is(tmp_path):
    tree = config_json.flat(FROM_4_57, True)
    (tmp_path / "config.json").write_text(json.dumps(tree, indent=7))
    config_json.flatten(tmp_path, True)
    assert (tmp_path / "config.json").read_text() == json.dumps(tree, indent=7)


@pytest.fixture(scope="module")
def trained(converted):
    """The Megatron checkpoint as stage 5 would leave it after step 12 of iteration 3, without training anything."""
    directory = shutil.copytree(converted / "megatron", converted / "trained")
    torch.save(
        {"state": {"step": 12}, "saved_from": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4}},
        directory / "common.pt",
    )
    (directory / "proof.json").unlink()
    manifest = {
        "stage": "stage5_train",
        "fingerprint": "f" * 64,
        "git_commit": "c" * 40,
        "files": {},
        "command": "train",
        "recipe": {
            "arguments": {"iteration": 3},
            "config": {"objective": {"kl_prcp_coef": 0.02, "average": "token"}, "seed": 5},
        },
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_the_card_of_a_trained_model_says_how_it_was_trained(trained, tmp_path):
    conversion_output.to_hf(trained, tmp_path / "out", {})
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (
        front["license"] == "other"
        and front["license_name"] == "qwen-research"
        and front["pipeline_tag"] == "image-text-to-text"
    )
    for part in (
        "12 optimizer steps, 3 iterations",
        "| objective.kl_prcp_coef | 0.02 |",
        "| seed | 5 |",
        "f" * 64,
        "2507.06448",
    ):
        assert part in text
    assert (tmp_path / "out" / "README_base_model.md").read_text() == CARD


CARDS = {
    "Latin-1": ("---\nlicense: other\nauthor: caf\xe9\n---\n".encode("latin-1"), {"license": "other"}),
    "an impossible date": (b"---\nlicense: other\ndate: 2024-13-45\n---\n", {"license": "other"}),
    "Norwegian": (b"---\nlanguage: no\n---\n", {"language": "no"}),
    "aliases": (b"---\na: &a [x]\nlanguage: *a\n---\n", {"language": ["x"]}),
    "an object": (b"---\nbase_model: !!python/object:os.system {a: 1}\n---\n", {}),
    "huge": (b"---\nlicense: other\n---\n" + b"x" * 10_000_000, {"license": "other"}),
    "nothing": (b"", {}),
}


@pytest.mark.parametrize("card, carried", CARDS.values(), ids=CARDS)
def test_what_is_carried_over_from_the_base_models_card(tmp_path, card, carried):
    (tmp_path / "README.md").write_bytes(card)
    assert model_card._front_matter(tmp_path / "README.md") == carried


@pytest.mark.parametrize(
    "damage", [b"tags: " + b"[" * 5000 + b"\n---\n", b"license: other\n"], ids=["nested", "no end"]
)
def test_a_damaged_card_of_the_base_model_ends_no_export(trained, tmp_path, damage, capfd):
    """It describes: the export is made, with a card that says less."""
    shutil.copytree(trained, tmp_path / "trained")
    (tmp_path / "trained" / "hf" / "README.md").write_bytes(b"---\n" + damage)
    conversion_output.to_hf(tmp_path / "trained", tmp_path / "out", {})
    text = (tmp_path / "out" / "README.md").read_text()
    assert "12 optimizer steps" in text and "license" not in yaml.safe_load(text.split("---")[1])
    assert (tmp_path / "out" / "README_base_model.md").read_bytes() == b"---\n" + damage
    assert "README.md: license and language of the base model: left out: " in capfd.readouterr().err


def test_a_card_that_cannot_be_made_leaves_the_export(trained, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(model_card, "model_card", lambda *_: 1 / 0)
    conversion_output.to_hf(trained, tmp_path / "out", {})
    assert (tmp_path / "out" / "README.md").read_text() == CARD and read_manifest(tmp_path / "out") is not None
    assert "how the model was trained: left out" in capfd.readouterr().err


def test_inspect(converted, trained):
    facts = describe(converted / "hf")
    assert (
        facts["format"].startswith("hugging face") and facts["tie_word_embeddings"] is True and facts["proof"] == "none"
    )
    assert facts["parameters"] == sum(parameter.numel() for parameter in random_model.make(True).parameters())
    assert facts["text"]["layers"] == 4 and facts["vision"]["layers"] == 3 and facts["dtypes"] == {"float32": 92}
    assert facts["bytes"] == 4 * facts["parameters"]
    converted_facts, trained_facts = describe(converted / "megatron"), describe(trained)
    assert converted_facts["step"] is None and converted_facts["saved_from"] == {"tensor_model_parallel_size": 1}
    assert (
        converted_facts["proof"].startswith("passed: hf_to_megatron of 92 tensors")
        and converted_facts["optimizer_bytes"] == 0
    )
    assert trained_facts["step"] == 12 and trained_facts["saved_from"]["pipeline_model_parallel_size"] == 4
    assert trained_facts["proof"] == "none" and trained_facts["made_by"]["stage"] == "stage5_train"


def test_inspect_says_where_a_proof_fails(converted, tmp_path):
    directory = shutil.copytree(converted / "megatron", tmp_path / "megatron")
    path = directory / "proof.json"
    path.write_text(path.read_text().replace('"passed": true', '"passed": false'))
    assert describe(directory)["proof"].startswith("FAILED: ") and "not exact" in describe(directory)["proof"]
    with pytest.raises(UserError, match="not a directory"):
        describe(tmp_path / "nothing")


def test_an_export_leaves_the_training_checkpoint_alone(trained, tmp_path):
    """Also one that may not be written to: what a run goes on with is what it saved."""

    def state():
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(trained.rglob("*")) if path.is_file()
        }

    before = state()
    conversion_output.to_hf(trained, tmp_path / "out", {})
    assert state() == before and not list(trained.parent.glob("trained.*"))


def test_a_checkpoint_from_outside_is_told_apart_by_what_is_exported_of_it(converted, tmp_path, capsys):
    """Without a manifest: moved it is the same; weights of the same shape in files of the same sizes are another."""
    source = shutil.copytree(converted / "megatron", tmp_path / "source")
    (source / "manifest.json").unlink()
    conversion_output.to_hf(source, tmp_path / "out", {})
    moved = source.rename(tmp_path / "moved")
    (moved / "notes.txt").write_text("nobody reads this")
    capsys.readouterr()
    conversion_output.to_hf(moved, tmp_path / "out", {})
    assert "nothing to do" in capsys.readouterr().out
    model = random_model.make(True)
    with torch.no_grad():
        model.model.language_model.norm.weight[3] += 1
    random_model.save(model, tmp_path / "hf")
    other = tmp_path / "other"
    other.mkdir()
    hf_to_megatron(HFCheckpoint(tmp_path / "hf"), other)
    shutil.rmtree(other / "hf")
    shutil.copytree(moved / "hf", other / "hf")
    for name in (".metadata", "common.pt", "metadata.json"):
        assert (other / name).read_bytes() == (moved / name).read_bytes()
    assert [file.stat().st_size for file in sorted(other.glob("*.distcp"))] == [
        file.stat().st_size for file in sorted(moved.glob("*.distcp"))
    ]
    with pytest.raises(UserError, match="out: made from something else .*inputs.megatron"):
        conversion_output.to_hf(other, tmp_path / "out", {})
    (moved / "hf" / "tokenizer.json").write_text("another")
    with pytest.raises(UserError, match="out: made from something else .*inputs.megatron"):
        conversion_output.to_hf(moved, tmp_path / "out", {})


_opened: list[str] | None = None


def _watch(event, arguments):
    if event == "open" and _opened is not None and isinstance(arguments[0], str):
        _opened.append(arguments[0])


def test_an_export_reads_records_once(converted, tmp_path):
    """The manifest: to know what it is and to verify its files. The proof: once."""
    global _opened
    sys.addaudithook(_watch)
    _opened = []
    conversion_output.to_hf(converted / "megatron", tmp_path / "out", {})
    names, _opened = _opened, None
    count = {name: names.count(str(converted / "megatron" / name)) for name in ("manifest.json", "proof.json")}
    assert count["manifest.json"] <= 2
    assert count["proof.json"] == 2  # and hashed once among the files of the manifest

"""Hugging Face -> Megatron -> Hugging Face is bitwise, every tensor exactly once; what does not belong is refused
before anything is written."""

import hashlib
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_papo.checkpoint import convert, torch_dist_writer
from megatron_papo.checkpoint.convert import (
    HFCheckpoint,
    MegatronCheckpoint,
    hf_to_megatron,
    megatron_to_hf,
    open_checkpoint,
)
from megatron_papo.checkpoint.hf_files import HEADERS
from megatron_papo.checkpoint.name_map import pieces
from megatron_papo.checkpoint.proof import require_proof
from megatron_papo.checkpoint.torch_dist_files import TorchDistCheckpoint
from megatron_papo.checkpoint.verify import differences
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import read_hf_config
from tests.model.test_hf_config import OFFICIAL_3B, OFFICIAL_7B
from tests.workers import random_model


def to_megatron(source, target):
    target.mkdir()
    hf_to_megatron(HFCheckpoint(source), target)
    return target


def to_hf(source, target):
    target.mkdir()
    megatron_to_hf(MegatronCheckpoint(source), target)
    return target


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """Tied and untied checkpoints; "sharded": untied in bf16, several files."""
    root = tmp_path_factory.mktemp("hf")
    random_model.save(random_model.make(True), root / "tied")
    random_model.save(random_model.make(False), root / "untied")
    random_model.save(random_model.make(False).bfloat16(), root / "sharded", max_shard_size="200KB")
    (root / "tied" / "tokenizer.json").write_text('{"pretend": true}')
    (root / "tied" / "training_args.bin").write_bytes(b"not to be copied")
    return root


@pytest.fixture(scope="module")
def megatron(hf, tmp_path_factory):
    root = tmp_path_factory.mktemp("megatron")
    return {name: to_megatron(hf / name, root / name) for name in ("tied", "untied", "sharded")}


@pytest.fixture
def damaged_hf(hf, tmp_path):
    """A copy of the untied checkpoint to spoil."""
    return shutil.copytree(hf / "untied", tmp_path / "damaged")


@pytest.fixture
def damaged_megatron(megatron, tmp_path):
    return shutil.copytree(megatron["untied"], tmp_path / "damaged")


@pytest.mark.parametrize("name", ["tied", "untied", "sharded"])
def test_round_trip_gives_the_same_files(hf, megatron, tmp_path, name):
    back = to_hf(megatron[name], tmp_path / "back")
    weights = sorted(file.name for file in (hf / name).glob("model*"))
    assert len(weights) > 3 if name == "sharded" else weights == ["model.safetensors"]
    for file in [*weights, "generation_config.json"]:
        assert (back / file).read_bytes() == (hf / name / file).read_bytes(), file
    assert read_hf_config(back) == read_hf_config(hf / name)
    require_proof(megatron[name])
    require_proof(back)
    assert not list(back.glob("*.bin")) and (back / "tokenizer.json").exists() == (name == "tied")


def test_sharded_checkpoint_really_has_several_files_and_another_dtype(hf):
    checkpoint = HFCheckpoint(hf / "sharded")
    assert len(checkpoint.headers) > 2
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.bfloat16}


def test_every_parameter_of_transformers_is_in_the_map(hf):
    for tied in (True, False):
        model = random_model.make(tied)
        count = sum(len(piece.hf_shapes) for piece in pieces(read_hf_config(hf / ("tied" if tied else "untied"))))
        assert count == len({id(parameter) for parameter in model.parameters()})


@pytest.mark.parametrize(
    "tree, tensors, parameters", [(OFFICIAL_3B, 824, 3_754_622_976), (OFFICIAL_7B, 729, 8_292_166_656)]
)
def test_official_models_are_mapped_exactly_once(tmp_path, tree, tensors, parameters):
    """Counts of the published checkpoints, and names and shapes of transformers' model on the meta device."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from megatron_papo.checkpoint.name_map import disk_name

    (tmp_path / "config.json").write_text(json.dumps(tree))
    shapes = [(name, shape) for piece in pieces(read_hf_config(tmp_path)) for name, shape in piece.hf_shapes.items()]
    assert len(shapes) == len(dict(shapes)) == tensors
    assert sum(torch.Size(shape).numel() for _, shape in shapes) == parameters
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(tmp_path))
    theirs = {disk_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if not tree["tie_word_embeddings"]:
        assert theirs == dict(shapes)
    else:
        assert {key: value for key, value in theirs.items() if key != "lm_head.weight"} == dict(shapes)


def test_in_memory_names_and_a_redundant_tied_head_survive(hf, tmp_path):
    """As some trainers save: transformers' in-memory names and lm_head.weight beside the embedding it is tied to."""
    weights = load_file(hf / "tied" / "model.safetensors")
    renamed = {
        (
            "model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model.")
        ): value.clone()
        for name, value in weights.items()
    }
    renamed["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    source = tmp_path / "source"
    source.mkdir()
    save_file(renamed, source / "model.safetensors")
    shutil.copy(hf / "tied" / "config.json", source)
    back = to_hf(to_megatron(source, tmp_path / "megatron"), tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    renamed["lm_head.weight"][3, 4] += 1
    save_file(renamed, source / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs"):
        to_megatron(source, tmp_path / "untied_in_fact")


def test_a_tie_flag_inside_text_config_is_lifted_where_loaders_look(hf, tmp_path):
    """transformers 5.12 loads a random lm_head from a configuration that 4.57 wrote; what we export loads as it
    should."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    source = shutil.copytree(hf / "tied", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["tie_word_embeddings"]
    config["text_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    back = to_hf(to_megatron(source, tmp_path / "megatron"), tmp_path / "back")
    heads = {}
    for directory in (source, back):
        weights = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory).state_dict()
        heads[directory] = torch.equal(weights["lm_head.weight"], weights["model.language_model.embed_tokens.weight"])
    assert heads == {source: False, back: True}


def test_verify_finds_one_changed_value(hf, megatron, tmp_path):
    assert list(differences(open_checkpoint(hf / "untied"), open_checkpoint(megatron["untied"]))) == []
    changed = shutil.copytree(hf / "untied", tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.2.self_attn.v_proj.bias"][5] += 0.25
    save_file(weights, changed / "model.safetensors")
    rows = list(differences(open_checkpoint(megatron["untied"]), open_checkpoint(changed)))
    assert len(rows) == 1
    assert rows[0].startswith(
        "model.layers.2.self_attn.v_proj.bias: values differ, 1 of 16 values, at most by 0.25, xxh3 "
    )
    before, after = rows[0].split()[-2:]
    assert len(before) == len(after) == 32 and before != after
    rows = list(differences(open_checkpoint(hf / "sharded"), open_checkpoint(megatron["tied"])))
    assert rows[0] == f"lm_head.weight: only in {hf / 'sharded'}" and "torch.bfloat16" in rows[1]
    assert "at most by 0." in rows[1] or "at most by 1" in rows[1]


def spoil_names(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("visual.blocks.1.attn.qkv.bias"), "1 missing tensor: visual.blocks.1.attn.qkv.bias"),
        (
            lambda w: w.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}),
            "1 unknown tensor: model.layers.9.mlp",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.zeros(260, 63)}),
            r"lm_head.weight has shape \[260, 63\].*\[260, 64\]",
        ),
        (
            lambda w: w.update(
                {"model.layers.1.self_attn.k_proj.bias": w["model.layers.1.self_attn.k_proj.bias"].half()}
            ),
            "one dtype",
        ),
    ],
)
def test_wrong_tensors_are_refused_by_name(damaged_hf, tmp_path, change, message):
    spoil_names(damaged_hf, change)
    with pytest.raises(UserError, match=message):
        to_megatron(damaged_hf, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_safetensors_are_refused(damaged_hf):
    path = damaged_hf / "model.safetensors"
    whole = path.read_bytes()
    for data, message in (
        (whole[:-1], "announces"),
        (whole[:100], "cut off"),
        (b"", "not a complete"),
        (whole + b"x", "announces"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message) as error:
            HFCheckpoint(damaged_hf)
        assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(whole.replace(b'"F32","shape":[260,64]', b'"F32","shape":[260,63]'))
    with pytest.raises(UserError, match=r"bytes for shape \[260, 63\]"):
        HFCheckpoint(damaged_hf)
    path.unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        HFCheckpoint(damaged_hf)
    (damaged_hf / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled"):
        HFCheckpoint(damaged_hf)


def test_an_index_that_does_not_agree_is_refused(hf, tmp_path):
    broken = shutil.copytree(hf / "sharded", tmp_path / "broken")
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(key for key, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = second
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="does not agree"):
        HFCheckpoint(broken)
    (broken / second).unlink()
    with pytest.raises(UserError, match=f"{second} named in"):
        HFCheckpoint(broken)


class _Harmful:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_damaged_megatron_checkpoints_are_refused(damaged_megatron, capsys):
    weights = damaged_megatron / "__0_0.distcp"
    whole = weights.read_bytes()
    cases = [
        (weights, whole[:-50], "truncated"),
        (damaged_megatron / ".metadata", pickle.dumps(_Harmful()), "refuses to load builtins.print"),
        (damaged_megatron / ".metadata", b"\x80", "damaged"),
        (damaged_megatron / "common.pt", b"nothing", "common.pt"),
        (damaged_megatron / "metadata.json", b'{"sharded_backend": "zarr"}', "only torch_dist"),
        (damaged_megatron / "hf" / HEADERS, b"[]", "should be an object"),
    ]
    for path, data, message in cases:
        kept = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(UserError, match=message) as error:
            MegatronCheckpoint(damaged_megatron)
        assert "\n" not in str(error.value)
        path.write_bytes(kept)
    assert "never be printed" not in capsys.readouterr().out
    MegatronCheckpoint(damaged_megatron)
    shutil.rmtree(damaged_megatron / "hf")
    with pytest.raises(UserError, match="config.json"):
        MegatronCheckpoint(damaged_megatron)


def test_an_object_among_the_tensors_is_refused_before_it_is_unpickled(damaged_megatron):
    """megatron-core loads such entries, an optimizer's for example, with pickle."""
    TorchDistCheckpoint(damaged_megatron).require_plain()  # control
    path = damaged_megatron / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["optimizer.state\n\x1b[2J"] = BytesStorageMetadata()
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"optimizer.state\\n\\x1b\[2J is no tensor but an object"):
        TorchDistCheckpoint(damaged_megatron).require_plain()


def test_a_bit_flipped_inside_a_megatron_checkpoint_is_noticed(hf, damaged_megatron, tmp_path):
    """Wherever: in numbers (their checksum) or between them (the archive)."""
    missed = 0
    weights = damaged_megatron / "__0_0.distcp"
    whole = weights.read_bytes()
    for place in range(100, len(whole), len(whole) // 12):
        data = bytearray(whole)
        data[place] ^= 16
        weights.write_bytes(data)
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
        try:
            to_hf(damaged_megatron, tmp_path / "back")
        except UserError as error:
            assert "__0_0.distcp: " in str(error) and ("bits have changed" in str(error) or "damaged" in str(error))
        else:  # padding, which holds nothing
            assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
                hf / "untied" / "model.safetensors"
            ).read_bytes()
            missed += 1
    assert missed < 4


def test_another_models_megatron_checkpoint_is_refused(damaged_megatron, hf):
    shutil.copy(hf / "tied" / "config.json", damaged_megatron / "hf")
    with pytest.raises(UserError, match="unknown tensor: language_model.output_layer.weight|do not belong together"):
        MegatronCheckpoint(damaged_megatron)


def test_proofs(damaged_megatron):
    path = damaged_megatron / "proof.json"
    proof = json.loads(path.read_text())
    require_proof(damaged_megatron)
    assert (
        proof["tool"].startswith("megatron_papo")
        and proof["conversion"] == "hf_to_megatron"
        and proof["dtype"] == "as in the source"
    )
    name = "visual.merger.mlp.2.weight"
    proof["tensors"][name]["read_back_xxh3_128"] = "0" * 32
    cases = [
        (json.dumps(proof), "not exact"),
        (json.dumps({**proof, "passed": False}), "not exact"),
        ("{}", "version: Field required: damaged proof"),
        ('{"version": 2}', "damaged"),
        (json.dumps({**proof, "tensors": {}}), "not exact"),
        ("[", "damaged"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            require_proof(damaged_megatron)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        require_proof(damaged_megatron)


def test_the_proof_names_its_source_by_sha256(hf, megatron):
    proof = require_proof(megatron["sharded"])
    files = sorted((hf / "sharded").glob("*.safetensors"))
    assert proof.source_sha256 == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_megatron_checkpoint_that_is_not_what_was_proved_is_refused(damaged_megatron, tmp_path):
    """Its checksums may be right: another checkpoint's files, copied over."""
    path = damaged_megatron / "proof.json"
    path.write_text(
        path.read_text().replace(
            json.loads(path.read_text())["tensors"]["model.norm.weight"]["source_xxh3_128"], "0" * 32
        )
    )
    with pytest.raises(UserError, match="model.norm.weight is not what its proof.json says"):
        to_hf(damaged_megatron, tmp_path / "back")


@pytest.mark.parametrize("name", ["tied", "untied", "sharded"])
def test_small_blocks_and_little_room_give_the_same_files(hf, megatron, tmp_path, monkeypatch, name):
    """Blocks of a few rows, and tensors forgotten and read again because too many wait."""
    monkeypatch.setattr(convert, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(convert, "HELD_BYTES", 3000)
    monkeypatch.setattr(torch_dist_writer, "_FILE_BYTES", 100_000)
    split = to_megatron(hf / name, tmp_path / "split")
    assert len(list(split.glob("*.distcp"))) > 1 == len(list(megatron[name].glob("*.distcp")))
    chunks = TorchDistCheckpoint(split).chunks("language_model.embedding.word_embeddings.weight")
    assert len(chunks) > 30
    assert list(differences(open_checkpoint(split), open_checkpoint(megatron[name]))) == []
    back = to_hf(split, tmp_path / "back")
    for file in (hf / name).glob("model*"):
        assert (back / file.name).read_bytes() == file.read_bytes()


def test_options_of_the_export(hf, megatron, tmp_path):
    """dtype and shard size change the files; transformers reads them to what it would have rounded to itself."""
    from safetensors import safe_open
    from transformers import Qwen2_5_VLForConditionalGeneration

    target = tmp_path / "bf16"
    target.mkdir()
    megatron_to_hf(MegatronCheckpoint(megatron["untied"]), target, dtype=torch.bfloat16, shard_bytes=80_000)
    require_proof(target)
    files = sorted(target.glob("*.safetensors"))
    assert len(files) > 5 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    largest = max(file.stat().st_size for file in files)
    assert largest < 80_000 + 8_000  # header on top
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.bfloat16
    expected = load_file(hf / "untied" / "model.safetensors")
    found = {}
    for file in files:
        with safe_open(file, "pt") as stream:
            found |= {name: stream.get_tensor(name) for name in stream.keys()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_dtype_on_the_way_in(hf, tmp_path):
    """Also what a checkpoint of mixed dtypes needs."""
    target = tmp_path / "megatron"
    target.mkdir()
    hf_to_megatron(HFCheckpoint(hf / "untied"), target, dtype=torch.bfloat16)
    assert {info.dtype for info in MegatronCheckpoint(target).tensors.values()} == {torch.bfloat16}
    source = load_file(hf / "untied" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(MegatronCheckpoint(target).read("model.layers.1.mlp.up_proj.weight"), source.bfloat16())
    assert require_proof(target).dtype == "bfloat16"
    mixed = shutil.copytree(hf / "untied", tmp_path / "mixed")
    spoil_names(
        mixed,
        lambda w: w.update({"model.layers.1.self_attn.k_proj.bias": w["model.layers.1.self_attn.k_proj.bias"].half()}),
    )
    (tmp_path / "converted").mkdir()
    hf_to_megatron(HFCheckpoint(mixed), tmp_path / "converted", dtype=torch.float32)
    require_proof(tmp_path / "converted")

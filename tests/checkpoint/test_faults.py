"""Killed at any moment, a full disk, two converters on one output, damaged headers: a clear message, the output whole
or absent."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_papo.checkpoint import conversion_output
from megatron_papo.checkpoint.chunk_data import find_data
from megatron_papo.checkpoint.convert import HFCheckpoint, MegatronCheckpoint
from megatron_papo.checkpoint.hashed_files import ahead, open_for_reading
from megatron_papo.errors import UserError
from megatron_papo.run.output_lock import OutputLock
from tests.helpers import ROOT
from tests.workers import random_model

FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(Hugging Face with a manifest as stage 2 leaves it, Megatron of the same weights)."""
    root = tmp_path_factory.mktemp("faults")
    random_model.save(random_model.make(False), root / "plain", max_shard_size="400KB")
    conversion_output.to_megatron(root / "plain", root / "megatron", {})
    conversion_output.to_hf(root / "megatron", root / "hf", {})
    return root / "hf", root / "megatron"


@pytest.fixture(scope="module")
def faults(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("outputs")
    for name in ("megatron", "hf"):
        (root / name).mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "workers" / "convert_faults.py", *checkpoints, root]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return root, json.loads(done.stdout)


@pytest.fixture(params=["megatron", "hf"])
def results(faults, request):
    return faults[1][request.param]


def test_killed_at_any_moment(faults, results):
    outcomes = [row["output"] for row in results["killed"]]
    assert results["first"] == {"message": "", "output": True, "left": []}
    assert set(outcomes) <= {True, None} and None in outcomes
    assert any("killed.partial" in row["left"] for row in results["killed"])  # in the middle of it
    assert results["after"]["output"] is True and results["after"]["left"] == []


@pytest.mark.parametrize("direction, file", [("megatron", "__0_0.distcp"), ("hf", "model-00001-of-00003.safetensors")])
def test_after_a_kill_the_same_bytes(faults, direction, file):
    root = faults[0] / direction
    assert (root / "killed" / file).read_bytes() == (root / "whole" / file).read_bytes()


def test_a_full_disk(results):
    assert "cannot write: File too large: nothing was left behind" in results["full"]["message"]
    assert results["full"]["output"] is None and results["full"]["left"] == []
    assert results["no limit"] == {"message": "", "output": True, "left": []}


def test_two_converters_on_one_output(results):
    *both, afterwards = results["together"]
    messages = sorted(row["message"] for row in both)
    assert messages[0] == "" and (not messages[1] or "another process" in messages[1])
    assert afterwards == {"message": "", "output": True, "left": []}


def test_an_output_that_is_being_made_is_left_alone(checkpoints, tmp_path):
    lock = OutputLock(tmp_path / "out")
    with pytest.raises(UserError, match=r"out: another process is making it \(.*out.lock is locked\)"):
        conversion_output.to_hf(checkpoints[1], tmp_path / "out", {})
    lock.release()
    conversion_output.to_hf(checkpoints[1], tmp_path / "out", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_flipped_byte_in_a_source_with_a_manifest(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints[0], tmp_path / "source")
    file = next(iter(sorted(source.glob("*.safetensors"))))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="model-00001-of-00003.safetensors: differs from its manifest"):
        conversion_output.to_megatron(source, tmp_path / "out", {})
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_cut_off_while_it_is_read(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints[0], tmp_path / "source")
    checkpoint = HFCheckpoint(source)
    file = sorted(source.glob("*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(UserError, match="ended at byte .* while it was read"):
        list(checkpoint.read_in_order(lambda name: None))


def test_no_proof_or_a_failed_one_is_refused_by_both_directions(checkpoints, tmp_path):
    for index, (convert, name) in enumerate(
        ((conversion_output.to_megatron, "hf"), (conversion_output.to_hf, "megatron"))
    ):
        source = shutil.copytree(checkpoints[index], tmp_path / name)
        path = source / "proof.json"
        text = path.read_text()
        manifest = json.loads((source / "manifest.json").read_text())
        del manifest["files"]["proof.json"]  # so that it is the proof that is missed, not the file
        (source / "manifest.json").write_text(json.dumps(manifest))
        path.unlink()
        with pytest.raises(UserError, match="proof.json: missing"):
            convert(source, tmp_path / "out", {})
        path.write_text(text.replace('"passed": true', '"passed": false'))
        with pytest.raises(UserError, match="the conversion was not exact"):
            convert(source, tmp_path / "out", {})
        path.write_text(text)
        convert(source, tmp_path / f"out_{name}", {})


def test_too_little_room_is_said_before_anything_is_written(checkpoints, tmp_path):
    from megatron_papo.checkpoint.hf_files import TensorInfo

    checkpoint = HFCheckpoint(checkpoints[0])
    conversion_output._require_space(tmp_path / "out", checkpoint, None)
    checkpoint.tensors["huge"] = TensorInfo(torch.float32, (1 << 50,))
    with pytest.raises(UserError, match="out: needs 4,503,599.* GB, .* GB free"):
        conversion_output._require_space(tmp_path / "out", checkpoint, None)


def test_reading_ahead_keeps_order_and_passes_errors_on():
    assert list(ahead(range(50))) == list(range(50))

    def failing():
        yield 1
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        list(ahead(failing()))
    left = ahead(iter(range(10**9)))
    assert next(left) == 0
    left.close()  # ends the thread


# Damaged headers: a UserError, or a checkpoint that holds together; never another exception.


def damaged(data: bytes, changes) -> bytes:
    spoiled = bytearray(data)
    for place, value in changes:
        spoiled[int(place * (len(spoiled) - 1))] = value
    return bytes(spoiled)


def changes(most=4):
    return st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=most)


class Quiet(dict):
    """hypothesis shows a failing test's arguments."""

    def __repr__(self):
        return f"{len(self)} files"


@pytest.fixture(scope="module")
def spoiled_hf(checkpoints, tmp_path_factory):
    directory = shutil.copytree(checkpoints[0], tmp_path_factory.mktemp("fuzz") / "hf")
    return directory, Quiet({file.name: file.read_bytes() for file in directory.glob("model*")})


def open_hf(directory: Path) -> bool:
    """Whether it opened; then every tensor must be readable."""
    try:
        checkpoint = HFCheckpoint(directory)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return False
    for name in checkpoint.tensors:
        assert checkpoint.read(name).shape == checkpoint.tensors[name].shape
    return True


@FUZZ
@given(spots=changes())
def test_fuzzed_safetensors_headers(spoiled_hf, spots):
    directory, whole = spoiled_hf
    name = "model-00001-of-00003.safetensors"
    length = 8 + int.from_bytes(whole[name][:8], "little")
    (directory / name).write_bytes(damaged(whole[name][:length], spots) + whole[name][length:])
    open_hf(directory)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@FUZZ
@given(header=st.dictionaries(st.sampled_from(["model.norm.weight", "a", "__metadata__"]), JSON_VALUES, max_size=3))
def test_safetensors_headers_of_any_json(spoiled_hf, header):
    directory, whole = spoiled_hf
    text = json.dumps(header).encode()
    name = "model-00001-of-00003.safetensors"
    (directory / name).write_bytes(len(text).to_bytes(8, "little") + text)
    assert not open_hf(directory)
    (directory / name).write_bytes(whole[name])
    assert open_hf(directory)


@FUZZ
@given(spots=changes())
def test_fuzzed_index(spoiled_hf, spots):
    directory, whole = spoiled_hf
    for name, data in whole.items():
        (directory / name).write_bytes(data)
    name = "model.safetensors.index.json"
    (directory / name).write_bytes(damaged(whole[name], spots))
    open_hf(directory)


@pytest.fixture(scope="module")
def spoiled_megatron(checkpoints, tmp_path_factory):
    directory = shutil.copytree(checkpoints[1], tmp_path_factory.mktemp("fuzz") / "megatron")
    return directory, (directory / ".metadata").read_bytes()


@FUZZ
@given(spots=changes(3))
def test_fuzzed_torch_dist_metadata(spoiled_megatron, spots):
    directory, whole = spoiled_megatron
    (directory / ".metadata").write_bytes(damaged(whole, spots))
    try:
        checkpoint = MegatronCheckpoint(directory)
        for piece in checkpoint.pieces[:12]:
            checkpoint.read_piece(piece)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def chunk(tmp_path_factory):
    path = tmp_path_factory.mktemp("chunk") / "chunk"
    torch.save(torch.arange(24.0).reshape(4, 6), path)
    return path, path.read_bytes()


@FUZZ
@given(spots=changes())
def test_fuzzed_chunks(chunk, spots):
    path, whole = chunk
    path.write_bytes(damaged(whole, spots))
    file = open_for_reading(path)
    try:
        found = find_data(file, 0, len(whole), path)
        assert found.offset + found.num_bytes <= len(whole)
    except UserError as error:
        assert "damaged at byte 0" in str(error)
    finally:
        os.close(file)
        path.write_bytes(whole)


class _Harmful:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_a_chunk_that_would_run_code_is_refused(chunk, tmp_path, capsys):
    path = tmp_path / "chunk"
    with zipfile.ZipFile(chunk[0]) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickle.dumps(_Harmful()) if name.endswith("data.pkl") else source.read(name))
    file = open_for_reading(path)
    with pytest.raises(UserError, match="refuses to load builtins.print"):
        find_data(file, 0, path.stat().st_size, path)
    os.close(file)
    assert "never be printed" not in capsys.readouterr().out
    file = open_for_reading(chunk[0])
    assert find_data(file, 0, chunk[0].stat().st_size, chunk[0]).shape == (4, 6)
    os.close(file)

"""stage3, stage6 and tools.convert as a user calls them."""

import json

import pytest

from tests.helpers import DEMO_CONFIG, run_module
from tests.workers import random_model


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return random_model.save(random_model.make(True), tmp_path_factory.mktemp("hf") / "tied")


def test_there_and_back_and_verify(hf, tmp_path):
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    done = run_module("stages.stage3_convert_to_megatron", "--config", DEMO_CONFIG, "--hf", hf, "--output", megatron)
    assert done.returncode == 0, done.stderr
    assert json.loads((megatron / "manifest.json").read_text())["counts"]["tensors"] == 92
    again = run_module("stages.stage3_convert_to_megatron", "--config", DEMO_CONFIG, "--hf", hf, "--output", megatron)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    tool = run_module("tools.convert", "to-megatron", "--hf", hf, "--output", megatron)
    assert tool.returncode == 0 and "nothing to do" in tool.stdout
    done = run_module("stages.stage6_convert_to_hf", "--config", DEMO_CONFIG, "--megatron", megatron, "--output", back)
    assert done.returncode == 0, done.stderr
    same = run_module("tools.convert", "verify", megatron, back, "--logits")
    assert same.returncode == 0 and "all 92 tensors are equal" in same.stdout, same.stdout + same.stderr
    difference = float(same.stdout.partition("logits: largest difference ")[2].partition(",")[0])
    assert 0 < difference < 1e-4  # two programs: rounding, and not none
    facts = json.loads(run_module("tools.convert", "inspect", megatron).stdout)
    assert facts["format"] == "megatron torch_dist" and facts["tensors"] == 92


def test_verify_exits_with_1_on_a_difference(hf, tmp_path):
    other = random_model.save(random_model.make(True, seed=1), tmp_path / "other")
    done = run_module("tools.convert", "verify", hf, other, "--logits")
    assert done.returncode == 1 and "92 tensors differ" in done.stdout
    assert float(done.stdout.partition("logits: largest difference ")[2].partition(",")[0]) > 0.1


def test_options_and_the_same_output_with_others_is_refused(hf, tmp_path):
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    done = run_module("tools.convert", "to-megatron", "--hf", hf, "--output", megatron, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    done = run_module("tools.convert", "to-hf", "--megatron", megatron, "--output", back, "--shard-size", "100KB")
    assert done.returncode == 0, done.stderr
    assert len(list(back.glob("*.safetensors"))) > 3
    refused = run_module("tools.convert", "to-hf", "--megatron", megatron, "--output", back)
    assert refused.returncode == 2 and "arguments.shard_bytes" in refused.stderr
    wrong = run_module("tools.convert", "to-hf", "--megatron", megatron, "--output", back, "--shard-size", "five")
    assert wrong.returncode == 2 and "expected a size such as 5GB" in wrong.stderr


def test_benchmark_ends_with_one_json_object(tmp_path):
    done = run_module("tools.convert", "benchmark", "--geometry", "tiny", "--directory", tmp_path)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["identical"] is True and row["bytes"] == 2 * 214_472
    for direction in ("to_megatron", "to_hf"):
        ratio = row[f"seconds_{direction}"] / row["seconds_copy"]
        assert row[f"ratio_{direction}"] == pytest.approx(ratio, rel=0.05)
    assert 100e6 < row["peak_resident_bytes"] < 1.5e9
    assert list(tmp_path.iterdir()) == []


def test_benchmark_where_there_is_no_place(tmp_path):
    done = run_module("tools.convert", "benchmark", "--geometry", "72b", "--directory", tmp_path / "nothing")
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


def test_mistakes_leave_one_line_and_no_output(hf, tmp_path):
    damaged = random_model.save(random_model.make(True), tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-1])
    for arguments in (
        ("tools.convert", "to-megatron", "--hf", damaged),
        ("tools.convert", "to-hf", "--megatron", hf),
        ("stages.stage3_convert_to_megatron", "--config", DEMO_CONFIG, "--hf", tmp_path / "nothing"),
        ("stages.stage6_convert_to_hf", "--config", DEMO_CONFIG, "--megatron", hf),
        (
            "stages.stage3_convert_to_megatron",
            "--config",
            DEMO_CONFIG,
            "--hf",
            hf,
            "--set",
            "parallel.pipeline_model_parallel_size=3",
        ),
    ):
        done = run_module(*arguments, "--output", tmp_path / "out")
        assert done.returncode == 2, arguments
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
        assert (
            not (tmp_path / "out").exists()
            and not (tmp_path / "out.partial").exists()
            and not (tmp_path / "out.lock").exists()
        )

"""run_all.sh as a user types it, small: it ends with a summary, does nothing twice, and a killed run ends with the same
bits."""

import json
import shutil
import signal
import subprocess
import time

import pytest

from tests.helpers import ROOT, SMALL_RUN, settings


def command(name: str, *extra: str) -> list[str]:
    return ["bash", "run_all.sh", "--name", name, *settings(*SMALL_RUN), *extra]


@pytest.fixture(scope="module")
def second_name():
    name = f"test-{int(time.time())}-again"
    yield name
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)


def test_summary_and_metrics(small_run):
    summary = json.loads((small_run / "summary.json").read_text())
    for key in ("accuracy_cold_start", "accuracy_papo", "accuracy_cold_start_masked", "accuracy_papo_masked"):
        assert 0 <= summary[key] <= 1
    assert len(summary["seconds"]) == 7
    lines = (small_run / "iterations/0001/megatron/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [row["step"] for row in steps] == [1, 2]  # 16 prompts, 8 a step
    assert steps[0]["clip_fraction_high"] == 0 and abs(steps[0]["kl_old"]) < 1e-6  # the first step is on-policy
    assert steps[0]["kl_ref"] < 1e-8 < steps[1]["kl_ref"]  # the reference is the start of training
    assert steps[0]["kl_prcp"] > 0 and steps[0]["gradient_norm"] > 0
    assert not (small_run / "server" / "server.json").exists()


def test_the_second_time_nothing_is_made_again(small_run):
    before = {path: path.stat().st_mtime_ns for path in small_run.rglob("manifest.json")}
    result = subprocess.run(command(small_run.name), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:]
    assert result.stdout.count("nothing to do") == 8
    assert before == {path: path.stat().st_mtime_ns for path in small_run.rglob("manifest.json")}


def test_killed_in_training_and_started_again_gives_the_same_bits(small_run, second_name):
    run = ROOT / "runs" / second_name
    process = subprocess.Popen(command(second_name), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 400
    while not (run / "iterations/0001/megatron.partial").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert not (run / "iterations/0001/megatron").exists()
    result = subprocess.run(command(second_name), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "nothing to do" in result.stdout
    for file in (
        "iterations/0001/hf/model.safetensors",
        "iterations/0001/megatron/__0_0.distcp",
        "iterations/0001/megatron/__3_0.distcp",
    ):
        assert (run / file).read_bytes() == (small_run / file).read_bytes(), file
    start = (small_run / "sft/model.safetensors").read_bytes()
    assert (run / "iterations/0001/hf/model.safetensors").read_bytes() != start  # and training did change them


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--config", "none.yaml"], "error: none.yaml: cannot read the configuration"),
        (["--set", "optimizer.learning_rte=1"], "did you mean learning_rate?"),
        (["--stages", "9"], "error: --stages 9: expected numbers from 1 to 7"),
        (["--name", "a/b"], "error: --name a/b"),
        (["--nmae", "x"], "error: unknown argument --nmae"),
        (["--set"], "error: --set needs a value"),
        (["--name", "test-none", "--stages", "4"], "make it with: python -m stages.stage1_prepare_data"),
        (["--name", "test-none", "--stages", "5"], "make it with: "),
    ],
)
def test_mistakes(arguments, expected):
    result = subprocess.run(["bash", "run_all.sh", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    shutil.rmtree(ROOT / "runs" / "test-none", ignore_errors=True)
    assert result.returncode != 0
    assert expected in result.stdout + result.stderr


def test_dry_run_prints_every_command_and_makes_nothing():
    result = subprocess.run(command("test-dry", "--dry-run"), cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = result.stdout.splitlines()
    assert [f"stage{n}_" for n in (1, 2, 3, 7, 4, 5, 6, 7)] == [
        f"stage{line.split('stages.stage')[1][0]}_" for line in lines if "stages.stage" in line
    ]
    assert not (ROOT / "runs" / "test-dry").exists()


def test_each_iteration_is_told_where_the_one_before_stopped():
    overrides = ["--set", "iterations=3", "--stages", "4"]
    result = subprocess.run(
        command("test-dry", "--dry-run", *overrides), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    told = [
        line.partition("--previous ")[2].partition(" ")[0]
        for line in result.stdout.splitlines()
        if "stages.stage4" in line
    ]
    assert told == ["", "runs/test-dry/iterations/0001/rollouts", "runs/test-dry/iterations/0002/rollouts"]

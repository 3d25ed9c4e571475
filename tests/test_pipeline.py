"""run_all.sh as a user types it, small: it ends with a summary, does nothing twice, and a killed run ends with the same
bits."""

import json
import re
import shutil
import signal
import subprocess
import time

import pytest

from megatron_papo.run.stage_output import read_manifest
from tests.helpers import ROOT, SMALL_RUN, run_module, settings


def command(name: str, *extra: str) -> list[str]:
    return ["bash", "run_all.sh", "--name", name, *extra]


def run_all(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "run_all.sh", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


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


def test_one_metrics_file_and_one_tensorboard_directory(small_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(small_run / "tensorboard"))
    board.Reload()
    losses = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows] and len(losses) == 2
    metrics = [
        json.loads((small_run / f"evaluation/iteration_000{n}/evaluation/metrics.json").read_text()) for n in (0, 1)
    ]
    accuracies = [(event.step, event.value) for event in board.Scalars("evaluation/evaluation/accuracy")]
    assert accuracies == [(n, pytest.approx(metrics[n]["accuracy"])) for n in (0, 1)]
    assert board.Scalars("rollout/tokens_per_second")[0].step == 1
    assert not list(small_run.rglob("megatron/tensorboard"))


def test_the_table_of_the_run(small_run):
    """tools.compare reads what stage 7 wrote: its averages are those of metrics.json."""
    start = f"{small_run}@0"
    result = run_module("tools.compare", start, small_run, "--baseline", start, "--format", "json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [row["name"] for row in rows] == [f"{small_run.name}@0", small_run.name]
    metrics = [
        json.loads((small_run / f"evaluation/iteration_000{n}/evaluation/metrics.json").read_text()) for n in (0, 1)
    ]
    for row, measured in zip(rows, metrics, strict=True):
        assert row["sets"]["evaluation"]["avg"] == pytest.approx(measured["accuracy"])
        masked = row["vision"]["sets"]["evaluation"]["masked"]
        assert masked["gain"] == pytest.approx(measured["accuracy"] - measured["accuracy_masked"])
        rates = row["rates"]["overall"]
        assert rates["format"] == pytest.approx(measured["format"])
        assert rates["cut_off"] == pytest.approx(measured["cut_off_share"])
        assert rates["mean_tokens"] == pytest.approx(measured["mean_response_tokens"])
    difference = metrics[1]["accuracy"] - metrics[0]["accuracy"]
    assert rows[1]["sets"]["evaluation"]["difference"] == pytest.approx(difference)


def test_the_responses_of_the_run_graded_again_and_exported(small_run, tmp_path):
    """tools.suite score gives what stage 7 recorded, read or graded anew; lmms-eval's lines hold the same."""
    end = small_run / "evaluation/iteration_0001/evaluation"
    measured = json.loads((end / "metrics.json").read_text())
    for how, accuracy in (
        (["--grading", "mathruler"], measured["accuracy"]),
        (["--image", "masked"], measured["accuracy_masked"]),
    ):
        result = run_module("tools.suite", "score", small_run, *how, "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["sets"]["evaluation"]["avg"] == pytest.approx(accuracy)
    result = run_module("tools.suite", "export", end, "--form", "lmms-eval", "--output", tmp_path / "exported")
    assert result.returncode == 0, result.stderr
    [samples] = (tmp_path / "exported").glob("*_samples_evaluation.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == list(range(measured["prompts"]))
    assert sum(line["score"] for line in lines) / len(lines) == pytest.approx(measured["accuracy"])


def test_the_log_has_lines_with_time_and_stage(small_run):
    text = (small_run / "log.txt").read_bytes().decode()
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (run|stage [1-7](:\d+)?): ", line) for line in lines)
    for stage in ("stage 1", "stage 4:1", "stage 5:1", "stage 7:0"):
        assert any(f" {stage}: " in line for line in lines)
    assert not any("Warning" in line for line in lines)


def test_the_second_time_nothing_is_made_again(small_run):
    """By the name alone: the run has its configuration."""
    before = {path: path.stat().st_mtime_ns for path in small_run.rglob("manifest.json")}
    result = run_all("--name", small_run.name)
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"runs/{small_run.name}: 9 of 9 outputs are there" in result.stderr and "nothing to do" in result.stderr
    assert "stages.stage" not in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in small_run.rglob("manifest.json")}


def test_killed_in_training_and_started_again_gives_the_same_bits(small_run, second_name):
    run = ROOT / "runs" / second_name
    arguments = command(second_name, *settings(*SMALL_RUN))
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 400
    while not (run / "iterations/0001/megatron.partial").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert not (run / "iterations/0001/megatron").exists()
    result = run_all("--name", second_name)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "outputs are there" in result.stderr and "skipped" in result.stderr
    assert [line.split("stages.stage")[1][0] for line in result.stdout.splitlines() if line.startswith("== ")] == list(
        "567"
    )
    for file in (
        "iterations/0001/hf/model.safetensors",
        "iterations/0001/megatron/__0_0.distcp",
        "iterations/0001/megatron/__3_0.distcp",
    ):
        assert (run / file).read_bytes() == (small_run / file).read_bytes(), file
    start = (small_run / "sft/model.safetensors").read_bytes()
    assert (run / "iterations/0001/hf/model.safetensors").read_bytes() != start  # and training did change them


def test_status(small_run, tmp_path):
    done = run_module("tools.status", "--run", small_run, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["outputs"]
    assert {row["state"] for row in rows} == {"done"} and len(rows) == 9
    assert all(row["bytes"] > 0 and row["seconds"] > 0 for row in rows)
    copy = tmp_path / "copy"
    shutil.copytree(small_run, copy)
    shutil.rmtree(copy / "iterations/0001/hf")
    (copy / "iterations/0001/rollouts/manifest.json").write_text(
        (copy / "iterations/0001/rollouts/manifest.json")
        .read_text()
        .replace('"temperature": 1.0', '"temperature": 0.9')
    )
    rows = json.loads(run_module("tools.status", "--run", copy, "--json").stdout)["outputs"]
    states = {(row["stage"][:6], row["iteration"]): (row["state"], row["reason"]) for row in rows}
    assert states["stage4", 1] == ("stale", "differs in config.rollout.temperature")
    assert states["stage5", 1] == ("stale", "input rollouts is stale")
    assert states["stage6", 1][0] == "missing" and states["stage3", None][0] == "done"
    shown = run_module("tools.status", "--run", copy).stdout
    assert "stale" in shown and "stage4_rollout" in shown


def test_another_evaluation_set_touches_nothing_of_the_training(small_run, tmp_path):
    """As for a set added later: the key is living, the training stays done, and the stages say what is another one."""
    copy = ROOT / "runs" / f"{small_run.name}-evaluated"
    shutil.copytree(small_run, copy)
    try:
        refused = run_all("--name", copy.name, "--stages", "7", *settings("data.evaluation.count=4"))
        assert (
            refused.returncode == 2
            and "made from something else (differs in config.data.evaluation.count)" in refused.stdout
        )
        shutil.rmtree(copy / "evaluation")
        before = {path: path.stat().st_mtime_ns for path in copy.rglob("manifest.json")}
        done = run_all("--name", copy.name, "--stages", "1,7", *settings("data.evaluation.count=4"))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert read_manifest(copy / "evaluation/iteration_0001/evaluation").counts["prompts"] == 4
        assert before.items() <= {path: path.stat().st_mtime_ns for path in copy.rglob("manifest.json")}.items()
    finally:
        shutil.rmtree(copy, ignore_errors=True)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--config", "none.yaml"], "none.yaml: cannot be read"),
        (["--set", "optimizer.learning_rte=1"], "did you mean learning_rate?"),
        (["--stages", "9"], "error: --stages 9: expected numbers from 1 to 7"),
        (["--stages", "1-1000000000"], "error: --stages 1-1000000000: expected numbers from 1 to 7"),
        (["--stages", "\u00b2"], "error: --stages \u00b2: expected numbers from 1 to 7"),
        (["--name", "a/b"], "error: --name a/b"),
        (["--name", ".."], "error: --name .."),
        (["--nmae", "x"], "error: unknown argument --nmae"),
        (["--set"], "error: --set needs a value"),
        (["--resident", "--stages", "4,5"], "error: --resident runs stages 4, 5 and 6 together"),
        (
            ["--name", "test-none", "--stages", "4"],
            "make it with: .venv/bin/python -m stages.stage1_prepare_data --run runs/test-none",
        ),
        (
            ["--name", "test-none", "--stages", "5"],
            "make it with: .venv/bin/python -m stages.stage3_convert_to_megatron --run runs/test-none",
        ),
    ],
)
def test_mistakes(arguments, expected):
    named = "--name" in arguments
    result = run_all(*arguments, *([] if named else ["--name", "test-none"]), timeout=120)
    is_there = (ROOT / "runs" / "test-none").exists()
    shutil.rmtree(ROOT / "runs" / "test-none", ignore_errors=True)
    assert result.returncode == 2
    assert expected in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert is_there == ("make it with" in expected)  # a mistake that is found before anything runs leaves nothing


def test_a_command_in_an_error_runs_as_it_stands(tmp_path):
    """What a message tells to type is typed, in a shell without the project's environment."""
    name = "test-typed"
    try:
        run_all("--name", name, "--stages", "1", *settings(*SMALL_RUN), timeout=120)
        failed = run_all("--name", name, "--stages", "3", timeout=120)
        typed = failed.stdout.split("make it with: ")[1].splitlines()[0]
        done = subprocess.run(
            ["env", "-i", "HOME=/root", "PATH=/usr/bin:/bin", "bash", "-c", typed],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and (ROOT / "runs" / name / "sft/model.safetensors").exists(), (
            typed + done.stderr[-1000:]
        )
    finally:
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)


def test_dry_run_prints_every_command_and_what_it_reads_and_makes():
    result = run_all("--name", "test-dry", "--dry-run", *settings("iterations=2"), timeout=60)
    lines = result.stdout.splitlines()
    commands = [line for line in lines if "stages.stage" in line]
    assert [line.split("stages.stage")[1][0] for line in commands] == list("12374564567")
    starts = (".venv/bin/python -m stages.", ".venv/bin/python -m tools.torchrun --standalone ")
    assert all(line.startswith(starts) for line in commands)
    assert lines.count("    makes runs/test-dry/iterations/0002/megatron") == 1
    assert sum(line.split() == ["reads", "megatron", "runs/test-dry/iterations/0001/megatron"] for line in lines) == 2
    assert not (ROOT / "runs" / "test-dry").exists()


def test_dynamic_sampling_reads_where_the_iteration_before_stopped():
    overrides = settings("iterations=3", "rollout.dynamic_sampling={lowest_accuracy: 0.1}")
    result = run_all("--name", "test-dry", "--dry-run", "--stages", "4", *overrides, timeout=60)
    told = [line.split()[-1] for line in result.stdout.splitlines() if "reads previous" in line]
    assert told == ["runs/test-dry/iterations/0001/rollouts", "runs/test-dry/iterations/0002/rollouts"]

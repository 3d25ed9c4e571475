"""run_all.sh --resident: stages 4 and 5 stay up and end with the bits of the stage-by-stage run; one iteration stale;
GPUs shared."""

import json
import shutil
import subprocess
import threading
import time

import pytest

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.run_directory import Follower, RunDirectory
from megatron_papo.run.stage_output import read_manifest
from megatron_papo.training.metrics_log import read_metrics
from tests.helpers import DEMO_CONFIG, ROOT, SMALL_RUN, run_module, settings

STALE = settings(
    "rollout.max_staleness=1",
    "objective.importance_sampling_cap=2.0",
    "training.max_rollout_log_prob_difference=1.0e-5",
)
"""With a parity gate that would take a policy one step away for a fault."""


def run_all(name, *arguments, iterations):
    command = ["bash", "run_all.sh", "--name", name, *settings(*SMALL_RUN, f"iterations={iterations}"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def prepared(small_run):
    """Makes runs that start where another one has finished what is listed."""
    made = []

    def make(suffix, *parts):
        run = ROOT / "runs" / f"{small_run.name}-{suffix}"
        for part in parts:
            shutil.copytree(small_run / part, run / part)
        made.append(run)
        return run

    yield make
    for run in made:
        shutil.rmtree(run, ignore_errors=True)


@pytest.fixture(scope="module")
def both(prepared):
    """Two iterations, stage by stage and resident, from the same cold start."""
    staged = prepared("staged", "data", "sft", "reference", "evaluation/iteration_0000", "iterations/0001")
    resident = prepared("resident", "data", "sft", "reference", "evaluation/iteration_0000")
    for run, arguments in ((staged, ()), (resident, ("--resident",))):
        done = run_all(run.name, *arguments, iterations=2)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return staged, resident


def test_the_same_bits(both):
    staged, resident = both
    for number in ("0001", "0002"):
        for part in (
            "rollouts/rollouts.jsonl",
            "megatron/__0_0.distcp",
            "megatron/__3_0.distcp",
            "hf/model.safetensors",
        ):
            file = f"iterations/{number}/{part}"
            assert (staged / file).read_bytes() == (resident / file).read_bytes(), file
        for part in ("rollouts", "megatron", "hf"):
            here = f"iterations/{number}/{part}"
            assert read_manifest(staged / here)["fingerprint"] == read_manifest(resident / here)["fingerprint"]
    trained = [(resident / f"iterations/{number}/hf/model.safetensors").read_bytes() for number in ("0001", "0002")]
    assert trained[0] != trained[1]  # and the second iteration did train
    evaluations = [json.loads((run / "evaluation/iteration_0002/metrics.json").read_text()) for run in both]
    assert evaluations[0] == evaluations[1]


def test_one_process_each(both):
    """And the iterations of a resident run count their own time, not their process's."""
    commands = {
        read_manifest(both[1] / f"iterations/{number}/{part}")["command"]
        for number in ("0001", "0002")
        for part in ("rollouts", "megatron")
    }
    assert len(commands) == 2 and all("--follow" in command for command in commands)
    seconds = [read_manifest(run / "iterations/0002/megatron")["seconds"] for run in both]
    assert seconds[1] < seconds[0]
    assert all(json.loads((run / "summary.json").read_text())["seconds_per_iteration"] > 0 for run in both)


def test_either_mode_goes_on_where_the_other_stopped(both):
    staged, resident = both
    done = run_all(resident.name, iterations=2)
    assert done.returncode == 0 and done.stdout.count("nothing to do") == 11
    done = run_all(staged.name, "--resident", iterations=2)
    assert done.returncode == 0 and done.stdout.count("nothing to do") == 11


def test_the_paths_are_those_of_run_all(both):
    done = subprocess.run(
        [
            "bash",
            "run_all.sh",
            "--name",
            "dry",
            "--dry-run",
            *settings("iterations=4", "hacking_guard.rollback_iterations=1"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    run = RunDirectory("runs/dry", load_config(DEMO_CONFIG, ["hacking_guard.rollback_iterations=1"]))
    lines = {
        stage: [line for line in done.stdout.splitlines() if f"stages.{stage}" in line]
        for stage in ("stage4_rollout", "stage5_train")
    }
    assert len(lines["stage4_rollout"]) == len(lines["stage5_train"]) == 4
    for number in (1, 2, 3, 4):
        sampled, trained = lines["stage4_rollout"][number - 1], lines["stage5_train"][number - 1]
        assert f"--hf {run.exported(number - 1)} " in sampled and f"--output {run.rollouts(number)} " in sampled
        assert f"--server {run.server} " in sampled and f"--data {run.data} " in sampled
        assert f"--megatron {run.trained(number - 1)} " in trained and f"--reference {run.reference} " in trained
        assert f"--output {run.trained(number)} " in trained
        assert trained.partition("--rollback ")[2].partition(" ")[0] == str(run.rollback(number) or "")


def test_stages_must_be_together():
    done = run_all("test-none", "--resident", "--stages", "4,5", iterations=1)
    assert done.returncode == 2 and "error: --resident runs stages 4, 5 and 6 together" in done.stderr
    done = run_module(
        "stages.stage5_train", "--config", DEMO_CONFIG, "--follow", "runs/none", "--data", "x", "--rollback", "y"
    )
    assert done.returncode == 2 and "--follow runs/none stands for --data, --rollback: leave them out" in done.stderr
    done = run_module("stages.stage4_rollout", "--config", DEMO_CONFIG, "--data", "x", "--hf", "y")
    assert done.returncode == 2 and "required: --server, --iteration, --output" in done.stderr


@pytest.fixture(scope="module")
def stale(prepared):
    run = prepared("stale", "data", "sft", "reference", "evaluation/iteration_0000")
    done = run_all(run.name, "--resident", *STALE, iterations=3)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run


def test_one_iteration_stale(stale):
    """Iteration n is sampled with the weights of n - 2; the importance weights know, and the parity gate does not take
    it for a fault."""
    versions = []
    for number in (1, 2, 3):
        records = [
            json.loads(line)
            for line in (stale / f"iterations/{number:04}/rollouts/rollouts.jsonl").read_text().splitlines()
        ]
        assert {record["staleness"] for record in records} == {min(number - 1, 1)}
        versions += {record["weight_version"] for record in records}
    exported = [read_manifest(stale / part)["fingerprint"][:16] for part in ("sft", "sft", "iterations/0001/hf")]
    assert versions == exported
    first, third = (read_metrics(stale / f"iterations/000{number}/megatron/metrics.jsonl") for number in (1, 3))
    assert "parity_log_prob_difference_mean" in first[0] and "parity_log_prob_difference_mean" not in third[0]
    assert first[0]["parity_log_prob_difference_mean"] < 1e-5 < third[0]["rollout_log_prob_difference_mean"]
    assert 0 < third[0]["rollout_effective_sample_size"] < 1
    assert (
        abs(third[0]["kl_old"]) < 1e-6
    )  # the old policy of the ratio is the one that training starts from, not the one that sampled


def test_stale_rollouts_are_refused_where_they_are_not_expected(stale, tmp_path):
    run = RunDirectory(stale, load_config(DEMO_CONFIG))
    paths = [
        "--data",
        run.data,
        "--rollouts",
        run.rollouts(3),
        "--megatron",
        run.trained(2),
        "--reference",
        run.reference,
    ]
    one = settings(
        *SMALL_RUN,
        "parallel.tensor_model_parallel_size=1",
        "parallel.pipeline_model_parallel_size=1",
        "parallel.sequence_parallel=false",
    )
    done = run_module(
        "stages.stage5_train", "--config", DEMO_CONFIG, *one, *paths, "--iteration", 3, "--output", tmp_path / "out"
    )
    assert done.returncode == 2 and "rollouts by weights 1 iteration(s) old, rollout.max_staleness is 0" in done.stderr


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["rollout.max_staleness=1"], "rollout.max_staleness needs objective.importance_sampling_cap"),
        (
            ["rollout.max_staleness=1", "objective.importance_sampling_cap=2", "server.shares_gpus=true"],
            "exclude each other",
        ),
    ],
)
def test_what_staleness_needs(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(DEMO_CONFIG, overrides)


def test_a_follower_ends_with_the_stage_it_waits_for(tmp_path):
    with pytest.raises(UserError, match="stage5_train failed while stage4_rollout waited for .*: no space left"):
        with Follower(tmp_path, "stage4_rollout", "stage5_train") as follower:
            threading.Timer(0.5, lambda: (tmp_path / "stage5_train.failed").write_text("no space left\n")).start()
            follower.wait_for(tmp_path / "out")
    assert (tmp_path / "stage4_rollout.failed").read_text().startswith("stage5_train failed")
    # started again, it forgets its own mark, is not impressed by one from before, and returns when the output is there
    time.sleep(0.05)
    with Follower(tmp_path, "stage4_rollout", "stage5_train") as follower:
        assert not (tmp_path / "stage4_rollout.failed").exists()
        (tmp_path / "out").mkdir()
        threading.Timer(0.5, lambda: (tmp_path / "out" / "manifest.json").write_text("{}")).start()
        started = time.monotonic()
        follower.wait_for(tmp_path / "out")
        assert time.monotonic() - started > 0.4
    assert not (tmp_path / "stage4_rollout.failed").exists()

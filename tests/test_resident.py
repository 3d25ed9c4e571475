"""run_all.sh --resident: stages 4 and 5 stay up and end with the bits of the stage-by-stage run; what the cadence
keeps; one iteration stale; GPUs shared."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time

import pytest

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.follow import Follower
from megatron_papo.run.run_config import open_run
from megatron_papo.run.stage_output import read_manifest
from megatron_papo.training.metrics_log import read_metrics
from tests.helpers import DEMO_CONFIG, ROOT, SMALL_RUN, START, run_module, settings

STALE = settings(
    "rollout.max_staleness=1",
    "objective.importance_sampling_cap=2.0",
    "training.max_rollout_log_prob_difference=1.0e-5",
)
"""With a parity gate that would take a policy one step away for a fault."""


def run_all(name, *arguments, iterations):
    command = ["bash", "run_all.sh", "--name", name, *settings(f"iterations={iterations}"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


def kill(process, run):
    """Kill run_all.sh and its stages; return once none of them can write any more."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while subprocess.run(["pgrep", "-f", f"stage5_train --run runs/{run.name} "], capture_output=True).returncode == 0:
        time.sleep(0.05)


@pytest.fixture(scope="module")
def both(prepared):
    """Two iterations, stage by stage and resident, from the same cold start."""
    staged = prepared("staged", *START, "iterations/0001")
    resident = prepared("resident", *START)
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
            place = f"iterations/{number}/{part}"
            assert read_manifest(staged / place).fingerprint == read_manifest(resident / place).fingerprint
    trained = [(resident / f"iterations/{number}/hf/model.safetensors").read_bytes() for number in ("0001", "0002")]
    assert trained[0] != trained[1]  # and the second iteration did train
    evaluations = [json.loads((run / "evaluation/iteration_0002/evaluation/metrics.json").read_text()) for run in both]
    assert evaluations[0] == evaluations[1]


def test_one_process_each(both):
    """And the iterations of a resident run count their own time, not their process's."""
    resident = both[1] / "iterations"
    commands = {
        read_manifest(resident / number / part).command
        for number in ("0001", "0002")
        for part in ("rollouts", "megatron")
    }
    assert len(commands) == 2 and all("--iterations 1-2" in command for command in commands)
    seconds = [read_manifest(run / "iterations/0002/megatron").seconds for run in both]
    assert seconds[1] < seconds[0]
    assert all(json.loads((run / "summary.json").read_text())["seconds_per_iteration"] > 0 for run in both)


def test_either_mode_goes_on_where_the_other_stopped(both):
    staged, resident = both
    for run, arguments in ((resident, ()), (staged, ("--resident",))):
        done = run_all(run.name, *arguments, iterations=2)
        assert done.returncode == 0 and "12 of 12 outputs are there" in done.stderr and "nothing to do" in done.stderr
        assert "== " not in done.stdout


CADENCE = (
    "hacking_guard.action=warn",
    "checkpoint_every=3",
    "evaluate_every=2",
    "keep_checkpoints=1",
    "keep_exports=1",
    "keep_best=1",
)


@pytest.fixture(scope="module")
def sparse(prepared, tmp_path_factory):
    """A resident run of four iterations, killed in the third, when iterations 1 and 2 have weights alone, and
    resumed; iteration 1 is exported into a directory that is emptied meanwhile, 3 and 4 are saved while stage 4
    samples."""
    memory = tmp_path_factory.mktemp("memory")
    run = prepared("sparse", *START, changes=(*CADENCE, "save_while_sampling=true", f"export_directory={memory}"))
    of_another_run = open_run(run).memory / "0001/hf"
    of_another_run.mkdir(parents=True)
    (of_another_run / "manifest.json").write_text('{"stage": "stage6_convert_to_hf", "fingerprint": "6", "files": {}}')
    command = ["bash", "run_all.sh", "--name", run.name, "--resident", *settings("iterations=4")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.time() + 600
    while not (run / "iterations/0003/megatron.partial").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    kill(process, run)
    weights_alone = [read_manifest(run / f"iterations/000{n}/megatron").counts.get("weights_alone") for n in (1, 2)]
    assert weights_alone == [True, True]
    assert not (run / "iterations/0001/hf").exists() and list((run / "iterations/0001/megatron").glob("*.distcp")) == []
    shutil.rmtree(memory)
    done = run_all(run.name, "--resident", iterations=4)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run, done.stdout


@pytest.fixture(scope="module")
def whole(prepared):
    """The same four iterations stage by stage, every checkpoint whole, everything kept."""
    run = prepared("whole", *START, changes=("hacking_guard.action=warn",))
    done = run_all(run.name, iterations=4)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run


def test_a_run_killed_between_two_whole_checkpoints_ends_in_the_same_bits(sparse, whole):
    run, said = sparse
    assert "iteration 1 again, from its rollouts" in said and "iteration 2 again, from its rollouts" in said
    for file in (
        "iterations/0004/hf/model.safetensors",
        "iterations/0004/megatron/__0_0.distcp",
        "iterations/0004/rollouts/rollouts.jsonl",
    ):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    assert (run / "metrics.jsonl").read_text().count("\n") == 8
    for number in range(1, 5):
        for part in ("rollouts", "megatron", *(["hf"] if number > 1 else [])):  # 1 was in memory
            place = f"iterations/{number:04}/{part}"
            assert read_manifest(run / place).fingerprint == read_manifest(whole / place).fingerprint


def test_an_export_that_was_in_memory_is_made_again(whole, prepared, tmp_path):
    """Killed while stage 4 samples from it, and the memory emptied, as by a reboot: the iterations since the last
    whole checkpoint are repeated, and the run ends in the same bits."""
    memory = tmp_path / "memory"
    changes = ("hacking_guard.action=warn", "checkpoint_every=3", f"export_directory={memory}")
    run = prepared("rebooted", *START, changes=changes)
    command = ["bash", "run_all.sh", "--name", run.name, "--resident", *settings("iterations=4")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not list(memory.glob("*/0002/hf/manifest.json")):
        assert process.poll() is None
        time.sleep(0.05)
    kill(process, run)
    assert not (run / "iterations/0003/rollouts").exists()
    assert not list(run.glob("iterations/000[12]/*/*.distcp")) and not list(run.glob("iterations/000[12]/hf"))
    shutil.rmtree(memory)
    done = run_all(run.name, "--resident", iterations=4)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "iteration 1 again, from its rollouts" in done.stdout and "iteration 2 again" in done.stdout
    for file in ("hf/model.safetensors", "megatron/__0_0.distcp", "rollouts/rollouts.jsonl"):
        assert (run / "iterations/0004" / file).read_bytes() == (whole / "iterations/0004" / file).read_bytes(), file
    assert list(memory.glob("*")) == []  # nothing is left there
    rows = json.loads(run_module("tools.status", "--run", run, "--json").stdout)["outputs"]
    assert {row["state"] for row in rows} == {"done"}


def test_stage_by_stage_goes_on_from_weights_alone(sparse, whole, prepared):
    """Either mode, at any iteration: here iteration 3 in a process of its own, from two that hold weights alone."""
    run = prepared("between", *START, changes=CADENCE)
    process = subprocess.Popen(
        ["bash", "run_all.sh", "--name", run.name, "--resident", *settings("iterations=4")],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while not (run / "iterations/0002/hf").exists():
        assert process.poll() is None
        time.sleep(0.05)
    kill(process, run)
    done = run_all(run.name, "--stages", "4-6", iterations=3)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    third = "iterations/0003/hf/model.safetensors"
    assert (run / third).read_bytes() == (whole / third).read_bytes()


def test_asked_to_end_while_it_waits_it_saves_what_only_memory_holds(whole, prepared):
    """Nothing is repeated then, and the bits are the same."""
    run = prepared("asked", *START, changes=CADENCE)
    command = ["bash", "run_all.sh", "--name", run.name, "--resident", *settings("iterations=4")]
    with open(run / "said.txt", "w") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        while not (run / "iterations/0002/hf").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(300) == 75
    assert "iteration 3: ended before it began, as asked" in (run / "said.txt").read_text()
    assert (run / "iterations/0002/megatron.interim/manifest.json").exists()
    done = run_all(run.name, "--resident", iterations=4)
    assert done.returncode == 0 and "again, from its rollouts" not in done.stdout, done.stdout[-3000:]
    for file in ("iterations/0004/hf/model.safetensors", "iterations/0004/megatron/__0_0.distcp"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    assert not list(run.rglob("*.interim"))


def test_what_the_cadence_keeps(sparse):
    run = open_run(sparse[0])
    held = [number for number in range(1, 5) if list(run.trained(number).glob("*.distcp"))]
    exported = [number for number in range(1, 5) if list(run.exported(number).glob("*.safetensors"))]
    accuracies = {
        n: json.loads((run.evaluated(n, "evaluation") / "metrics.json").read_text())["accuracy"] for n in (2, 4)
    }
    best = 2 if accuracies[2] > accuracies[4] else 4
    assert held == [4] and exported == sorted({4, best})
    assert (run.trained(3) / "pruned.json").exists() and not (run.evaluated(1, "evaluation")).exists()
    summary = json.loads(run.summary.read_text())
    assert summary["paths"]["best"].endswith(f"/iterations/{best:04}/hf") and summary["chosen_on_the_reported_set"]
    rows = json.loads(run_module("tools.status", "--run", run.root, "--json").stdout)["outputs"]
    assert {row["state"] for row in rows} == {"done"}  # what was deleted still counts as done


def test_weights_that_were_deleted_are_asked_for_by_their_key(sparse, tmp_path):
    run = open_run(sparse[0])
    gone = 3  # neither the newest nor evaluated
    assert not list(run.exported(gone).glob("*.safetensors"))
    done = run_module(
        "stages.stage7_evaluate",
        "--run",
        run.root,
        "--iteration",
        4,
        "--hf",
        run.exported(gone),
        "--output",
        tmp_path / "out",
    )
    assert done.returncode == 2 and "keep_exports" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["checkpoint_every=2"],
            "checkpoint_every 2 and hacking_guard.action rollback_and_lower_gamma exclude each other",
        ),
        (
            ["checkpoint_every=2", "hacking_guard.action=warn", "server.shares_gpus=true"],
            "server.shares_gpus exclude each other",
        ),
        (["rollout.max_staleness=1"], "rollout.max_staleness needs objective.importance_sampling_cap"),
        (
            ["rollout.max_staleness=1", "objective.importance_sampling_cap=2", "server.shares_gpus=true"],
            "exclude each other",
        ),
    ],
)
def test_what_excludes_what(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(DEMO_CONFIG, overrides)


@pytest.fixture(scope="module")
def stale(prepared):
    run = prepared("stale", *START, changes=STALE[1::2])
    done = run_all(run.name, "--resident", iterations=3)
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
    exported = [read_manifest(stale / part).fingerprint[:16] for part in ("sft", "sft", "iterations/0001/hf")]
    assert versions == exported
    first, third = (read_metrics(stale / f"iterations/000{number}/megatron/metrics.jsonl") for number in (1, 3))
    assert "parity_log_prob_difference_mean" in first[0] and "parity_log_prob_difference_mean" not in third[0]
    assert first[0]["parity_log_prob_difference_mean"] < 1e-5 < third[0]["rollout_log_prob_difference_mean"]
    assert 0 < third[0]["rollout_effective_sample_size"] < 1
    assert (
        abs(third[0]["kl_old"]) < 1e-6
    )  # the old policy of the ratio is the one that training starts from, not the one that sampled


def test_stale_rollouts_are_refused_where_they_are_not_expected(stale, tmp_path):
    run = open_run(stale)
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
    changes = (
        *SMALL_RUN,
        "parallel.tensor_model_parallel_size=1",
        "parallel.pipeline_model_parallel_size=1",
        "parallel.sequence_parallel=false",
    )
    one_process = settings(*changes, "hacking_guard.action=warn")
    done = run_module(
        "stages.stage5_train",
        "--config",
        DEMO_CONFIG,
        *one_process,
        *paths,
        "--iteration",
        3,
        "--output",
        tmp_path / "out",
    )
    assert done.returncode == 2 and "rollouts by weights 1 iteration(s) old, rollout.max_staleness is 0" in done.stderr


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

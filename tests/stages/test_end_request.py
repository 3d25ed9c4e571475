"""Training that is asked to end: it ends a step, saves, leaves with 75, and the same command ends in the same bits."""

import subprocess
import time

import pytest

from megatron_papo.errors import UserError
from megatron_papo.run.end_request import ENDED_EARLY
from megatron_papo.run.run_config import open_run
from megatron_papo.run.stages import STAGES, Turn
from megatron_papo.training.metrics_log import read_metrics
from tests.helpers import ROOT, START, command_of

CHANGES = (
    "training.global_batch_size=4",
    "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false",
)
"""Four steps of 4 prompts, two pipeline stages."""


@pytest.fixture(scope="module")
def runs(prepared):
    """Two alike, ready to train."""
    parts = (*START, "iterations/0001/rollouts")
    return [prepared(name, *parts, changes=CHANGES) for name in ("in-one-go", "asked-to-end")]


def train(run):
    words = ["--standalone", "--nproc-per-node", "2", "-m", "stages.stage5_train", "--run", run, "--iteration", "1"]
    return subprocess.Popen(
        command_of("tools.torchrun", *words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_asked_before_it_begins_and_between_two_steps(runs):
    whole, asked = runs
    in_one_go = train(whole)
    assert in_one_go.wait(300) == 0, in_one_go.stdout.read()

    request, output = open_run(asked).end_request, asked / "iterations/0001/megatron"
    request.touch()
    process = train(asked)
    assert process.wait(300) == ENDED_EARLY
    assert "stage 5: iteration 1: ended before it began, as asked: the same command goes on" in process.stdout.read()
    assert not request.exists() and sorted(path.name for path in output.parent.iterdir()) == ["rollouts"]

    process, log = train(asked), output.with_name("megatron.partial") / "metrics.jsonl"
    while not log.exists():  # the sweeps go on
        assert process.poll() is None
        time.sleep(0.01)
    request.touch()
    assert process.wait(300) == ENDED_EARLY
    assert "ended after step 0 of 4, as asked" in process.stdout.read()

    process = train(asked)
    while not (log.exists() and log.stat().st_size):  # the first step is done
        assert process.poll() is None
        time.sleep(0.01)
    request.touch()
    assert process.wait(300) == ENDED_EARLY
    said = process.stdout.read()
    assert any(f"ended after step {number} of 4, as asked" in said for number in (1, 2, 3)), said
    interim = output.with_name("megatron.interim")
    steps_before = read_metrics(interim / "metrics.jsonl")
    assert 0 < len(steps_before) < 4 and sorted(path.name for path in output.parent.iterdir()) == [
        "megatron.interim",
        "rollouts",
    ]

    process = train(asked)
    assert process.wait(300) == 0, process.stdout.read()
    expected = whole / "iterations/0001/megatron"
    for file in ("__0_0.distcp", "__1_0.distcp", "common.pt"):
        assert (output / file).read_bytes() == (expected / file).read_bytes(), file
    rows, rows_in_one_go = (read_metrics(path / "metrics.jsonl") for path in (output, expected))
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[: len(steps_before)] == steps_before
    for name in ("loss", "parity_log_prob_difference_mean", "rollout_kl", "sampling_bias"):
        assert [row[name] for row in rows] == [row[name] for row in rows_in_one_go], name


def test_another_interim_checkpoint_is_refused(runs, prepared):
    """One of other settings; and the one of these settings is taken."""
    from megatron_papo.run.command_line import Task
    from megatron_papo.training.interim import Interim

    asked = open_run(runs[1])
    output = asked.trained(1)
    other = prepared(
        "otherwise", *START, "iterations/0001/rollouts", changes=(*CHANGES, "optimizer.learning_rate=1.0e-5")
    )
    task = Task.in_run(open_run(other), STAGES["stage5_train"], Turn(1))
    place = open_run(other).trained(1).with_name("megatron.interim")
    output.with_name("megatron.interim").rename(place)
    with pytest.raises(
        UserError, match="megatron.interim: made from something else .differs in config.optimizer.learning_rate"
    ):
        Interim(task, task.inputs())
    place.rename(output.with_name("megatron.interim"))
    task = Task.in_run(asked, STAGES["stage5_train"], Turn(1))
    assert Interim(task, task.inputs()).is_between_steps

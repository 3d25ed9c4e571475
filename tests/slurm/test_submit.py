"""stages/submit.slurm as it stands, on a SLURM of three nodes on this machine, at the demo's sizes, on its processors:
jobs over several nodes, killed and queued again, warned of a time limit, in an array, one after the other.

What they make is compared with what run_all.sh makes by itself.
"""

import json
import shutil
import time

import pytest

from megatron_papo.run.run_config import open_run
from megatron_papo.training.metrics_log import read_metrics
from tests.helpers import ROOT, SMALL_RUN, START, settings
from tests.slurm.cluster import Cluster, missing
from tools.soak import bits_of, compared

LONGEST = 1800.0
"""Seconds in which anything that is waited for must happen."""
SCRIPT = "stages/submit.slurm"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    problem = missing()
    if problem is not None:
        pytest.skip(problem)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running
        running.run("scancel", "--user", "root")
        wait_until(lambda: running.run("squeue", "-h") == "")


class Job:
    """One that was submitted."""

    def __init__(self, cluster: Cluster, output, *words: str):
        self.cluster, self.output = cluster, output
        self.number = cluster.run("sbatch", "--parsable", "--output", str(output), "--gpus-per-node=4", *words)

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def field(self, name: str) -> str:
        """Return what SLURM knows of it, e.g. JobState."""
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)[name]

    @property
    def state(self) -> str:
        return self.field("JobState")

    def start_again(self) -> None:
        """Do not wait the minutes that SLURM waits with a job that was queued again, but the seconds in which a node
        still refuses it ("Job credential revoked"), whereupon SLURM gives it up."""
        wait_until(lambda: self.state == "PENDING", self)
        time.sleep(3)
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def ended(self) -> str:
        """Wait for its end, whatever that is, and return its state."""
        wait_until(lambda: self.state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), self)
        return self.state


def wait_until(is_so, job: Job | None = None, seconds: float = LONGEST) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "" if job is None else f"{job.state}: {job.said[-3000:]}"
        time.sleep(0.5)


@pytest.fixture
def name(small_run, request):
    """A run's name for the test; what it has made is removed."""
    name = f"{small_run.name}-{request.node.name[5:20]}"
    yield name
    for run in ROOT.glob(f"runs/{name}*"):
        shutil.rmtree(run)


def test_warned_killed_and_queued_again_over_three_nodes_the_same_bits(cluster, small_run, name, tmp_path):
    run = ROOT / "runs" / name
    job = Job(cluster, tmp_path / "out", "--nodes", "3", SCRIPT, "--name", name, *settings(*SMALL_RUN))
    training = run / "iterations/0001/megatron.partial"
    wait_until(lambda: training.exists() or job.state == "FAILED", job)
    assert job.field("NodeList") == "n[1-3]", job.said
    cluster.run("scancel", "--batch", "--signal", "USR1", job.number)  # what SLURM does before a time limit
    wait_until(lambda: job.state == "PENDING", job)
    assert "as asked: the same command goes on from there" in job.said and "queued again" in job.said
    steps = read_metrics(run / "iterations/0001/megatron.interim/metrics.jsonl")
    assert len(steps) < 2 and not training.exists()

    job.start_again()
    wait_until(lambda: training.exists() or job.state == "FAILED", job)
    cluster.run("scontrol", "requeue", job.number)  # SLURM kills it, as where a node fails
    job.start_again()
    assert job.ended() == "COMPLETED" and job.field("Restarts") == "2", job.said[-3000:]
    assert compared(bits_of(small_run), run) == []
    assert [row["step"] for row in read_metrics(run / "iterations/0001/megatron/metrics.jsonl")] == [1, 2]
    assert (
        job.said.count("stages.stage2_sft") == 1 and job.said.count("nnodes 2") == 4
    )  # stage 2, and stage 5 three times
    assert not list(run.rglob("*.interim")) and not (run / "server/server.json").exists()


def test_a_time_limit(cluster, small_run, name, tmp_path):
    """SLURM itself warns, after half of the time that the run takes here; the next attempts may take longer."""
    half = sum(json.loads((small_run / "summary.json").read_text())["seconds"].values()) / 2
    minutes = int(half // 60) + 2
    limit = ["--nodes", "1", "--time", str(minutes), "--signal", f"B:USR1@{60 * minutes - round(half)}"]
    job = Job(cluster, tmp_path / "out", *limit, SCRIPT, "--name", name, *settings(*SMALL_RUN))
    wait_until(lambda: job.state == "PENDING" and job.field("Reason") == "BeginTime", job)
    cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={LONGEST / 60:.0f}")
    job.start_again()
    assert job.ended() == "COMPLETED" and job.field("Restarts") == "1", job.said[-3000:]
    assert compared(bits_of(small_run), ROOT / "runs" / name) == []


def test_an_array_over_seeds_side_by_side(cluster, small_run, name, tmp_path):
    arguments = ["--name", f"{name}%a", "--set", "seed=%a", "--stages", "1,2", *settings(*SMALL_RUN)]
    job = Job(cluster, tmp_path / "out", "--open-mode", "append", "--nodes", "1", "--array", "1-2", SCRIPT, *arguments)
    wait_until(lambda: cluster.run("squeue", "-h", "-j", job.number) == "", job)
    runs = [open_run(ROOT / "runs" / f"{name}{number}") for number in (1, 2)]
    assert [run.config.seed for run in runs] == [1, 2]
    first, second = ((run.sft / "model.safetensors").read_bytes() for run in runs)
    assert first == (small_run / "sft/model.safetensors").read_bytes() and first != second


def test_stages_as_jobs_that_depend_on_each_other(cluster, small_run, prepared, tmp_path):
    """Sampling on one partition, training on two nodes of another."""
    run = prepared("jobs", *START)
    words = ["--run", f"runs/{run.name}", "--iteration", "1"]
    rollouts = Job(cluster, tmp_path / "4", "--partition", "small", "--nodes", "1", SCRIPT, "stage4_rollout", *words)
    after = ["--dependency", f"afterok:{rollouts.number}"]
    training = Job(
        cluster, tmp_path / "5", "--partition", "large", "--nodes", "2", *after, SCRIPT, "stage5_train", *words
    )
    after = ["--dependency", f"afterok:{training.number}"]
    export = Job(
        cluster, tmp_path / "6", "--partition", "small", "--nodes", "1", *after, SCRIPT, "stage6_convert_to_hf", *words
    )
    assert training.state == export.state == "PENDING"
    assert [job.ended() for job in (rollouts, training, export)] == ["COMPLETED"] * 3, training.said + rollouts.said
    assert training.field("NodeList") == "n[2-3]"
    for file in ("rollouts/rollouts.jsonl", "megatron/__3_0.distcp", "hf/model.safetensors"):
        assert (run / "iterations/0001" / file).read_bytes() == (small_run / "iterations/0001" / file).read_bytes(), (
            file
        )
    assert not (run / "server/server.json").exists()


ON_GPUS = ("--export", "ALL,DEVICE=cuda")
"""The demo computes on CPUs otherwise, whatever the job has."""
SIZES = "error: parallel: tensor * pipeline * data = 8 processes, "


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            ["--nodes", "2", *ON_GPUS, SCRIPT, "--set", "parallel.data_parallel_size=2"],
            SIZES + "1 node for them with 4 GPUs each: --nodes 3, or other sizes",
        ),
        (
            ["--nodes", "1", *ON_GPUS, SCRIPT, "--set", "parallel.data_parallel_size=2"],
            SIZES + "1 node for them with 4 GPUs each: --nodes 3, or other sizes",
        ),
        (
            ["--nodes", "3", *ON_GPUS, SCRIPT, "--set", "server.first_gpu=4"],
            "error: server: GPUs 4 to 4 (first_gpu, replicas * tensor_parallel_size) of 4: lower --set",
        ),
        (
            ["--nodes", "2", "--export", "ALL,SERVER_NODES=2", SCRIPT],
            "error: SERVER_NODES=2: the job has 2 nodes, none is left to train: --nodes 3",
        ),
        (
            ["--nodes", "2", SCRIPT, "stage6_convert_to_hf", "--run", "runs/{run}", "--iteration", "1"],
            "error: stage6_convert_to_hf is one process, this job has 2 nodes: --nodes 1",
        ),
    ],
)
def test_a_job_that_cannot_work_says_so_on_one_line(cluster, small_run, tmp_path, words, expected):
    job = Job(cluster, tmp_path / "out", *(word.format(run=small_run.name) for word in words))
    assert job.ended() == "FAILED" and job.field("ExitCode") == "2:0"
    assert job.said.startswith(expected) and job.said.count("\n") == 1


def test_a_node_that_cannot_be_reached(cluster, tmp_path):
    cluster.end_node("n3")
    try:
        job = Job(cluster, tmp_path / "out", "--nodes", "3", SCRIPT, "--name", "test-unreached")
        wait_until(lambda: job.state == "COMPLETING", job)  # for n3, too
    finally:
        cluster.start_node("n3")
    assert job.ended() == "FAILED" and job.field("ExitCode") == "2:0"
    assert job.said.startswith("error: node n3: cannot be reached") and job.said.endswith("--exclude=n3\n")
    assert job.said.count("\n") == 1
    wait_until(lambda: cluster.run("sinfo", "-h", "-p", "all", "-o", "%D %t").split() == ["3", "idle"], seconds=120)

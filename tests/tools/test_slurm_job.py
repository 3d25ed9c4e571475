"""What a SLURM job of so many nodes and GPUs starts where, and what it refuses; tests/slurm does it with SLURM."""

import os
import shlex
import subprocess

import pytest

from megatron_papo.errors import UserError
from tests.helpers import ROOT, run_module
from tools.slurm_job import Job, Node, around_run, around_stage

SRUN = """#!/bin/bash
# runs what follows on each node of --nodelist, as far as it is up
for word in "$@"; do case $word in --nodelist=*) nodes=${word#*=} ;; -*) ;; srun) ;; *) break ;; esac; done
while [[ $1 == -* ]]; do shift; done
for node in ${nodes//,/ }; do
  if [[ $node == down ]]; then echo "srun: error: Task launch failed on node down: No route to host" >&2; continue; fi
  echo "motd: welcome to $node"
  SLURMD_NODENAME=$node SLURM_GPUS_ON_NODE=8 "$@"
done
"""


def job_of(nodes: int, gpus: int = 8) -> Job:
    return Job(
        "17", [Node(name=f"n{number}", gpus=gpus, port=20000 + number) for number in range(1, nodes + 1)], cpus=96
    )


def test_one_node_starts_processes_itself():
    assert around_run(["--name", "a"], job_of(1)) == (["bash", "run_all.sh", "--name", "a"], {})


def test_of_several_nodes_the_first_serves_and_the_others_train():
    command, launchers = around_run(["--config", "configs/papo_g_32b.yaml"], job_of(3))
    assert command == ["bash", "run_all.sh", "--config", "configs/papo_g_32b.yaml"]
    assert launchers == {
        "TRAIN_LAUNCHER": "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist=n2,n3 --cpus-per-task=96"
        " --cpu-bind=none --kill-on-bad-exit=1 .venv/bin/python -m tools.torchrun --nproc-per-node 8 --nnodes 2"
        " --rdzv-backend c10d --rdzv-endpoint n2:20002 --rdzv-id 17"
    }  # no cold start in this preset, and servers on the node of run_all.sh


def test_servers_on_several_nodes(monkeypatch):
    monkeypatch.setenv("SERVER_NODES", "2")
    _, launchers = around_run([], job_of(4, gpus=0))  # the demo, four processes with a cold start of two, on CPUs
    assert launchers["SERVER_LAUNCHER"].startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist=n1,n2 ")
    assert launchers["SERVER_LAUNCHER"].endswith(" --overlap")
    assert "--nodelist=n3,n4" in launchers["TRAIN_LAUNCHER"] and "--nproc-per-node 2" in launchers["TRAIN_LAUNCHER"]
    assert "--nodelist=n3,n4" in launchers["SFT_LAUNCHER"] and "--nproc-per-node 1" in launchers["SFT_LAUNCHER"]


def test_one_node_that_trains_needs_no_meeting_place():
    _, launchers = around_run([], job_of(2, gpus=0))
    assert launchers["TRAIN_LAUNCHER"].endswith("tools.torchrun --nproc-per-node 4 --standalone")


@pytest.mark.parametrize(
    "nodes, gpus, servers, overrides, message",
    [
        (2, 8, "1", ["parallel.data_parallel_size=4"], "= 16 processes, 1 node for them with 8 GPUs each: --nodes 3,"),
        (4, 8, "1", ["parallel.data_parallel_size=4"], "= 16 processes, 3 nodes for them with 8 GPUs each: --nodes 5,"),
        (1, 2, "1", [], "= 4 processes, 1 node for them with 2 GPUs each: --nodes 3,"),
        (2, 4, "1", ["server.first_gpu=1", "server.replicas=4"], "server: GPUs 1 to 4 .* of 4: lower"),
        (3, 8, "3", [], "SERVER_NODES=3: the job has 3 nodes, none is left to train: --nodes 4"),
        (3, 8, "0", [], "SERVER_NODES=0: expected how many nodes"),
        (3, 8, "1", ["server.shares_gpus=true"], "server.shares_gpus: .* this job has 3: --nodes 1, or"),
    ],
)
def test_a_job_that_does_not_fit_is_refused(monkeypatch, nodes, gpus, servers, overrides, message):
    monkeypatch.setenv("SERVER_NODES", servers)
    monkeypatch.setenv("DEVICE", "cuda")  # the demo, which computes on CPUs otherwise
    arguments = [word for value in overrides for word in ("--set", value)]
    with pytest.raises(UserError, match=message) as refused:
        around_run(["--name", "test-slurm", *arguments], job_of(nodes, gpus))
    assert len(refused.value.lines) == 1


def test_a_stage_of_its_own_needs_a_run():
    with pytest.raises(UserError, match="test-none"):
        around_stage("stage5_train", ["--run", "runs/test-none", "--iteration", "1"], job_of(2))


def asked(tmp_path, *nodes: str) -> subprocess.CompletedProcess:
    """tools.slurm_job within a job of these nodes."""
    for name, text in (("scontrol", "#!/bin/sh\n" + "".join(f"echo {node}\n" for node in nodes)), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_CPUS_PER_NODE": "64(x2),48"}
    return run_module("tools.slurm_job", "--name", "test-slurm", env=job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})


def test_every_node_is_asked(tmp_path):
    done = asked(tmp_path, "n1", "n2", "n3")
    assert done.returncode == 0, done.stderr
    script = f"{done.stdout}\necho ${{COMMAND[@]}}\necho $TRAIN_LAUNCHER"
    command, launcher = subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout.splitlines()
    assert command == "bash run_all.sh --name test-slurm"
    assert {"--nodelist=n2,n3", "--cpus-per-task=48"} < set(shlex.split(launcher))


def test_a_node_that_does_not_answer_is_named(tmp_path):
    done = asked(tmp_path, "n1", "down", "n3")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: node down: cannot be reached, or does not see {ROOT}")
    assert "No route to host" in done.stderr and done.stderr.endswith("--exclude=down\n")


def test_outside_of_a_job():
    done = run_module("tools.slurm_job", env={"SLURM_JOB_ID": ""})
    assert done.returncode == 2 and done.stderr.startswith("error: SLURM_JOB_ID is not set")
    done = subprocess.run(["bash", "stages/submit.slurm"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "sbatch --nodes 1 stages/submit.slurm" in done.stdout

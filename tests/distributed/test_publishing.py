"""Processes on two machines, as torchrun's agents see them: the first publishes for longer than the agents wait."""

import os
import socket
import subprocess
import sys

import pytest

from tests.helpers import ROOT

WORKERS = ROOT / "tests" / "workers"
GIGABYTES = "4"
"""Hashed in three seconds and more; the agents wait for one."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def two_agents(output, how: str) -> list[subprocess.CompletedProcess]:
    """Run two agents with a process each. Ranks go by address: rank 0 is with the first, the meeting place with the
    second."""
    endpoint, environment = f"127.0.0.3:{free_port()}", os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    agents = []
    for address, is_host in (("127.0.0.2", "false"), ("127.0.0.3", "true")):
        command = [sys.executable, str(WORKERS / "impatient_agent.py"), "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", f"is_host={is_host}"]
        command += ["--local-addr", address, str(WORKERS / "publishing.py"), str(output), how, GIGABYTES]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        agents.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        said = [agent.communicate(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [
        subprocess.CompletedProcess(agent.args, agent.returncode, *words)
        for agent, words in zip(agents, said, strict=True)
    ]


def test_processes_on_two_machines_leave_when_the_first_has_published(tmp_path):
    agents = two_agents(tmp_path / "together", "together")
    assert [agent.returncode for agent in agents] == [0, 0], agents
    assert "rank 0 leaves, published: True" in agents[0].stdout
    assert "rank 1 leaves, published: True" in agents[1].stdout
    # control: where the second leaves at once, its agent, which holds the meeting place, is gone a second later, and
    # the first one's agent ends its process in the middle of it
    alone = two_agents(tmp_path / "alone", "alone")
    assert "rank 1 leaves, published: False" in alone[1].stdout
    assert alone[0].returncode != 0 and "RendezvousConnectionError" in alone[0].stderr
    assert not (tmp_path / "alone").exists()


@pytest.mark.parametrize("how, status", [("taken", 2), ("together", 0)])
def test_a_place_that_cannot_be_published_to_is_one_line(tmp_path, how, status):
    command = [sys.executable, "-m", "tools.torchrun", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.workers.publishing", str(tmp_path / "output"), how, "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == (how == "taken") and all("output: cannot write: " in line for line in lines), lines

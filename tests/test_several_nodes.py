"""run_all.sh with servers on two nodes and training on two others, all of them this machine: the bits of one node."""

import os
import shutil
import socket
import subprocess

import pytest

from tests.helpers import ROOT, SMALL_RUN, settings

SERVERS = """#!/bin/bash
for node in 127.0.0.2 127.0.0.3; do SLURMD_NODENAME=$node "$@" & done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
"""
AGENTS = """#!/bin/bash
for node in 4 5; do
  .venv/bin/torchrun --nnodes 2 --nproc-per-node 2 --local-addr 127.0.0.$node --rdzv-backend c10d --rdzv-id a \\
    --rdzv-endpoint 127.0.0.5:PORT --rdzv-conf is_host=$([[ $node = 5 ]] && echo true || echo false) "$@" &
done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
"""
"""Rank 0 is not where the meeting place is: its agent would be alone if the others left before it."""


@pytest.fixture
def run(small_run, tmp_path):
    name = f"{small_run.name}-nodes"
    yield ROOT / "runs" / name
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)


def test_a_run_on_several_nodes_has_the_bits_of_a_run_on_one(small_run, run, tmp_path):
    with socket.create_server(("127.0.0.5", 0)) as listener:
        port = listener.getsockname()[1]
    for name, text in (("servers", SERVERS), ("agents", AGENTS.replace("PORT", str(port)))):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    launchers = {"SERVER_LAUNCHER": f"{tmp_path}/servers", "TRAIN_LAUNCHER": f"{tmp_path}/agents"}
    command = ["bash", "run_all.sh", "--name", run.name, *settings(*SMALL_RUN)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | launchers, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 SGLang servers on 2 node(s) (127.0.0.2, 127.0.0.3) ready" in done.stdout
    assert f"== {tmp_path}/agents -m -- stages.stage5_train" in done.stdout
    for part in ("rollouts/rollouts.jsonl", "megatron/__0_0.distcp", "megatron/__3_0.distcp", "hf/model.safetensors"):
        file = f"iterations/0001/{part}"
        assert (run / file).read_bytes() == (small_run / file).read_bytes(), file
    for node in ("127.0.0.2", "127.0.0.3"):
        assert "POST /generate" in (run / f"server/node_{node}/server.log").read_text()
        assert not (run / f"server/node_{node}/server.json").exists()

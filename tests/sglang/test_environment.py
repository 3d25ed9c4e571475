"""What a server gets from us and leaves behind: environment, descriptors, sockets, shared memory."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_papo.config import ServerConfig
from megatron_papo.errors import UserError
from megatron_papo.sglang import leftovers, open_files, server_process
from megatron_papo.sglang import server as sglang_server
from megatron_papo.sglang.server_environment import server_environment
from tests.sglang.test_server import ANSWERING, stand_in

FOREIGN = {
    "http_proxy": "http://proxy:1", "HTTPS_PROXY": "http://proxy:1", "no_proxy": "x", "SSL_CERT_FILE": "/gone",
    "REQUESTS_CA_BUNDLE": "/gone", "RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "PET_NNODES": "2",
    "TORCHELASTIC_RUN_ID": "r", "PYTHONPATH": "/other", "PYTHONHOME": "/other", "SLURM_JOB_ID": "1", "TMPDIR": "/full",
    "HF_TOKEN": "t", "SGLANG_API_KEY": "k", "WANDB_API_KEY": "k", "AWS_SECRET_ACCESS_KEY": "k", "NVIDIA_API_KEY": "k",
}  # fmt: skip
KEPT = {
    "PATH": "/bin", "HOME": "/h", "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": "1", "NCCL_DEBUG": "INFO",
    "ATEN_CPU_CAPABILITY": "avx2", "SGLANG_INIT_NEW_TOKEN_RATIO": "0.5", "LD_LIBRARY_PATH": "/cuda",
}  # fmt: skip


def test_the_environment_is_made_not_inherited():
    command = ["/v/bin/python", "--model-path", "/m"]
    made = server_environment({**FOREIGN, **KEPT}, Path("/s/tmp"), command)
    assert made["TMPDIR"] == "/s/tmp" and not set(FOREIGN) & set(made) - {"TMPDIR"}
    assert {**KEPT, "PATH": "/v/bin:/bin"}.items() <= made.items(), "its own ninja, whoever starts it"
    assert server_environment({}, Path("/s/tmp"), command)["PATH"] == "/v/bin"
    assert made["GLOO_SOCKET_IFNAME"] == made["NCCL_SOCKET_IFNAME"] == "lo"
    assert made["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] == "file:///s/tmp/processes"
    # told otherwise: over several machines loopback does not do
    several = server_environment({"GLOO_SOCKET_IFNAME": "ib0"}, Path("/s/tmp"), ["/v/bin/python", "--nnodes", "2"])
    assert several["GLOO_SOCKET_IFNAME"] == "ib0" and "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE" not in several


def test_memory_that_is_given_up_has_no_expandable_segments():
    """SGLang's memory saver ends at once where it finds them."""
    caller = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    shared = server_environment(caller, Path("/s/tmp"), ["/v/bin/python", "--enable-memory-saver"])
    assert not set(caller) & set(shared)
    assert caller.items() <= server_environment(caller, Path("/s/tmp"), ["/v/bin/python"]).items()


LEAVING = """
import json, multiprocessing, os, socket, tempfile
key = sys.stdin.readline().strip()
print(json.dumps({"key": key, "environment": dict(os.environ), "arguments": sys.argv}), flush=True)
kept = multiprocessing.get_context("spawn").Semaphore()
open(f"/dev/shm/sgl_shm_mm_{os.getpid()}_x", "w").close()
server = socket.socket(socket.AF_UNIX)
server.bind(tempfile.mktemp())
"""
"""A program that makes in /dev/shm and for its sockets what SGLang makes."""


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_server_gets_its_key_by_a_pipe_and_leaves_nothing(tmp_path, monkeypatch, end):
    for name, value in FOREIGN.items():
        if name != "TMPDIR":
            monkeypatch.setenv(name, value)
    before = set(os.listdir("/dev/shm"))
    config = ServerConfig(python=stand_in(tmp_path / "python", LEAVING + ANSWERING))
    where = tmp_path / "server"
    [server] = sglang_server.connect_or_start_all(where, tmp_path, config, "float32")
    record = json.loads((where / "server.json").read_text())
    said = json.loads((where / "server.log").read_text().splitlines()[0])
    assert said["key"] == server.api_key == record["api_key"]
    assert server.api_key not in f"{said['arguments']}{record['command']}{said['environment']}"
    assert not set(FOREIGN) & set(said["environment"]) - {"TMPDIR"}
    assert len(record["shared_memory"]) == 2 and list((where / "tmp").iterdir())
    Path(f"/dev/shm/sgl_shm_mm_{record['pid']}_late").touch()  # of a request that was under way
    if end == "killed":
        process = psutil.Process(record["pid"])
        process.kill()
        psutil.wait_procs([process])
        assert set(os.listdir("/dev/shm")) - before  # control: it did leave something
    assert sglang_server.stop_all(where) == (end == "stopped")
    assert not {name for name in set(os.listdir("/dev/shm")) - before if str(record["pid"]) in name}
    assert not [name for name in record["shared_memory"] if os.path.exists(name)]
    assert sorted(path.name for path in where.iterdir()) == ["server.log"]


def test_a_path_too_long_for_sockets_gets_another_directory(tmp_path):
    short, long = tmp_path / "s", tmp_path / ("long" * 30)
    assert leftovers.temporary_directory(short) == short / "tmp"
    elsewhere = leftovers.temporary_directory(long)
    assert elsewhere.parent != long and not (long / "tmp").exists() and elsewhere.stat().st_mode & 0o077 == 0
    leftovers.clear(str(elsewhere), ["/dev/shm/../../etc/nothing"])
    assert not elsewhere.exists()


def test_a_process_is_known_whatever_the_clock_says():
    """By the ticks from the boot to its start, which are in the kernel's own words."""
    with subprocess.Popen(["sleep", "60"]) as other:
        time.sleep(0.05)
        known = server_process.identity_of(other.pid)
        assert known == server_process.identity_of(other.pid) != server_process.identity_of(os.getpid())
        other.kill()
    assert server_process.identity_of(other.pid) is None


def test_the_limit_of_open_files_is_raised():
    program = (
        "import resource; from megatron_papo.sglang.open_files import room_for;"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1];"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard));"
        "print(room_for(90), resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 90 + 64)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "90 True\n", done.stderr


def test_fewer_files_than_requests_are_fewer_requests(monkeypatch, capsys):
    used = open_files.RESERVED
    monkeypatch.setattr(resource, "getrlimit", lambda which: (used + 40, used + 40))
    assert open_files.room_for(256) == 40 and "rollout.concurrency 256: " in capsys.readouterr().out
    assert open_files.room_for(10) == 10 and capsys.readouterr().out == ""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (used - 10, used - 10))
    with pytest.raises(UserError, match="ulimit -n"):
        open_files.room_for(1)

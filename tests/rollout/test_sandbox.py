"""A grading process can compute and answer, and nothing else, whatever code runs in it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_papo.config import RewardConfig
from megatron_papo.rollout import grader_process
from megatron_papo.rollout.grader_process import GraderProcess
from megatron_papo.rollout.grading import RIGHT, WRONG
from megatron_papo.rollout.rewards import Grader
from megatron_papo.rollout.sandbox import MEMORY_LIMIT_BYTES
from tests.helpers import ROOT

HOSTILE = """
import json, os, resource, socket, subprocess, sys, threading
from pathlib import Path
place, port, confined = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "confined"
from megatron_papo.rollout import grading, sandbox
inherited = os.open(place, os.O_RDONLY)
grading.is_equal("x/2", "\\\\frac{x}{2}")
libraries = grading._libraries()
lacking = sandbox.confine(libraries) if confined else []
def fork():
    if os.fork() == 0:
        os._exit(0)

def thread():
    threading.Thread(target=int).start()

DEEDS = {
    "connect": lambda: socket.create_connection(("127.0.0.1", port), timeout=5),
    "bind": lambda: socket.socket(socket.AF_UNIX).bind(str(place / "socket")),
    "pair": socket.socketpair,
    "new file": lambda: (place / "new").write_text("x"),
    "append": lambda: open(place / "there", "a"),
    "truncate": lambda: os.truncate(place / "there", 0),
    "rename": lambda: os.rename(place / "old", place / "elsewhere"),
    "remove": lambda: (place / "gone").unlink(),
    "directory": lambda: (place / "directory").mkdir(),
    "link": lambda: os.symlink("/etc", place / "link"),
    "mode": lambda: os.chmod(place / "there", 0o777),
    "beside a descriptor": lambda: os.open("beside", os.O_WRONLY | os.O_CREAT, dir_fd=inherited),
    "without a name": lambda: os.open("/tmp", os.O_TMPFILE | os.O_RDWR),
    "run": lambda: subprocess.run(["true"], check=True),
    "fork": fork,
    "thread": thread,
    "kill": lambda: os.kill(os.getppid(), 0),
    "limits": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    "memory": lambda: bytearray(1 << 30),
    "read a secret": lambda: (place / "there").read_text(),
    "read the parent's environment": lambda: open(f"/proc/{os.getppid()}/environ", "rb").read(),
    "list a directory": lambda: os.listdir(place),
}
done = []
for name, deed in DEEDS.items():
    try:
        deed()
    except (OSError, ValueError, MemoryError, RuntimeError, subprocess.SubprocessError):
        continue
    done.append(name)
import sympy.physics.units  # a late import works
print(json.dumps([lacking, sorted(DEEDS), done]))
"""


def deeds(place: Path, *how: str) -> tuple[list[str], list[str], list[str]]:
    """Let hostile code run: which layers are lacking, what it tries, what it succeeds in."""
    place.mkdir()
    for name in ("there", "gone", "old"):
        (place / name).write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-c", HOSTILE, str(place), str(listener.getsockname()[1]), *how]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


def test_hostile_code_in_a_grading_process_gets_nowhere(tmp_path):
    lacking, tried, free = deeds(tmp_path / "free", "free")
    assert sorted(free) == tried  # the control: without the sandbox all of it works
    lacking, tried, done = deeds(tmp_path / "confined", "confined")
    if "seccomp" in lacking:
        pytest.skip("this kernel or container has no seccomp filters: docs/reliability.md says what holds then")
    reading = ["read a secret", "read the parent's environment", "list a directory"]
    assert done == (reading if "landlock" in lacking else [])
    assert (tmp_path / "confined" / "there").read_text() == "secret"
    assert sorted(path.name for path in (tmp_path / "confined").iterdir()) == ["gone", "old", "there"]


@pytest.fixture
def process(monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    process = GraderProcess(time_limit_seconds=5.0)
    yield process
    process.stop()


def child_of(process: GraderProcess) -> int:
    pid = process._process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def test_a_grading_process_is_confined_and_knows_no_secret(process):
    assert process.ask("x/2", "\\frac{x}{2}") == RIGHT and process.ask("x/3", "\\frac{x}{2}") == WRONG
    child = child_of(process)
    status = dict(line.split(":\t") for line in Path(f"/proc/{child}/status").read_text().splitlines())
    assert status["NoNewPrivs"] == "1" and ("seccomp" in process.lacking or status["Seccomp"] == "2")
    for pid in (process._process.pid, child):
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        names = {line.split(b"=")[0] for line in environment.split(b"\0") if line}
        assert names <= {b"PYTHONHASHSEED", b"LC_ALL", b"LD_LIBRARY_PATH"}
        assert len(os.listdir(f"/proc/{pid}/fd")) == 3
    assert str(MEMORY_LIMIT_BYTES) in Path(f"/proc/{child}/limits").read_text()


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("which", [lambda process: process._process.pid, child_of], ids=["process", "child"])
def test_a_grader_that_is_killed_or_stopped_costs_no_answer(monkeypatch, which, by):
    """Somebody else's doing, or the machine is out of memory: the same rewards, none of them timed out."""
    monkeypatch.setattr(grader_process, "PATIENCE_SECONDS", 4.0)
    with Grader(RewardConfig(workers=1)) as grader:
        assert grader.result(grader.submit("\\boxed{x/2}", "\\frac{x}{2}", False)).accuracy == 1
        (process,) = grader._idle.queue
        os.kill(which(process), by)
        rewards = grader.result(grader.submit("\\boxed{x/3}", "\\frac{x}{3}", False))
    assert (rewards.accuracy, rewards.timed_out) == (1, False)


def test_graders_end_with_their_parent():
    program = (
        "import time; from megatron_papo.rollout.grader_process import GraderProcess as G;"
        "print(G(1.0)._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    grader = int(parent.stdout.readline())
    os.kill(grader, signal.SIGSTOP)  # even one that cannot notice
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while Path(f"/proc/{grader}/cmdline").exists() and Path(f"/proc/{grader}/cmdline").read_bytes():
        assert time.monotonic() < until
        time.sleep(0.05)

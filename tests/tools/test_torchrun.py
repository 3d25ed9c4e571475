"""tools.torchrun starts processes as torchrun does, and is quiet where a stage has said what is wrong."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tools.torchrun import with_separator

PROGRAM = """
import os, signal, sys, time
rank, what = os.environ["RANK"], sys.argv[2]
def say(*words): # in one piece: the processes share the pipe
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
say("started", rank, os.environ["WORLD_SIZE"], sys.argv[1])
if what == "meet":
    import psutil, torch.distributed
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    listening = [process.net_connections() for process in (psutil.Process(), psutil.Process(os.getppid()))]
    say(*{one.laddr.ip for many in listening for one in many if one.status == "LISTEN"}, len(listening[1]) > 0)
    torch.distributed.barrier()
if what == "fail" and rank == "0":
    print("error: no such thing: make it", file=sys.stderr, flush=True)
    os._exit(2)
if what == "die" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if what not in ("end", "meet"):
    time.sleep(60)
"""


def torchrun(tmp_path, what, module="tools.torchrun", **environment):
    (tmp_path / "program_of_test.py").write_text(PROGRAM)
    command = [sys.executable, "-m", module, "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["--"] * (module != "tools.torchrun") + ["program_of_test", "--run", what]
    environment |= {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


def test_processes_get_their_ranks_and_their_arguments(tmp_path):
    done = torchrun(tmp_path, "end")
    assert done.returncode == 0 and sorted(done.stdout.split("\n")) == ["", "started 0 2 --run", "started 1 2 --run"]


def test_processes_of_one_machine_meet_on_loopback_whatever_the_environment_says_and_leave_nothing(tmp_path):
    left = tmp_path / "tmp"
    left.mkdir()
    other = {"PET_NNODES": "2", "RANK": "7", "WORLD_SIZE": "9", "MASTER_ADDR": "10.0.0.1", "TMPDIR": str(left)}
    done = torchrun(tmp_path, "meet", **other)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines.count("127.0.0.1 True") == 2, done.stdout + done.stderr
    assert sorted(lines)[-2:] == ["started 0 2 --run", "started 1 2 --run"]
    assert list(left.iterdir()) == []


def test_a_stage_that_fails_has_the_last_word(tmp_path):
    done = torchrun(tmp_path, "fail")
    assert done.returncode == 2 and done.stderr.splitlines() == ["error: no such thing: make it"]
    control = torchrun(tmp_path, "fail", "torch.distributed.run")
    assert control.returncode == 1 and len(control.stderr.splitlines()) > 20


def test_standalone_is_for_one_machine(tmp_path):
    command = [sys.executable, "-m", "tools.torchrun", "--standalone", "--nnodes", "2", "-m", "no_such_module"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: --standalone is for one machine, --nnodes is 2: leave it")


def test_a_process_that_is_killed_is_named(tmp_path):
    done = torchrun(tmp_path, "die")
    assert done.returncode == 1 and done.stderr.splitlines() == ["error: rank 1 was ended by SIGKILL (out of memory?)"]


@pytest.mark.parametrize(
    "given, made",
    [
        (["--standalone", "-m", "stages.s", "--run", "r"], ["--standalone", "-m", "--", "stages.s", "--run", "r"]),
        (["-m", "--", "stages.s"], ["-m", "--", "stages.s"]),
        (["script.py", "--run", "r"], ["script.py", "--run", "r"]),
    ],
)
def test_separator(given, made):
    assert with_separator(given) == made

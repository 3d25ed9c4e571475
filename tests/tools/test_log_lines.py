"""The log describes a command and never ends it."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT


def logged(log, text: bytes, name="stage 1") -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "log_lines.py", log, name]
    return subprocess.run(command, input=text, capture_output=True, timeout=60)


def test_lines_have_time_and_name_once(tmp_path):
    log = tmp_path / "log.txt"
    done = logged(log, "stage 1: train: 64 prompts\nbar 1\rbar 2\n\x1b[31mred\x1b[0m é".encode())
    assert done.stdout.decode() == "stage 1: train: 64 prompts\nbar 2\nred é\n"
    assert [line[20:] for line in log.read_text().splitlines()] == [
        "stage 1: train: 64 prompts",
        "stage 1: bar 2",
        "stage 1: red é",
    ]


@pytest.mark.parametrize("log", ["/dev/full", "/nowhere/log.txt", "/"])
def test_a_log_that_cannot_be_written_is_left_out(log):
    done = logged(log, b"one\ntwo\n" * 2000)
    assert done.returncode == 0 and done.stdout == b"one\ntwo\n" * 2000 and done.stderr == b""

"""What only describes a run ends nothing."""

import sys
from types import SimpleNamespace

import psutil
import pytest

from megatron_papo.config_files import load_config
from megatron_papo.run import curves, describing
from megatron_papo.run.describing import command_line, describes, git_commit, package_versions, process_start
from megatron_papo.run.run_directory import RunDirectory
from tests.helpers import DEMO_CONFIG


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a\nb"), RecursionError()])
def test_any_failure_is_one_warning(capsys, error):
    with describes("a plot"):
        raise error
    said = capsys.readouterr().err
    assert said.startswith("warning: a plot: left out: ") and said.count("\n") == 1


def test_who_stops_the_run_is_heard():
    with pytest.raises(KeyboardInterrupt), describes("a plot"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("said", [b"\xff\xfe", b"", b"1234\n"])
def test_whatever_git_says(tmp_path, monkeypatch, said):
    git = tmp_path / "git"
    git.write_bytes(b"#!/bin/sh\nprintf '" + said.replace(b"\n", b"\\n") + b"'\nexit 3\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() == (said.decode("ascii").strip() or None if said.isascii() else None)
    git.chmod(0o644)
    assert git_commit() is None


def broken(*_, **__):
    raise ZeroDivisionError


def test_a_package_or_a_clock_that_does_not_tell(monkeypatch, capsys):
    monkeypatch.setattr(describing.metadata, "version", broken)
    monkeypatch.setattr(psutil.Process, "create_time", broken)
    assert set(package_versions().values()) == {None} and process_start() > 0
    assert "warning: the start of this process" in capsys.readouterr().err


def test_the_command_runs_as_it_stands(monkeypatch):
    """With the interpreter of the environment, quoted, and with torchrun where that started it."""
    python = describing.typed_python()
    assert python.endswith("/bin/python")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="tools.convert.__main__"))
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--hf", "a b"])
    assert command_line() == f"{python} -m tools.convert --hf 'a b'"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    torchrun = "-m tools.torchrun --standalone --nproc-per-node 4 -m -- tools.convert"
    assert command_line() == f"{python} {torchrun} --hf 'a b'"


def test_curves_that_cannot_be_drawn(tmp_path, capsys):
    run = RunDirectory(tmp_path, load_config(DEMO_CONFIG))
    run.metrics.mkdir()  # where a file should be
    run.tensorboard.mkdir()
    (run.tensorboard / curves.COLLECTED).write_text("[" * 5000)
    curves.collect(run)
    assert capsys.readouterr().err.count("warning: ") == 2

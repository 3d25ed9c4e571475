"""The commands that an installation offers: each is the tool of its name, from any directory."""

import os
import subprocess
import sys
import tomllib

import pytest

from tests.helpers import ROOT

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def call(script: str, directory, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command as the file that pip writes for it does, in another directory."""
    module, _, function = SCRIPTS[script].partition(":")
    program = f"import sys; from {module} import {function}; sys.argv[0] = {script!r}; sys.exit({function}())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", program, *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_that_of_the_tool(script, tmp_path):
    module = "tools." + script.removeprefix("papo-").replace("-", "_")
    command = [sys.executable, "-m", module, "--help"]
    expected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert expected.returncode == 0
    done = call(script, tmp_path, "--help")
    after_usage = [printed.split("\n\n", 1)[1] for printed in (done.stdout, expected.stdout)]
    assert done.returncode == 0 and after_usage[0] == after_usage[1]


def test_a_mistake_is_one_line_and_paths_are_the_callers(tmp_path):
    done = call("papo-convert", tmp_path, "inspect", "nothing")
    assert done.returncode == 2 and done.stderr.startswith("error: nothing")
    (tmp_path / "nothing").mkdir()
    other = call("papo-convert", tmp_path, "inspect", "nothing")
    assert other.returncode == 2 and other.stderr != done.stderr, "the directory of the caller was looked at"

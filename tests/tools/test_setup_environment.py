"""Which Python tools/setup_environment.sh takes, and when it makes an environment again.

Pythons and pips that only write down what they are asked stand in for real ones, which would download gigabytes."""

import os
import shutil
import subprocess

import pytest

from tests.helpers import ROOT

PYTHON = """#!/bin/bash
case "$*" in
  *version_info*) echo {version} ;;
  "-m venv --clear "*)
    rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"
    printf '#!/bin/bash\\necho "$(basename "$(dirname "$(dirname "$0")")") $*" >>calls.txt\\n' >"$4/bin/pip"
    chmod +x "$4/bin/pip"; echo "venv {version} $4" >>calls.txt ;;
esac
"""
REQUIREMENTS = ("requirements.txt", "requirements-test.txt", "requirements-dev.txt", "requirements-sglang-cpu.txt")


@pytest.fixture
def tree(tmp_path):
    """A tree with the script and empty lists of packages; bin/ is where its Pythons are."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "tools" / "setup_environment.sh", tmp_path / "tools")
    for name in (*REQUIREMENTS, "pyproject.toml"):
        (tmp_path / name).write_text("")
    return tmp_path


def add_python(tree, name: str, version: str):
    """Put a Python of a version under a name."""
    path = tree / "bin" / name
    path.write_text(PYTHON.format(version=version))
    path.chmod(0o755)


def set_up(tree, *arguments, **environment):
    """Run the script with no Python but those of the tree; return its exit status, what it said and what it called."""
    (tree / "calls.txt").unlink(missing_ok=True)
    for program in (
        "bash",
        "sed",
        "cat",
        "sha256sum",
        "dirname",
        "basename",
        "flock",
        "mkdir",
        "rm",
        "cp",
        "chmod",
        "grep",
    ):
        if not (tree / "bin" / program).exists():
            (tree / "bin" / program).symlink_to(shutil.which(program))
    command = ["bash", "tools/setup_environment.sh", *arguments]
    clean = {"PATH": str(tree / "bin"), "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(command, cwd=tree, env=clean | environment, capture_output=True, text=True, timeout=60)
    calls = (tree / "calls.txt").read_text() if (tree / "calls.txt").exists() else ""
    return done.returncode, done.stdout + done.stderr, calls


def installed_from(tree, checkout):
    """Leave what pip leaves of an editable install."""
    (tree / ".venv" / "bin" / "papo-convert").write_text("")
    record = tree / ".venv/lib/python3.11/site-packages/megatron_papo-0.2.0.dist-info/direct_url.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(f'{{"dir_info": {{"editable": true}}, "url": "file://{checkout}"}}')


def test_another_python3_is_passed_over(tree):
    add_python(tree, "python3", "3.13")
    add_python(tree, "python3.12", "3.12")
    status, said, calls = set_up(tree)
    assert status == 0 and "with python3.12, Python 3.12" in said
    assert "venv 3.12 .venv\n" in calls and "venv 3.12 .venv-sglang\n" in calls
    assert "-r requirements.txt -r requirements-test.txt -r requirements-dev.txt" in calls
    assert "--no-deps --no-build-isolation" in calls and calls.count("-e .") == 1


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_python3_itself_and_nothing_to_do_the_second_time(tree, version):
    add_python(tree, "python3", version)
    status, said, calls = set_up(tree, "--without-sglang")
    assert status == 0 and f"with python3, Python {version}" in said and ".venv-sglang" not in calls
    installed_from(tree, tree)
    assert set_up(tree, "--without-sglang") == (0, "", "")
    installed_from(tree, tree.parent)  # the environment is another checkout's
    assert set_up(tree, "--without-sglang")[2].endswith("-e .\n")
    installed_from(tree, tree)
    (tree / "requirements-dev.txt").write_text("ruff\n")
    status, said, calls = set_up(tree, "--without-sglang")
    assert status == 0 and "requirements-dev.txt" in calls and "venv 3" not in calls, (
        "the same environment, once more pip"
    )


def test_python_chooses_and_an_environment_of_another_version_is_made_again(tree):
    add_python(tree, "python3", "3.11")
    set_up(tree, "--without-sglang")
    add_python(tree, "mine", "3.12")
    status, said, calls = set_up(tree, "--without-sglang", PYTHON="mine")
    assert status == 0 and "with mine, Python 3.12" in said and "venv 3.12 .venv\n" in calls
    status, said, calls = set_up(tree, "--without-sglang")
    assert status == 0 and "venv" not in calls.replace(".venv", ""), "without PYTHON the environment keeps its version"


@pytest.mark.parametrize(
    "pythons, environment, message",
    [
        ({"python3": "3.13", "python3.12": "3.13"}, {}, "(python3 is 3.13,python3.12 is 3.13)"),
        ({"python3": "3.11", "old": "3.10"}, {"PYTHON": "old"}, "(old is 3.10)"),
        ({"python3": "3.11"}, {"PYTHON": "/nowhere/python"}, "(/nowhere/python does not run)"),
        ({}, {}, "python3.11 does not run)"),
    ],
)
def test_no_python_that_will_do(tree, pythons, environment, message):
    for name, version in pythons.items():
        add_python(tree, name, version)
    status, said, calls = set_up(tree, **environment)
    assert status == 2 and said.startswith("error: needs Python 3.11 or 3.12 ") and message in said
    assert calls == "" and not (tree / ".venv").exists()

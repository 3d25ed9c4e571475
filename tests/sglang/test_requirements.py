"""The lists of packages of the server: everything at one version, what is asked for, one torch on both sides."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ROOT

LOCK = "requirements-sglang-cuda.txt"
TORCH = "torch==2.13.0"


def lines_of(text: str) -> list[str]:
    """Return the requirements of a list, without comments."""
    lines = (re.sub(r"\s*#.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def problems(lock: str, asked: str) -> list[str]:
    """Return what is wrong with a lock file: lines without one version, and what is asked for and not met."""
    unpinned = [line for line in lines_of(lock) if not re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", line)]
    pins = dict(line.split("==") for line in lines_of(lock) if line not in unpinned)
    unmet = []
    for line in [*lines_of(asked), TORCH]:
        wanted = Requirement(line)
        applies = wanted.marker is None or any(
            wanted.marker.evaluate({"extra": "", "python_version": version, "platform_machine": "x86_64"})
            for version in ("3.11", "3.12")
        )
        version = pins.get(canonicalize_name(wanted.name))
        if applies and (version is None or not wanted.specifier.contains(version, prereleases=True)):
            unmet.append(line)
    return unpinned + unmet


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def test_the_lock_file_is_complete_and_exact():
    assert problems(text_of(LOCK), text_of("requirements-sglang.txt")) == []


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("sglang==0.5.21", "sglang==0.5.20", "sglang==0.5.21"),
        (TORCH, "torch==2.12.0", TORCH),
        ("uvloop==0.23.0", "uvloop>=0.23", "uvloop>=0.23"),
    ],
)
def test_a_damaged_lock_file_is_noticed(old, new, problem):
    assert problems(text_of(LOCK).replace(old, new, 1), text_of("requirements-sglang.txt")) == [problem]


def test_the_lock_file_has_what_sglang_itself_asks_for():
    """Its own metadata, from the wheel that serves on CPUs, which is the same."""
    [metadata] = (ROOT / ".venv-sglang").glob("lib/python3*/site-packages/sglang-*.dist-info/METADATA")
    asked = re.findall(r"^Requires-Dist: (.*)", metadata.read_text(), re.MULTILINE)
    linux = [line for line in asked if "extra ==" not in line]
    assert len(linux) > 50 and problems(text_of(LOCK), "\n".join(linux)) == []
    assert problems(text_of(LOCK), "torch==2.13.0\nnot-there>=1") == ["not-there>=1"]  # control


def test_one_torch_everywhere():
    for name in (LOCK, "requirements.txt", "requirements-sglang-cpu.txt"):
        assert TORCH in lines_of(text_of(name)), name
    assert f"\nTORCH={TORCH}\n" in text_of("tools/setup_environment.sh")

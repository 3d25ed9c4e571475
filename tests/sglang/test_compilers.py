"""What SGLang and Triton compile with is looked for where they look, and named with what to install."""

from pathlib import Path

import pytest

from megatron_papo.sglang import compilers
from megatron_papo.sglang.compilers import missing_for_server, missing_for_triton, nvcc


def program(path: Path, text: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def complete(tmp_path):
    """An interpreter with headers and its own ninja, and an environment with all compilers -> (Python, environment)."""
    python = program(tmp_path / "venv" / "bin" / "python", f"echo {tmp_path}/include/python3.12")
    program(tmp_path / "venv" / "bin" / "ninja")
    (tmp_path / "include" / "python3.12").mkdir(parents=True)
    (tmp_path / "include" / "python3.12" / "Python.h").touch()
    for name in ("gcc", "c++", "nvcc"):
        program(tmp_path / "bin" / name)
    return python, {"PATH": str(tmp_path / "bin")}


@pytest.mark.parametrize(
    "gone, messages",
    [
        (None, []),
        ("bin/gcc", ["no C compiler (gcc, clang, cc): .*apt install build-essential"]),
        ("bin/c++", ["no C++ compiler (c++): .*apt install build-essential"]),
        ("bin/nvcc", ["no nvcc (/nowhere/cuda/bin/nvcc): .*CUDA toolkit 13.*CUDA_HOME"]),
        ("venv/bin/ninja", ["no ninja: .*-m pip install ninja"]),
        ("include/python3.12/Python.h", ["no .*/Python.h: .*apt install python3.12-dev"]),
    ],
)
def test_each_is_missed(complete, tmp_path, monkeypatch, gone, messages):
    monkeypatch.setattr(compilers, "CUDA_TOOLKIT", "/nowhere/cuda")
    if gone:
        (tmp_path / gone).unlink()
    found = missing_for_server(*complete)
    assert len(found) == len(messages)
    for line, message in zip(found, messages):
        start, _, end = message.partition(".*")
        assert line.startswith(start) and all(part in line for part in end.split(".*")), line


def test_variables_name_other_compilers(complete, tmp_path):
    python, environment = complete
    found = missing_for_server(python, environment | {"CC": "icc", "CXX": "icpc", "CUDA_HOME": "/gone"})
    assert [line.partition(": ")[0] for line in found] == [
        "no C compiler (icc)", "no C++ compiler (icpc)", "no nvcc (/gone/bin/nvcc)",
    ]  # fmt: skip
    program(tmp_path / "bin" / "icpc")
    assert missing_for_server(python, environment | {"CXX": "icpc -O2"}) == []
    program(tmp_path / "cuda" / "bin" / "nvcc")
    assert nvcc({"CUDA_PATH": str(tmp_path / "cuda"), **environment}) == tmp_path / "cuda" / "bin" / "nvcc"
    assert nvcc(environment) == tmp_path / "bin" / "nvcc"


def test_training_needs_less(complete, tmp_path):
    for name in ("bin/nvcc", "bin/c++", "venv/bin/ninja"):
        (tmp_path / name).unlink()
    assert missing_for_triton(*complete) == []
    (tmp_path / "bin" / "gcc").unlink()
    assert len(missing_for_triton(*complete)) == 1


def test_a_python_that_does_not_run_is_no_matter_of_headers(complete, tmp_path):
    program(complete[0], "exit 1")
    assert missing_for_triton(*complete) == []

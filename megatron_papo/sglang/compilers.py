"""What compiles kernels on a machine with GPUs: SGLang and Triton do so when they first need one.

SGLang 0.5.21 runs ninja, a C++ compiler and nvcc (its kernels of activations, norms and rotary positions have no other
form), Triton a C compiler with Python's headers. The standard library alone, like distributed/gpus.py.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

CUDA_TOOLKIT = "/usr/local/cuda"
"""Where nvcc is looked for at last, as SGLang does."""
C_COMPILERS = ("gcc", "clang", "cc")
COMPILERS = "install a C and C++ compiler (Debian, Ubuntu: apt install build-essential; clusters: module load gcc)"


def path_of_server(python: Path, environment: Mapping[str, str]) -> str:
    """Return the PATH of a server: its environment's programs (ninja is one of them) before the caller's."""
    return os.pathsep.join([str(python.parent), *filter(None, [environment.get("PATH")])])


def missing_for_server(python: Path, environment: Mapping[str, str]) -> list[str]:
    """Return what an SGLang server on GPUs lacks to compile its kernels: one line each, with what to install.

    Args:
        python: interpreter of its environment.
        environment: in which it will be started.
    """
    missing = missing_of_system(python, environment)
    if shutil.which("ninja", path=path_of_server(python, environment)) is None:
        missing.append(f"no ninja: SGLang compiles kernels: run {python} -m pip install ninja")
    return missing


def missing_of_system(python: Path, environment: Mapping[str, str]) -> list[str]:
    """The same without what pip installs beside SGLang."""
    missing = missing_for_triton(python, environment)
    compiler = environment.get("CXX") or "c++"
    if not _is_program(compiler, environment):
        missing.append(f"no C++ compiler ({compiler}): SGLang compiles kernels: {COMPILERS}, or set CXX")
    if not nvcc(environment).is_file():
        missing.append(
            f"no nvcc ({nvcc(environment)}): SGLang compiles kernels: install the CUDA toolkit 13 (clusters: module"
            " load cuda), or set CUDA_HOME to where it is"
        )
    return missing


def missing_for_triton(python: Path, environment: Mapping[str, str]) -> list[str]:
    """Return what Triton lacks: it compiles in training, too, for torch.compile. Arguments as above."""
    missing = []
    compilers = [environment["CC"]] if environment.get("CC") else C_COMPILERS
    if not any(_is_program(name, environment) for name in compilers):
        missing.append(f"no C compiler ({', '.join(compilers)}): Triton compiles kernels: {COMPILERS}, or set CC")
    headers = python_headers(python)
    if headers is not None and not (headers / "Python.h").is_file():
        missing.append(
            f"no {headers / 'Python.h'}: Triton compiles kernels: install the headers of this Python (Debian, Ubuntu:"
            f" apt install {headers.name}-dev; Red Hat: dnf install {headers.name}-devel)"
        )
    return missing


def _is_program(command: str, environment: Mapping[str, str]) -> bool:
    """Say whether the program of a command, which may carry flags, is on PATH."""
    return shutil.which((command.split() or [""])[0], path=environment.get("PATH", "")) is not None


def nvcc(environment: Mapping[str, str]) -> Path:
    """Return where SGLang looks for nvcc: $CUDA_HOME, $CUDA_PATH, PATH, /usr/local/cuda."""
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    found = None if home else shutil.which("nvcc", path=environment.get("PATH", ""))
    return Path(found) if found else Path(home or CUDA_TOOLKIT, "bin", "nvcc")


def python_headers(python: Path) -> Path | None:
    """Return the directory in which an interpreter's headers belong; None where it does not run."""
    asked = "import sysconfig; print(sysconfig.get_path('include'))"
    try:
        done = subprocess.run([str(python), "-I", "-c", asked], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return Path(done.stdout.strip()) if done.returncode == 0 and done.stdout.strip() else None

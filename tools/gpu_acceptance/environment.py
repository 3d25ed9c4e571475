"""Section environment: what this machine has, and what is missing."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_papo.distributed.gpus import driver_version
from megatron_papo.sglang.compilers import missing_for_server
from tools.gpu_acceptance.report import Fact, Line, passed_if
from tools.gpu_acceptance.task import Task

ROOT = Path(__file__).resolve().parents[2]


def run(task: Task) -> Iterator[Line | Fact]:
    yield Fact("machine", f"{os.cpu_count()} CPU cores, {_memory()} memory, {platform.platform()}")
    free = shutil.disk_usage(task.output).free
    yield Fact("disk", f"{free / 1e9:.0f} GB free at the output directory")
    python = sys.version_info
    yield Line("Python 3.11 or 3.12", passed_if(python[:2] in ((3, 11), (3, 12))), platform.python_version())
    differing = _differing()
    if differing:
        yield Line("the pinned packages (requirements.txt)", "not possible", f"other ones here: {', '.join(differing)}")
    else:
        yield Line("the pinned packages (requirements.txt)", "pass", "all as pinned")
    yield from _torch(task)
    yield _sglang()
    if task.device == "cuda":
        missing = missing_for_server(ROOT / ".venv-sglang-cuda" / "bin" / "python", os.environ)
        found = "; ".join(missing) if missing else "all there"
        yield Line("what SGLang compiles its kernels with", "not possible" if missing else "pass", found)


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 1e9:.0f} GB"


def _differing() -> list[str]:
    """Return the packages of requirements.txt that are missing or of another version."""
    differing = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        pinned = re.match(r"([\w.-]+)==([\w.]+)", line)
        if pinned is None:
            continue
        try:
            here = version(pinned[1]).partition("+")[0]
        except PackageNotFoundError:
            here = "none"
        if here != pinned[2]:
            differing.append(f"{pinned[1]} {here} instead of {pinned[2]}")
    return differing


def _torch(task: Task) -> Iterator[Line | Fact]:
    try:
        import torch
    except ImportError:
        yield Line("torch", "fail", "not installed: bash tools/setup_environment.sh")
        return
    yield Fact("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if task.device == "cpu":
        yield Line("torch computes on a GPU", "not possible", "--device cpu")
        return
    yield Line("torch computes on a GPU", passed_if(torch.cuda.is_available()), _why_cuda(torch.cuda.is_available()))
    if not torch.cuda.is_available():
        return
    yield Fact("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        major, minor = properties.major, properties.minor
        yield Line(
            f"GPU {number} computes in bfloat16",
            passed_if(major >= 8),
            f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, compute capability {major}.{minor}",
        )


def _why_cuda(available: bool) -> str:
    import torch

    driver = driver_version() or "none"
    if available:
        return f"driver {driver}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build for CPUs: DEVICE=cuda bash tools/setup_environment.sh"
    return f"driver {driver} is too old for CUDA {torch.version.cuda}, or there is no GPU here"


def _sglang() -> Line:
    """Return whether SGLang's environment is there; it is another one than this."""
    what = "SGLang's environment"
    try:
        from megatron_papo.config import ServerConfig
        from megatron_papo.errors import UserError
        from megatron_papo.sglang.server_start import sglang_python
    except ImportError as error:
        return Line(what, "not possible", f"{error}: bash tools/setup_environment.sh")
    try:
        python = sglang_python(ServerConfig())
    except UserError as error:
        return Line(what, "not possible", str(error))
    program = "from importlib.metadata import version as v; print('SGLang', v('sglang') + ', torch', v('torch'))"
    said = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=60)
    return Line(what, passed_if(said.returncode == 0), (said.stdout or said.stderr.strip()[-200:]).strip())

"""The NVIDIA GPUs of this machine, which device a run computes on, and why torch may be unable to use them.

Asks nvidia-smi, which does not wake CUDA. The standard library alone: tools/setup_environment.sh runs it before
anything is installed.
"""

import os
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

from megatron_papo.errors import UserError

if TYPE_CHECKING:
    from megatron_papo.config import Config

Device = Literal["cpu", "cuda"]

VISIBLE = "CUDA_VISIBLE_DEVICES"
NONE_VISIBLE = ("", "-1")
"""Values of it that ask for the CPUs."""
DRIVERS = {"12": 525, "13": 580}
"""Major version of CUDA that torch is built for -> oldest NVIDIA driver that runs it."""
_ON_CPUS = f"or set {VISIBLE}= (empty) to compute on the CPUs"


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many GPUs this process sees."""
    visible = environment.get(VISIBLE)
    if visible in NONE_VISIBLE:
        return 0
    there = sum(line.startswith("GPU ") for line in _nvidia_smi("-L"))
    if visible is None:
        return there
    return min(there, len([name for name in visible.split(",") if name.strip() not in NONE_VISIBLE]))


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, e.g. "580.65.06"; None where there is none."""
    return next(iter(_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")), None)


def _nvidia_smi(*arguments: str) -> list[str]:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def wanted_device() -> Device | None:
    """Return what $DEVICE asks for; None where it is not set. Raises UserError for anything but cpu and cuda."""
    device = os.environ.get("DEVICE") or None
    if device is None:
        return None
    for known in get_args(Device):
        if device == known:
            return known
    raise UserError(f"DEVICE={device}: expected cpu or cuda: correct it, or unset DEVICE")


def device_of(config: "Config") -> Device:
    """Return what a run computes on here: what $DEVICE says; else the GPUs, where there are any.

    The tiny model that stage 1 makes (`model.path: null`) computes on the CPUs: it is there to try the pipeline, in
    more processes than a machine may have GPUs.
    """
    wanted = wanted_device()
    if wanted is not None:
        return wanted
    return "cuda" if config.model.path is not None and count_gpus() else "cpu"


def hide_unused_gpus(config: "Config") -> str | None:
    """Hide the GPUs from this process, and from those it starts, where the run computes on the CPUs of a machine that
    has some.

    Returns the line that says so; None where there is nothing to hide.
    """
    if config.model.path is not None and wanted_device() is None:
        return None
    if device_of(config) == "cuda" or not count_gpus():
        return None
    os.environ[VISIBLE] = ""
    if wanted_device() == "cpu":
        return "on the CPUs of this machine, as DEVICE=cpu asks for"
    return "on the CPUs of this machine: the tiny model needs no GPU (DEVICE=cuda takes the GPUs)"


def driver_problem(cuda: str) -> str | None:
    """Return why the driver of this machine cannot run torch, and what to do; None where it can, or there is none.

    Args:
        cuda: version that torch is built for, e.g. "13.0".
    """
    driver, needed = driver_version(), DRIVERS.get(cuda.partition(".")[0])
    number = (driver or "").partition(".")[0]
    if needed is None or not number.isdigit() or int(number) >= needed:
        return None
    return (
        f"NVIDIA driver {driver}: torch is built for CUDA {cuda}, which needs driver {needed} or newer: update the"
        f" driver, or, on data center GPUs, put NVIDIA's package cuda-compat-{cuda.replace('.', '-')} into"
        " LD_LIBRARY_PATH (docs/gpu.md)"
    )


def require_usable_gpus() -> None:
    """Raise UserError where this machine has GPUs and torch cannot compute on them: training would go on, on the CPUs.

    Nothing is wrong where the CPUs were asked for by an empty CUDA_VISIBLE_DEVICES.
    """
    import torch

    if torch.cuda.is_available():
        return
    count = count_gpus()
    if not count:
        return
    if torch.version.cuda is None:
        raise UserError(
            f"{count} NVIDIA GPUs here, but torch {torch.__version__} is a build for CPUs:"
            f" run DEVICE=cuda bash tools/setup_environment.sh, {_ON_CPUS}"
        )
    problem = driver_problem(torch.version.cuda) or (
        f"{count} NVIDIA GPUs here, but torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use"
        " them: see what .venv/bin/python -c 'import torch; torch.cuda.init()' says"
    )
    raise UserError(f"{problem}, {_ON_CPUS}")

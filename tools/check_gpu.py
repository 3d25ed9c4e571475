"""Say what keeps this machine's NVIDIA GPUs from being used: driver, compilers, and with --torch the installed torch.

    .venv/bin/python -m tools.check_gpu --torch

tools/setup_environment.sh runs it where it installs for GPUs. Exit status 2 if they cannot be used; what compiles the
kernels of SGLang and Triton, on this machine or the one that will run them, is only spoken of. The standard library
alone, but for --torch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_papo.distributed.gpus import count_gpus, driver_problem, require_usable_gpus
from megatron_papo.errors import UserError
from megatron_papo.sglang.compilers import missing_of_system

CUDA = "13.0"
"""For which torch and SGLang are built in the versions that requirements*.txt pin."""


def check_machine() -> None:
    """Raise UserError where the driver is too old for what will be installed; say which compilers are missing."""
    problem = driver_problem(CUDA)
    if problem is not None:
        raise UserError(f"{problem}, or set DEVICE=cpu")
    where = "" if count_gpus() else " (needed on the machine with the GPUs, not on this one)"
    for line in missing_of_system(Path(sys.executable), os.environ):
        print(f"warning: {line}{where}", file=sys.stderr)


def check_torch() -> None:
    """Raise UserError where the installed torch is none for GPUs, or cannot use those of this machine."""
    import torch

    if torch.version.cuda is None:
        raise UserError(
            f"torch {torch.__version__} is a build for CPUs: let pip find one for CUDA (PIP_INDEX_URL, PIP_FIND_LINKS,"
            " constraints), or set DEVICE=cpu"
        )
    require_usable_gpus()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=".venv/bin/python -m tools.check_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--torch", action="store_true", help="check the torch of this interpreter, not the machine")
    args = parser.parse_args(arguments)
    try:
        check_torch() if args.torch else check_machine()
    except UserError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

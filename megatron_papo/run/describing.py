"""What only describes a run: who made it, with which versions, when, in which picture.

It decides nothing, so it ends nothing: whatever goes wrong while it is made is one warning, and the work goes on.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import psutil

from megatron_papo.reading import in_short, shown

_RECORDED_PACKAGES = (
    "torch",
    "megatron-core",
    "deepspeed",
    "transformers",
    "tokenizers",
    "safetensors",
    "pillow",
    "numpy",
    "mathruler",
)


@contextmanager
def describes(what: object) -> Iterator[None]:
    """Turn whatever goes wrong inside into one line on stderr.

    with describes("the model card"):
        write_model_card(directory)

    Args:
        what: What is then left out, as a user knows it.
    """
    try:
        yield
    except Exception as error:
        print(f"warning: {shown(what, limit=0)}: left out: {in_short(error)}", file=sys.stderr, flush=True)


def git_commit() -> str | None:
    """Return the commit of this code; None where git or the repository is missing, which is no reason to warn."""
    command = ["git", "rev-parse", "HEAD"]
    with describes("the git commit"):
        try:
            said = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return said.stdout.decode("ascii").strip() or None
    return None


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that a result may depend on; None for one that does not say."""
    return {name: _version(name) for name in _RECORDED_PACKAGES}


def _version(package: str) -> str | None:
    with describes(f"the version of {package}"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            return None
        return None if version is None else str(version)
    return None


def command_line() -> str:
    """Return the command that started this process, with the torchrun that did, as it can be typed."""
    arguments = list(sys.argv)
    with describes("the command"):
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if spec is not None:
            name = spec.name.removesuffix(".__main__")
            arguments = [*_torchrun(), "-m", *(["--"] * bool(_torchrun())), name, *sys.argv[1:]]
    return shlex.join([typed_python(), *arguments])


def _torchrun() -> list[str]:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    return ["-m", "tools.torchrun", "--standalone", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]


def typed_python() -> str:
    """Return this interpreter as it can be typed in the current directory, links in its path not followed."""
    python = Path(os.path.abspath(sys.executable))
    if python.with_name("python").exists():  # torchrun starts its processes with python3
        python = python.with_name("python")
    with describes("the current directory"):
        return str(python.relative_to(Path.cwd())) if python.is_relative_to(Path.cwd()) else str(python)
    return str(python)


def process_start() -> float:
    """Return when this process started, as time.time() says it; now, where the system does not tell."""
    with describes("the start of this process"):
        return psutil.Process().create_time()
    return time.time()


def seconds_since(started: float) -> float:
    """Return the seconds from `started` (time.time()) to now; never less than none, though clocks are set back."""
    return round(max(0.0, time.time() - started), 2)

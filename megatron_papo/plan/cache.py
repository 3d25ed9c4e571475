"""Traces that were made before: a file each, under a name that says what was traced.

Below $XDG_CACHE_HOME/megatron_papo/plan (~/.cache where it is not set); it may be deleted at any time.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they import torch, and whether there is anything here must be quick to say
    from megatron_papo.plan.layers import Asked, Traces
    from megatron_papo.plan.trace import Numbers

ROOMS = ("config.py", "distributed", "model", "objective", "training")
OF_PLAN = ("fake_device.py", "ledger.py", "trace.py", "workload.py")
"""Whose code decides what a trace finds."""
SECTIONS = ("model", "parallel", "objective", "optimizer", "training", "masked_image", "kept_image")
"""Of the configuration, beside the numbers of _key."""
PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex")
"""Whose kernels hold memory; the last two need not be there."""


def directory() -> Path:
    """Return where traces are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "megatron_papo" / "plan"


def cached(traces: "Traces") -> "Traces":
    """Return `traces` with a memory on disk: it is asked for those alone that are not there yet, each once."""

    def remembered(asked: Sequence["Asked"]) -> list["Numbers"]:
        files = [directory() / f"{_key(each)}.json" for each in asked]
        numbers = {file: _read(file) for file in files}
        missing = {file: each for file, each in zip(files, asked, strict=True) if numbers[file] is None}
        if missing:
            for file, made in zip(missing, traces(list(missing.values())), strict=True):
                numbers[file] = made
                _write(file, made)
        return [found for file in files if (found := numbers[file]) is not None]

    return remembered


def nothing(asked: Sequence["Asked"]) -> list["Numbers"]:
    """Make no traces: `cached(nothing)` finds what is there. Raises LookupError where that is not all."""
    raise LookupError(f"{len(asked)} traces are not in {directory()}")


def _read(file: Path) -> "Numbers | None":
    """Return what a file holds; None where it is not there or damaged: it is then made again."""
    try:
        numbers = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    sound = isinstance(numbers, dict) and "parameters" in numbers and all(isinstance(n, int) for n in numbers.values())
    return numbers if sound else None


def _write(file: Path, numbers: "Numbers") -> None:
    """Keep a trace where that is possible: a plan without a memory is a plan, too."""
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(numbers))
        partial.rename(file)
    except OSError:
        return


def _key(asked: "Asked") -> str:
    config, data, rollout = asked.config, asked.config.data, asked.config.rollout
    sections = config.model_dump(mode="json", include=set(SECTIONS))
    sections["model"].pop("path")
    sections["optimizer"] = {"distributed": config.optimizer.distributed}
    what = {
        "code": _code(),
        "versions": [_version(name) for name in PACKAGES],
        "model": dataclasses.asdict(asked.hf),
        "config": sections,
        "data": [data.max_prompt_tokens, data.min_pixels, data.max_pixels],
        "rollout": [
            rollout.group_size,
            rollout.rollout_batch_size > config.training.global_batch_size,
            rollout.temperature,
            rollout.max_response_tokens,
        ],
        "rank": asked.rank,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@lru_cache
def _code() -> str:
    """Return a hash of the files that decide what a trace finds."""
    package = Path(__file__).resolve().parents[1]
    files = [
        file for room in ROOMS for file in ([package / room] if room.endswith(".py") else (package / room).glob("*.py"))
    ] + [package / "plan" / name for name in OF_PLAN]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()

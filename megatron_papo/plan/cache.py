"""Traces that were made before: a file each, under a name that says what was traced.

Below $XDG_CACHE_HOME/megatron_papo/plan (~/.cache where it is not set); it may be deleted at any time.
"""

import dataclasses
import hashlib
import json
import os
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from megatron_papo.config import Config
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.plan.layers import Trace
from megatron_papo.plan.trace import Numbers
from megatron_papo.plan.workload import Lengths

ROOMS = ("config.py", "distributed", "model", "objective", "plan", "training")
"""Whose code decides what a trace finds."""
SECTIONS = ("model", "parallel", "objective", "optimizer", "training", "masked_image", "kept_image")
"""Of the configuration, beside the numbers of _key."""
PACKAGES = ("torch", "megatron-core")


def directory() -> Path:
    """Return where traces are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "megatron_papo" / "plan"


def cached(trace: Trace, only_there: bool = False) -> Trace:
    """Return `trace` with a memory on disk.

    Args:
        trace: What makes numbers that are not there yet.
        only_there: Raise LookupError instead of tracing.
    """

    def remembered(config: Config, hf: HFConfig, rank: int, lengths: Lengths) -> Numbers:
        file = directory() / f"{_key(config, hf, rank, lengths)}.json"
        numbers = _read(file)
        if numbers is not None:
            return numbers
        if only_there:
            raise LookupError(file)
        numbers = trace(config, hf, rank, lengths)
        _write(file, numbers)
        return numbers

    return remembered


def _read(file: Path) -> Numbers | None:
    """Return what a file holds; None where it is not there or damaged: it is then made again."""
    try:
        numbers = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    sound = isinstance(numbers, dict) and "parameters" in numbers and all(isinstance(n, int) for n in numbers.values())
    return numbers if sound else None


def _write(file: Path, numbers: Numbers) -> None:
    """Keep a trace where that is possible: a plan without a memory is a plan, too."""
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(numbers))
        partial.rename(file)
    except OSError:
        return


def _key(config: Config, hf: HFConfig, rank: int, lengths: Lengths) -> str:
    sections = {name: config.model_dump(mode="json", include={name})[name] for name in SECTIONS}  # may be null
    sections["model"].pop("path")
    sections["optimizer"] = {"distributed": config.optimizer.distributed}
    rollout = config.rollout
    what = {
        "code": _code(),
        "versions": [metadata.version(name) for name in PACKAGES],
        "model": dataclasses.asdict(hf),
        "config": sections,
        "rollout": [rollout.group_size, rollout.rollout_batch_size, rollout.temperature],
        "rank": rank,
        "lengths": dataclasses.asdict(lengths),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


@lru_cache
def _code() -> str:
    """Return a hash of the files that decide what a trace finds."""
    package = Path(__file__).resolve().parents[1]
    files = [
        file for room in ROOMS for file in ([package / room] if room.endswith(".py") else (package / room).glob("*.py"))
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()

"""How tests run the project's commands, and the small run that many of them share."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO_CONFIG = ROOT / "configs" / "demo.yaml"


def run_module(name: str, *arguments, processes: int | None = None, timeout: float = 300, env: dict | None = None):
    """`python -m name arguments` as a user would run it, with torchrun where processes is given -> CompletedProcess
    (text, captured)."""
    return subprocess.run(
        command_of(name, *arguments, processes=processes),
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def command_of(name: str, *arguments, processes: int | None = None) -> list[str]:
    """The command line of run_module."""
    torchrun = (
        [] if processes is None else ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    )
    return [sys.executable, "-m", *torchrun, name, *map(str, arguments)]


def settings(*overrides: str) -> list[str]:
    """`--set` arguments for run_module."""
    return [argument for override in overrides for argument in ("--set", override)]


SMALL_RUN = [
    "data.train.count=16",
    "data.sft.count=64",
    "data.evaluation.count=8",
    "sft.steps=4",
    "rollout.rollout_batch_size=16",
    "evaluation.samples_per_prompt=2",
    "iterations=1",
]
"""What makes a run of configs/demo.yaml small."""

START = ("data", "sft", "reference", "evaluation/sets", "evaluation/iteration_0000")
"""What a run has made before its first iteration."""

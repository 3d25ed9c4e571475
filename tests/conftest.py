"""What all tests share: a small synthetic data set with its tiny model, made once through the command line, and a way to run commands."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO_CONFIG = ROOT / "configs" / "demo.yaml"
# Two threads per process are 20 times slower than one as soon as several processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_modifyitems(items):
    gpu_tests = [item for item in items if "gpu" in item.keywords]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, this machine has none"))


def run_module(name: str, *arguments, processes: int | None = None, timeout: float = 300, env: dict | None = None):
    """`python -m name arguments` as a user would run it, with torchrun where processes is given -> CompletedProcess (text, captured)."""
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
    torchrun = [] if processes is None else ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [sys.executable, "-m", *torchrun, name, *map(str, arguments)]


def settings(*overrides: str) -> list[str]:
    """`--set` arguments for run_module."""
    return [argument for override in overrides for argument in ("--set", override)]


SMALL_RUN = [
    "data.train.count=16", "data.sft.count=64", "data.evaluation.count=8", "sft.steps=4", "rollout.rollout_batch_size=16",
    "evaluation.samples_per_prompt=2", "iterations=1",
]  # fmt: skip
"""What makes a run of configs/demo.yaml small."""


@pytest.fixture(scope="session")
def small_run() -> Path:
    """The run directory of a finished `run_all.sh` with SMALL_RUN."""
    name = f"test-{int(time.time())}"
    command = ["bash", "run_all.sh", "--name", name, *settings(*SMALL_RUN)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    yield ROOT / "runs" / name
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> Path:
    """Output of stage 1: 64 train, 64 sft and 32 evaluation rows of configs/demo.yaml, and the tiny model in model/."""
    output = tmp_path_factory.mktemp("demo") / "data"
    counts = settings("data.train.count=64", "data.sft.count=64", "data.evaluation.count=32")
    result = run_module("stages.stage1_prepare_data", "--config", DEMO_CONFIG, *counts, "--output", output)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="session")
def tiny_hf(demo_data) -> Path:
    """A tiny Hugging Face checkpoint with its tokenizer: the model that stage 1 makes for the demo."""
    return demo_data / "model"

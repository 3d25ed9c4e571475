"""What all tests share: a small synthetic data set with its tiny model, made once through the command line."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers import DEMO_CONFIG, ROOT, SMALL_RUN, run_module, settings

pytest_plugins = ["tests.sglang_server"]
"""The fixtures of the SGLang server, which is started once for tests/sglang, tests/rollout and tests/tools."""

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

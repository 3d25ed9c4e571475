"""What all tests share: a small synthetic data set with its tiny model, made once through the command line."""

import functools
import os
import shutil
import subprocess
import time
from pathlib import Path

import hypothesis
import pytest

from tests.helpers import DEMO_CONFIG, ROOT, SMALL_RUN, run_module, settings
from tests.markers import markers_of, uses_server

pytest_plugins = ["tests.sglang_server"]
"""The fixtures of the SGLang server, which is started once for tests/sglang, tests/rollout and tests/tools."""

# Two threads per process are 20 times slower than one as soon as several processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# On the CPUs, also of a machine with GPUs: float32, and more processes than GPUs.
if os.environ.get("DEVICE") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the markers of tests/markers.py; skip those of GPUs where there is none."""
    for item in items:
        place = item.nodeid.removeprefix("tests/")
        for name in sorted(markers_of(place, set(getattr(item, "fixturenames", ())))):
            item.add_marker(name)
        if item.get_closest_marker("gpu") and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a GPU: DEVICE=cuda bash tests/run.sh -m gpu"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not uses_server(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Keep together, where the tests run in several processes, those of a file, and all that use an SGLang server.

    (A mark xdist_group does nothing under pytest 9.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "server" if uses_server(nodeid) else nodeid.partition("::")[0]

    return ByFile(config, log)


@functools.cache
def has_gpu() -> bool:
    """Tell whether torch sees a CUDA device; imports torch only where a test of GPUs was collected."""
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def environment_as_found():
    """Undo what a test leaves in the environment: the processes that later tests start would inherit it."""
    found = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(found)


@pytest.fixture(scope="session")
def small_run() -> Path:
    """The run directory of a finished `run_all.sh` with SMALL_RUN."""
    name = f"test-{int(time.time())}"
    command = ["bash", "run_all.sh", "--name", name, *settings(*SMALL_RUN)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    yield ROOT / "runs" / name
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)


@pytest.fixture(scope="module")
def prepared(small_run):
    """Makes runs that start where the small run has finished what is listed, with keys of their own."""
    made = []

    def make(suffix, *parts, changes=()):
        run = ROOT / "runs" / f"{small_run.name}-{suffix}"
        write = "from tools.start_run import main; main()"
        arguments = ["--name", run.name, "--config", str(DEMO_CONFIG), *settings(*SMALL_RUN, *changes), "--write"]
        subprocess.run([".venv/bin/python", "-c", write, *arguments], cwd=ROOT, check=True, capture_output=True)
        for part in parts:
            shutil.copytree(small_run / part, run / part)
        made.append(run)
        return run

    yield make
    for run in made:
        shutil.rmtree(run, ignore_errors=True)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> Path:
    """Output of stage 1: 64 train and 64 sft rows of configs/demo.yaml, and the tiny model in model/."""
    output = tmp_path_factory.mktemp("demo") / "data"
    counts = settings("data.train.count=64", "data.sft.count=64")
    result = run_module("stages.stage1_prepare_data", "--config", DEMO_CONFIG, *counts, "--output", output)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="session")
def evaluation_data(demo_data, tmp_path_factory) -> Path:
    """Output of stage 1 for the evaluation set of configs/demo.yaml, 32 rows, made with the tiny model's tokenizer."""
    output = tmp_path_factory.mktemp("demo_evaluation") / "evaluation"
    inputs = ["--evaluation-set", "evaluation", "--hf", demo_data / "model"]
    counts = settings("data.evaluation.count=32")
    result = run_module("stages.stage1_prepare_data", "--config", DEMO_CONFIG, *counts, *inputs, "--output", output)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="session")
def tiny_hf(demo_data) -> Path:
    """A tiny Hugging Face checkpoint with its tokenizer: the model that stage 1 makes for the demo."""
    return demo_data / "model"

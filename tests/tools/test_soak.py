"""tools.soak: a run killed at random ends in the same bits and leaves nothing; and the tool sees what is left."""

import fcntl
import json
import random
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT, run_module
from tools.soak import Disturbed, Report, bits_of, compared, soak


def test_killed_at_random_the_same_bits_and_nothing_left(small_run):
    report = soak(0.75, seed=3, undisturbed=small_run)
    assert report.kills > 0 and report.runs == 1
    assert report.same and report.leftovers == []


def test_a_finished_run_has_its_bits_and_a_changed_one_is_seen(small_run, tmp_path):
    expected = bits_of(small_run)
    for part in ("rollouts/rollouts.jsonl", "megatron/__0_0.distcp", "hf/model.safetensors"):
        assert f"iterations/0001/{part}" in expected
    copy = tmp_path / "copy"
    shutil.copytree(small_run, copy)
    assert compared(expected, copy) == []
    manifest = copy / "iterations/0001/hf/manifest.json"
    tree = json.loads(manifest.read_text())
    tree["files"]["model.safetensors"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(tree))
    assert compared(expected, copy) == [f"{copy}/iterations/0001/hf/model.safetensors: other bits"]
    shutil.rmtree(copy / "iterations/0001/hf")
    assert "iterations/0001/hf: not there" in compared(expected, copy)[0]


@pytest.fixture
def disturbed():
    run = ROOT / "runs" / "test-soak-left"
    run.mkdir(parents=True)
    try:
        with Disturbed(run, [], random.Random(1), Report(1)) as made:
            yield made
    finally:
        shutil.rmtree(run)


def test_what_is_left_over_is_seen(disturbed):
    assert disturbed._left() == []
    (disturbed.run / "iterations.partial").mkdir()
    (disturbed.run / "server").mkdir()
    (disturbed.run / "server/server.json").touch()
    (disturbed.temporary / "torchelastic_1").mkdir()
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "runs/test-soak-left"])
    with open(disturbed.run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        left = disturbed._left()
    orphan.kill()
    orphan.wait()
    for what in (f"process {orphan.pid}", "iterations.partial", "server.json", "torchelastic_1", ".lock: locked"):
        assert any(what in line for line in left), what
    assert len(left) == 5


def test_mistakes(tmp_path):
    for arguments, expected in (
        (["--minutes", "0"], "--minutes 0.0: expected more than 0"),
        (["--minutes", "1", "--undisturbed", tmp_path / "none"], "none"),
    ):
        done = run_module("tools.soak", *arguments)
        assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr

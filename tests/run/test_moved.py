"""A model and a data set from outside are told apart by content: moved, a run goes on; changed, it says so."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from megatron_papo.run.stage_output import read_manifest
from tests.helpers import ROOT, run_module, settings


def run_all(name, *arguments):
    command = ["bash", "run_all.sh", "--name", name, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def name():
    name = f"test-moved-{os.getpid()}"
    yield name
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)


@pytest.fixture
def data(tmp_path):
    """A data set of four rows whose pictures are named by path."""
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
        rows.append({"problem": "<image>how many?", "answer": str(number), "images": [f"pictures/{number}.png"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_moved_and_changed(name, data, tiny_hf, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_hf, model)
    changes = settings("data.sft=null", "sft=null", f"model.path={model}", f"data.train.source={data}/rows.jsonl")
    done = run_all(name, "--stages", "1,3", *changes, *settings("data.evaluation.count=4", "data.train.count=null"))
    assert done.returncode == 0, done.stdout + done.stderr
    run = ROOT / "runs" / name
    made = {part: read_manifest(run / part).fingerprint for part in ("data", "reference")}

    shutil.move(data, tmp_path / "moved")
    shutil.move(model, tmp_path / "elsewhere")
    moved = settings(f"data.train.source={tmp_path}/moved/rows.jsonl", f"model.path={tmp_path}/elsewhere")
    done = run_all(name, "--stages", "1,3", *moved)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("nothing to do") == 3  # compared by content, and the same
    assert made == {part: read_manifest(run / part).fingerprint for part in made}
    again = run_all(name, "--stages", "1,3")
    assert again.returncode == 0 and "stages.stage" not in again.stdout  # the new place is on record

    picture = tmp_path / "moved" / "pictures" / "2.png"
    Image.new("RGB", (56, 56), (9, 9, 9)).save(picture)
    shutil.move(tmp_path / "moved", tmp_path / "changed")
    other = settings(f"data.train.source={tmp_path}/changed/rows.jsonl")
    refused = run_all(name, "--stages", "1", *other)
    assert refused.returncode == 2 and "holds something else than" in refused.stderr
    assert f"{tmp_path}/moved" in (run / "config.yaml").read_text()  # nor does the run take the place over
    shutil.move(tmp_path / "changed", tmp_path / "moved")
    changed = run_module("stages.stage1_prepare_data", "--run", run)  # another picture in the same place
    assert changed.returncode == 2 and "made from something else (differs in inputs.train)" in changed.stderr

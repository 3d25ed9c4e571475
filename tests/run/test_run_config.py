"""A run owns its configuration: what may change while it lives, what may not, and who notices."""

import os
import re
import shutil
import subprocess
import time

import pytest

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.run_config import CONFIG, RECORD, open_run, settle_run, write_run
from tests.helpers import DEMO_CONFIG, ROOT


def start(root, *overrides, given=None, caller=ROOT, command="bash run_all.sh"):
    run, differences = settle_run(root, DEMO_CONFIG, given, overrides, caller)
    write_run(run, differences, command)
    (root / "data").mkdir(exist_ok=True)  # something has been made
    return run, differences


def test_a_run_keeps_every_key_and_the_command(tmp_path):
    start(tmp_path / "r", "seed=7", "iterations=3", command="bash run_all.sh --set seed=7")
    text = (tmp_path / "r" / CONFIG).read_text()
    assert text.startswith("# The configuration of this run, every key. Started with: bash run_all.sh --set seed=7\n")
    assert open_run(tmp_path / "r").config == load_config(DEMO_CONFIG, ["seed=7", "iterations=3"])
    assert "started with: bash run_all.sh --set seed=7" in (tmp_path / "r" / "log.txt").read_text()


def test_a_start_that_was_killed_before_the_configuration_was_there_is_no_run(tmp_path):
    start(tmp_path / "r", "seed=7")
    (tmp_path / "r" / CONFIG).unlink()  # the record is written first
    (tmp_path / "r" / "data").rmdir()
    start(tmp_path / "r", "seed=8")
    assert open_run(tmp_path / "r").config.seed == 8


def test_living_keys_change_and_the_log_says_so(tmp_path):
    start(tmp_path / "r", "seed=7")
    run, differences = start(tmp_path / "r", "iterations=9", "server.port=40000")
    assert {change.key for change in differences} == {"iterations", "server.port"}
    assert open_run(tmp_path / "r").config.iterations == 9 == run.config.iterations
    assert open_run(tmp_path / "r").config.seed == 7  # which the second start did not name
    assert re.search(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d run: iterations: 6 -> 9$", (tmp_path / "r" / "log.txt").read_text(), re.M
    )
    assert (tmp_path / "r" / CONFIG).read_text().splitlines()[0].endswith("Started with: bash run_all.sh")


def test_what_another_run_or_key_left_in_memory_is_removed(tmp_path):
    """A run of the same name that was removed; the same run with another export_directory. Its own stays."""
    first, second = (f"export_directory={tmp_path / name}" for name in ("first", "second"))
    sparse = ["checkpoint_every=3", "hacking_guard.action=warn"]
    run = start(tmp_path / "run", *sparse, first)[0]
    left = run.memory / "0001"
    left.mkdir(parents=True)
    shutil.rmtree(run.root)
    start(run.root, *sparse, first)
    assert not left.exists()
    left.mkdir(parents=True)
    start(run.root, "iterations=9")
    assert left.exists()
    start(run.root, second)
    assert not left.exists()


def test_frozen_keys_are_refused_one_line_each(tmp_path):
    start(tmp_path / "r")
    before = (tmp_path / "r" / CONFIG).read_text()
    with pytest.raises(UserError) as refused:
        start(tmp_path / "r", "seed=7", "optimizer.learning_rate=1", "iterations=9")
    lines = str(refused.value).splitlines()
    assert len(lines) == 2 and "seed is 1 in this run, not 7" in lines[0] and "optimizer.learning_rate" in lines[1]
    assert all("choose another --name" in line for line in lines)
    assert (tmp_path / "r" / CONFIG).read_text() == before


def test_until_something_is_made_every_key_may_change(tmp_path):
    """A run whose first stage has refused the data is mended by the --set that the stage names."""
    start(tmp_path / "r")
    (tmp_path / "r" / "data").rmdir()
    _, differences = start(tmp_path / "r", "data.problem_key=question")
    assert [(change.key, change.living) for change in differences] == [("data.problem_key", False)]
    assert open_run(tmp_path / "r").config.data.problem_key == "question"
    with pytest.raises(UserError, match="data.problem_key is question in this run"):
        start(tmp_path / "r", "data.problem_key=problem")


def test_a_configuration_file_given_again_may_not_change_what_is_frozen(tmp_path):
    changed = tmp_path / "changed.yaml"
    changed.write_text(DEMO_CONFIG.read_text().replace("seed: 1", "seed: 2"))
    start(tmp_path / "r")
    start(tmp_path / "r", given=DEMO_CONFIG)
    with pytest.raises(UserError, match="seed is 1 in this run, not 2"):
        start(tmp_path / "r", given=changed)


def test_an_edit_by_hand_is_refused_with_the_key(tmp_path):
    start(tmp_path / "r", "optimizer.learning_rate=0.0007", "iterations=6")
    file = tmp_path / "r" / CONFIG
    text = file.read_text()
    file.write_text(text.replace("learning_rate: 0.0007", "learning_rate: 0.0008"))
    assert file.read_text() != text
    for reader in (lambda: open_run(tmp_path / "r"), lambda: start(tmp_path / "r")):
        with pytest.raises(UserError, match="optimizer.learning_rate is 0.0007 in this run, not 0.0008"):
            reader()
    file.write_text(text.replace("iterations: 6", "iterations: 8"))  # the control: a living key may be edited
    assert open_run(tmp_path / "r").config.iterations == 8
    assert [change.key for change in start(tmp_path / "r")[1]] == ["iterations"]


def test_a_moved_place_goes_through_the_start(tmp_path):
    start(tmp_path / "r", "data.train.source=/old/rows.jsonl", "model.path=/models/m")
    file = tmp_path / "r" / CONFIG
    file.write_text(file.read_text().replace("/old/rows.jsonl", "/new/rows.jsonl"))
    with pytest.raises(UserError, match="data.train.source changed since the run was last started: start it with"):
        open_run(tmp_path / "r")
    start(tmp_path / "r")
    assert open_run(tmp_path / "r").config.data.train.source == "/new/rows.jsonl"


def test_relative_paths_are_the_callers(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "rows.jsonl").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    places = (
        "data.train.source=rows.jsonl",
        "model.path=model",
        "data.image_root=~/pictures",
        "data.sft=null",
        "sft=null",
    )
    run, _ = start(tmp_path / "r", *places, caller=tmp_path / "here")
    data = run.config.data
    assert data.train.source == str(tmp_path / "here" / "rows.jsonl")
    assert run.config.model.path == str(tmp_path / "here" / "model")
    assert data.image_root == str(tmp_path / "pictures") and data.evaluation.source == "synthetic"
    by_name, _ = start(tmp_path / "s", "data.train.source=somebody/set", "model.path=/m", caller=tmp_path / "here")
    assert by_name.config.data.train.source == "somebody/set"  # a data set by its name


@pytest.mark.parametrize("part", ["data", "iterations"])
def test_a_run_of_an_older_layout_is_named(tmp_path, part):
    (tmp_path / "r" / part).mkdir(parents=True)
    for reader in (lambda: open_run(tmp_path / "r"), lambda: start(tmp_path / "r")):
        with pytest.raises(UserError, match=f"holds {part} but no config.yaml: a run of an older version"):
            reader()


def test_what_is_no_run_and_a_lost_record(tmp_path):
    with pytest.raises(UserError, match="no run .config.yaml is missing.: start one with bash run_all.sh"):
        open_run(tmp_path / "r")
    start(tmp_path / "r")
    (tmp_path / "r" / RECORD).unlink()
    with pytest.raises(UserError, match="missing: the record of the run's configuration"):
        open_run(tmp_path / "r")


@pytest.fixture
def name():
    name = f"test-config-{os.getpid()}"
    yield name
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)


def run_all(*arguments, cwd=ROOT, **options):
    return subprocess.run(
        ["bash", str(ROOT / "run_all.sh"), *arguments], cwd=cwd, capture_output=True, text=True, **options
    )


def test_dry_run_touches_nothing_and_a_second_start_leaves(name, tmp_path):
    """The commands as typed, from another directory."""
    of_another = {"PYTHONPATH": "/no", "PYTHONOPTIMIZE": "x", "PYTHONWARNINGS": "error", "PYTHONINSPECT": "1"}
    done = run_all("--name", name, "--dry-run", cwd=tmp_path, env=os.environ | of_another)
    assert done.returncode == 0 and "makes runs/" in done.stdout and not (ROOT / "runs" / name).exists()
    run = ROOT / "runs" / name
    run.mkdir()
    holder = subprocess.Popen(
        ["flock", run / ".lock", "sh", "-c", f"echo 'process 1 on somewhere' > {run}/.lock; sleep 60"]
    )
    try:
        while not (run / ".lock").exists() or not (run / ".lock").read_text():
            time.sleep(0.05)
        second = run_all("--name", name)
        assert second.returncode == 2 and f"error: runs/{name}: in use by process 1 on somewhere" in second.stderr
        assert sorted(path.name for path in run.iterdir()) == [".lock"]
        assert run_all("--name", name, "--dry-run").returncode == 0  # looking is allowed
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("blocked", ["directory", "lock"])
def test_a_run_that_cannot_be_written_is_one_line(tmp_path, blocked):
    run = tmp_path / "r"
    if blocked == "lock":
        (run / ".lock").mkdir(parents=True)
    else:
        run.write_text("")
    script = f"set -euo pipefail; RUN={run}; source {ROOT}/tools/pipeline.sh; lock_run; echo locked"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    reason = "Is a directory" if blocked == "lock" else "File exists"
    cure = "make it writable, or choose another --name"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {run}: cannot be written ({reason}): {cure}\n"


@pytest.mark.parametrize("kind", ["file", "dead link"])
def test_a_name_that_is_taken_by_something_else(tmp_path, kind):
    root = tmp_path / "r"
    root.write_text("mine") if kind == "file" else root.symlink_to(tmp_path / "nowhere")
    for use in (lambda: start(root), lambda: open_run(root)):
        with pytest.raises(UserError, match="r: is no directory: choose another --name"):
            use()
    assert root.is_symlink() or root.read_text() == "mine"

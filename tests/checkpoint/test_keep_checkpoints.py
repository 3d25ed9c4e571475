"""What a run keeps: older weights go, but not before the newest are whole, nor what a rollback, an evaluation or the
next iteration may need; the rest stays on record."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_papo.checkpoint.conversion_output import to_megatron
from megatron_papo.checkpoint.convert import open_checkpoint
from megatron_papo.checkpoint.hf_files import HFCheckpoint
from megatron_papo.checkpoint.keep import kept_checkpoints, kept_exports, tidy
from megatron_papo.checkpoint.model_files import model_fingerprint
from megatron_papo.checkpoint.torch_dist_files import TorchDistCheckpoint
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.run_config import write_run
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stage_output import require_input, verify_files
from tests.helpers import DEMO_CONFIG, run_module, settings
from tools.convert.geometry import config_tree

ROWS = {
    "tensors": {"a": {"source_xxh3_128": "1", "read_back_xxh3_128": "1"}},
    "version": 2,
    "passed": True,
    "conversion": "megatron_to_hf",
}
NO_ROLLBACK = "hacking_guard.rollback_iterations=0"


@pytest.fixture
def root(tmp_path):
    """A run with five finished iterations of its six; weights of 10 bytes."""
    for number in range(1, 6):
        add(tmp_path, number)
    return tmp_path


def run_of(root: Path, *overrides) -> RunDirectory:
    return RunDirectory(root, load_config(DEMO_CONFIG, overrides))


def add(root, number, counts=None):
    run = run_of(root)
    for directory, weights in ((run.trained(number), "__0_0.distcp"), (run.exported(number), "model.safetensors")):
        directory.mkdir(parents=True)
        (directory / weights).write_bytes(b"0123456789")
        (directory / "metrics.jsonl").write_text("{}\n")
        (directory / "config.json").write_text(json.dumps(config_tree("tiny")))
        stage = "stage5_train" if directory.name == "megatron" else "stage6_convert_to_hf"
        manifest = {
            "stage": stage,
            "fingerprint": str(number),
            "command": "again",
            "counts": counts or {},
            "files": {weights: {"bytes": 10, "sha256": "?"}},
        }
        (directory / "manifest.json").write_text(json.dumps(manifest))
    (run.exported(number) / "proof.json").write_text(json.dumps(ROWS))


def evaluate(root, accuracies):
    """Publish evaluations, by iteration."""
    for number, accuracy in accuracies.items():
        directory = run_of(root).evaluated(number, "evaluation")
        directory.mkdir(parents=True)
        (directory / "metrics.json").write_text(json.dumps({"accuracy": accuracy}))
        (directory / "manifest.json").write_text("{}")


def kept(root):
    return sorted(int(path.parts[-3]) for path in root.glob("iterations/*/megatron/*.distcp"))


def exports(root):
    return sorted(int(path.parts[-3]) for path in root.glob("iterations/*/hf/model.safetensors"))


def test_only_the_newest_are_kept_and_the_rest_stays_on_record(root, capsys):
    tidy(run_of(root, "keep_checkpoints=null"), 5)
    assert kept(root) == [1, 2, 3, 4, 5] and capsys.readouterr().out == ""  # all
    run = run_of(root, "keep_checkpoints=2")
    tidy(run, 5)
    assert kept(root) == [4, 5] and "0003/megatron: 0.00 GB deleted" in capsys.readouterr().out
    old = run.trained(2)
    assert (old / "metrics.jsonl").exists() and (run.exported(2) / "model.safetensors").exists()
    assert require_input(old, ("stage5_train",), "hint").fingerprint == "2"  # its stage still counts as done
    for use in (verify_files, TorchDistCheckpoint, open_checkpoint):
        with pytest.raises(UserError, match="its weights were deleted .*raise keep_checkpoints, or make it again"):
            use(old)
    tidy(run, 2)  # run again after a crash
    assert kept(root) == [4, 5]


def test_the_command_that_exports_deletes(root, tiny_hf):
    """Stage 6 of a run; the keys may be given to it alone."""
    run = run_of(root, "keep_checkpoints=1", "keep_exports=null", NO_ROLLBACK)
    write_run(run, [], "a test")
    to_megatron(tiny_hf, run.trained(6), {})

    def export(*overrides):
        return run_module("stages.stage6_convert_to_hf", "--run", root, "--iteration", 6, *settings(*overrides))

    (run.exported(5) / "proof.json").rename(root / "proof.json")  # of an older one: not asked for
    done = export("keep_checkpoints=null")
    assert done.returncode == 0, done.stderr
    assert kept(root)[:5] == [1, 2, 3, 4, 5] and exports(root) == [1, 2, 3, 4, 5, 6]
    done = export()
    assert done.returncode == 0 and "nothing to do" in done.stdout, done.stderr
    assert set(kept(root)) == {6} and "0005/megatron: 0.00 GB deleted" in done.stdout
    (run.exported(6) / "proof.json").unlink()
    done = export("keep_exports=1")
    assert done.returncode == 2 and "proof.json: missing" in done.stderr and "Traceback" not in done.stderr
    assert exports(root) == [1, 2, 3, 4, 5, 6]


SAVED = st.lists(st.integers(1, 30), unique=True)
NUMBERS = st.integers(1, 30)
KEEP = st.integers(1, 8)


@given(saved=SAVED, newest=NUMBERS, keep=KEEP, rollback=st.integers(0, 8), best=st.sets(NUMBERS, max_size=3))
def test_the_rules_of_checkpoints_said_naively(saved, newest, keep, rollback, best):
    """The run goes on from the last saved iteration up to `newest`. Iteration i + 1 starts from i and may go back to
    the last one saved up to i - rollback."""
    kept = kept_checkpoints(newest, saved, keep, rollback, best)
    start = max((number for number in saved if number <= newest), default=None)
    for number in saved:
        newer = [other for other in saved if number < other <= newest]
        is_target = start is not None and any(
            number == max((other for other in saved if other <= i - rollback), default=None)
            for i in range(start, start + rollback + 1)
        )
        rules = number > newest or len(newer) < keep or is_target or number in best
        assert (number in kept) == rules, number
    assert kept <= set(saved)


@given(saved=SAVED, newest=NUMBERS, keep=KEEP, best=st.sets(NUMBERS), needed=st.sets(NUMBERS))
def test_the_rules_of_exports_said_naively(saved, newest, keep, best, needed):
    kept = kept_exports(newest, saved, keep, best, needed)
    for number in saved:
        newer = [other for other in saved if number < other <= newest]
        assert (number in kept) == (number > newest or len(newer) < keep or number in best | needed), number
    assert kept <= set(saved)


ALL = {5, 10, 15, 20}


@pytest.mark.parametrize(
    "keep, rollback, expected",
    [
        (1, 0, {20}),
        (2, 0, {15, 20}),
        (1, 1, {15, 20}),
        (1, 5, {15, 20}),
        (1, 6, {10, 15, 20}),
        (1, 99, {5, 10, 15, 20}),
    ],
)
def test_checkpoints_of_every_fifth_iteration(keep, rollback, expected):
    """After iteration 22 of a resident run with checkpoint_every 5, by hand."""
    assert kept_checkpoints(22, [20, 5, 15, 10], keep, rollback) == expected


def test_null_keeps_all():
    assert kept_checkpoints(3, [1, 2, 3], None, 0) == {1, 2, 3} == kept_exports(3, [3, 2, 1], None)
    assert kept_checkpoints(3, [1, 2, 3], 1, 0) == {3} == kept_exports(3, [3, 2, 1], 1)  # control


def test_exports_are_pruned_and_stay_on_record(root, capsys):
    """5 is the newest, 2 the best, and 3 not yet evaluated."""
    cadence = ["evaluate_every=1", "keep_best=1"]
    run = run_of(root, "keep_exports=1", *cadence)
    evaluate(root, {1: 0.1, 2: 0.9, 4: 0.3, 5: 0.4})
    tidy(run, 5)
    assert exports(root) == [2, 3, 5] and kept(root) == [1, 2, 3, 4, 5]
    assert "keep_exports: " in capsys.readouterr().out
    gone = run.exported(4)
    assert (gone / "metrics.jsonl").exists() and (gone / "proof.json").exists()
    assert json.loads((gone / "pruned.json").read_text())["reason"] == "keep_exports: 1"
    assert require_input(gone, ("stage6_convert_to_hf",), "hint").fingerprint == "4"  # its stage still counts as done
    message = "0004/hf: its weights were deleted .*raise keep_exports, or make it again"
    for use in (verify_files, HFCheckpoint, model_fingerprint):
        with pytest.raises(UserError, match=message):
            use(gone)
    verify_files(run.exported(3), {"model.safetensors": "?"})  # control
    evaluate(root, {3: 0.2})
    tidy(run_of(root, "keep_exports=1", "evaluate_every=1"), 5)  # no longer held
    assert exports(root) == [5]
    tidy(run_of(root, "keep_exports=null", *cadence), 5)
    assert exports(root) == [5]


def test_the_export_that_samples_next_is_held(root):
    stale = ["rollout.max_staleness=1", "objective.importance_sampling_cap=2"]
    tidy(run_of(root, "keep_exports=1", *stale), 5)
    assert exports(root) == [4, 5]
    tidy(run_of(root, "keep_exports=1"), 5)  # control
    assert exports(root) == [5]


def test_no_export_goes_before_the_newest_is_complete(root):
    (run_of(root).exported(5) / "model.safetensors").write_bytes(b"0")
    with pytest.raises(UserError, match="0005/hf/model.safetensors: missing or of another size .* nothing is deleted"):
        tidy(run_of(root, "keep_exports=1"), 5)
    assert exports(root) == [1, 2, 3, 4, 5]


def test_what_was_stopped_in_the_middle_is_finished_and_does_not_count(root):
    """The note is there, some of the weights as well: not a checkpoint to keep."""
    run = run_of(root, "keep_checkpoints=2", NO_ROLLBACK)
    (run.trained(4) / "pruned.json").write_text('{"key": "keep_checkpoints"}')
    tidy(run, 5)
    assert kept(root) == [3, 5]


def test_the_best_are_held(root):
    """Of equals the later; the model before training is none of them."""
    evaluate(root, {0: 1.0, 1: 0.9, 2: 0.8, 3: 0.8, 4: 0.1, 5: 0.2})
    cadence = ["keep_checkpoints=1", NO_ROLLBACK, "evaluate_every=1"]
    tidy(run_of(root, *cadence, "keep_best=2"), 5)
    assert kept(root) == [1, 3, 5]
    tidy(run_of(root, *cadence), 5)  # control
    assert kept(root) == [5]


def test_checkpoints_without_optimizer_go_when_they_are_exported(root):
    """They lie between whole ones (checkpoint_every) and do not count as kept."""
    for number in (6, 7, 8):
        add(root, number, counts={"weights_alone": True})
    tidy(run_of(root, "keep_checkpoints=2", NO_ROLLBACK, "iterations=9"), 7)
    assert kept(root) == [4, 5, 7, 8]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda run: (run.exported(5) / "manifest.json").unlink(), "0005/hf: not complete: nothing is deleted"),
        (
            lambda run: (run.trained(5) / "__0_0.distcp").write_bytes(b"0"),
            "__0_0.distcp: missing or of another size",
        ),
        (lambda run: (run.exported(5) / "proof.json").unlink(), "proof.json: missing"),
    ],
)
def test_nothing_goes_before_the_newest_is_complete(root, spoil, message):
    run = run_of(root, "keep_checkpoints=1")
    spoil(run)
    with pytest.raises(UserError, match=message):
        tidy(run, 5)
    assert kept(root) == [1, 2, 3, 4, 5]

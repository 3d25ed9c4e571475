"""keep_checkpoints: older weights go, but not before the newest are whole, nor what a rollback may need; resume goes on
as before."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_papo.checkpoint.convert import open_checkpoint
from megatron_papo.checkpoint.hf_files import HFCheckpoint
from megatron_papo.checkpoint.keep import kept_checkpoints, kept_exports, tidy
from megatron_papo.checkpoint.model_files import model_fingerprint
from megatron_papo.checkpoint.torch_dist_files import TorchDistCheckpoint
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stage_output import require_input, verify_files
from megatron_papo.run.state import is_done_with, needed_exports, states
from tests.helpers import DEMO_CONFIG
from tools.convert.geometry import config_tree

ROWS = {
    "tensors": {"a": {"source_xxh3_128": "1", "read_back_xxh3_128": "1"}},
    "version": 2,
    "passed": True,
    "conversion": "megatron_to_hf",
}


@pytest.fixture
def iterations(tmp_path):
    """Five finished iterations; weights of 10 bytes."""
    for number in range(1, 6):
        add(tmp_path / "iterations", number)
    return tmp_path / "iterations"


def add(root, number, weights_alone=False):
    for name, weights in (("megatron", "__0_0.distcp"), ("hf", "model.safetensors")):
        directory = root / f"{number:04}" / name
        directory.mkdir(parents=True)
        (directory / weights).write_bytes(b"0123456789")
        (directory / "metrics.jsonl").write_text("{}\n")
        (directory / "config.json").write_text(json.dumps(config_tree("tiny")))
        stage = "stage5_train" if name == "megatron" else "stage6_convert_to_hf"
        manifest = {
            "stage": stage,
            "fingerprint": str(number),
            "command": "again",
            "counts": {"weights_alone": True} if name == "megatron" and weights_alone else {},
            "files": {weights: {"bytes": 10, "sha256": "?"}},
        }
        (directory / "manifest.json").write_text(json.dumps(manifest))
    (directory / "proof.json").write_text(json.dumps(ROWS))


def kept(root):
    return [int(path.name) for path in sorted(root.iterdir()) if list((path / "megatron").glob("*.distcp"))]


def call(iterations, newest, *overrides):
    """After iteration `newest` of a run of 100 without an evaluation in between, its guard going back nowhere."""
    settings = ["iterations=100", "hacking_guard.rollback_iterations=0", "keep_exports=null", *overrides]
    tidy(RunDirectory(iterations.parent, load_config(DEMO_CONFIG, settings)), newest)


def test_only_the_newest_are_kept_and_the_rest_stays_on_record(iterations, capsys):
    call(iterations, 5, "keep_checkpoints=null")
    assert kept(iterations) == [1, 2, 3, 4, 5]  # all
    call(iterations, 5, "keep_checkpoints=2")
    assert kept(iterations) == [4, 5] and "0003/megatron: 0.00 GB deleted" in capsys.readouterr().out
    old = iterations / "0002"
    assert (old / "megatron" / "metrics.jsonl").exists() and (old / "hf" / "model.safetensors").exists()
    assert require_input(old / "megatron", ("stage5_train",), "hint").fingerprint == "2"  # its stage counts as done
    for use in (verify_files, TorchDistCheckpoint, open_checkpoint):
        with pytest.raises(UserError, match="its weights were deleted .*raise keep_checkpoints, or make it again"):
            use(old / "megatron")
    call(iterations, 2, "keep_checkpoints=2")  # run again after a crash
    assert kept(iterations) == [4, 5]


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


def exports(root):
    return [int(path.parent.parent.name) for path in sorted(root.glob("*/hf/model.safetensors"))]


def evaluate(iterations, number, accuracy):
    directory = iterations.parent / "evaluation" / f"iteration_{number:04}" / "evaluation"
    directory.mkdir(parents=True)
    (directory / "metrics.json").write_text(json.dumps({"accuracy": accuracy}))
    (directory / "manifest.json").write_text('{"stage": "stage7_evaluate", "fingerprint": "7", "files": {}}')


EXPORTS = ("keep_checkpoints=null", "evaluate_every=1", "keep_exports=1")


def test_exports_are_pruned_and_stay_on_record(iterations, capsys):
    """Not the best, nor those that wait for their evaluation."""
    for number, accuracy in ((1, 0.1), (2, 0.9), (4, 0.3), (5, 0.2)):
        evaluate(iterations, number, accuracy)
    call(iterations, 5, *EXPORTS, "keep_best=1")
    assert exports(iterations) == [2, 3, 5] and kept(iterations) == [1, 2, 3, 4, 5]
    assert "keep_exports: " in capsys.readouterr().out
    gone = iterations / "0004" / "hf"
    assert (gone / "metrics.jsonl").exists() and (gone / "proof.json").exists()
    assert json.loads((gone / "pruned.json").read_text())["reason"] == "keep_exports: 1"
    assert require_input(gone, ("stage6_convert_to_hf",), "hint").fingerprint == "4"  # its stage counts as done
    message = "0004/hf: its weights were deleted .*raise keep_exports, or make it again"
    for use in (verify_files, HFCheckpoint, model_fingerprint):
        with pytest.raises(UserError, match=message):
            use(gone)
    verify_files(iterations / "0003" / "hf", {"model.safetensors": "?"})  # control
    evaluate(iterations, 3, 0.2)
    call(iterations, 5, *EXPORTS)  # nothing holds them any more
    assert exports(iterations) == [5]
    call(iterations, 5, *EXPORTS, "keep_exports=null")
    assert exports(iterations) == [5]


def test_no_export_goes_before_the_newest_is_complete(iterations):
    (iterations / "0005/hf/model.safetensors").write_bytes(b"0")
    with pytest.raises(UserError, match="0005/hf/model.safetensors: missing or of another size .* nothing is deleted"):
        call(iterations, 5, "keep_exports=1", "keep_checkpoints=null")
    assert exports(iterations) == [1, 2, 3, 4, 5]


def test_what_was_stopped_in_the_middle_is_finished_and_does_not_count(iterations):
    """The note is there, some of the weights as well: not a checkpoint to keep."""
    (iterations / "0004/megatron/pruned.json").write_text('{"key": "keep_checkpoints"}')
    call(iterations, 5, "keep_checkpoints=2")
    assert kept(iterations) == [3, 5]


def test_the_best_are_held(iterations):
    for number, accuracy in ((1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3), (5, 0.2)):
        evaluate(iterations, number, accuracy)
    call(iterations, 5, "keep_checkpoints=1", "evaluate_every=1", "keep_best=1")
    assert kept(iterations) == [1, 5]


def test_weights_without_an_optimizer_go_once_they_are_exported(tmp_path):
    """checkpoint_every 2: they do not count among the kept, and the newest stays until the next is there."""
    for number in range(1, 6):
        add(tmp_path / "iterations", number, weights_alone=number % 2 == 1)
    call(tmp_path / "iterations", 5, "keep_checkpoints=1", "checkpoint_every=2", "hacking_guard.action=warn")
    assert kept(tmp_path / "iterations") == [4, 5]


def test_exports_in_memory_go_once_nothing_samples_from_them(tmp_path):
    """checkpoint_every 3, evaluate_every 4: of iterations 1 to 5 the third and the fourth are exported to the disk."""
    settings = ["iterations=6", "checkpoint_every=3", "evaluate_every=4", "hacking_guard.action=warn"]
    elsewhere = [*settings, f"export_directory={tmp_path / 'memory'}"]
    run = RunDirectory(tmp_path / "run", load_config(DEMO_CONFIG, elsewhere))
    other = RunDirectory(tmp_path / "other" / "run", run.config)
    assert [number for number in range(1, 7) if run.in_memory(number)] == [1, 2, 5]
    assert run.exported(5).is_relative_to(tmp_path / "memory") and run.holds(run.exported(5))
    assert run.exported(4) == tmp_path / "run/iterations/0004/hf" and other.exported(5) != run.exported(5)
    (tmp_path / "link").symlink_to(tmp_path)
    assert RunDirectory(tmp_path / "link" / "run", run.config).memory == run.memory
    assert RunDirectory(run.root, load_config(DEMO_CONFIG, settings)).exported(5) == run.iterations / "0005/hf"

    for number in range(1, 6):
        add(run.iterations, number)
        rollouts = run.rollouts(number)
        rollouts.mkdir()
        (rollouts / "manifest.json").write_text('{"stage": "stage4_rollout", "fingerprint": "4", "files": {}}')
        if number in (1, 2, 5):
            place = run.memory / f"{number:04}"
            place.mkdir(parents=True)
            (run.iterations / f"{number:04}" / "hf").rename(place / "hf")
            (run.trained(number) / "pruned.json").write_text('{"key": "checkpoint_every"}')
    assert needed_exports(run) == {4, 5, 6}  # to be evaluated; to be sampled from; the last
    assert [number for number in range(1, 7) if is_done_with(run, number)] == [1, 2]
    left = [run.weights_to_export(4), run.weights_to_export(5).with_name("weights.partial")]  # killed while exporting
    for place in left:
        place.mkdir()
    tidy(run, 5)
    assert [path.name for path in run.memory.iterdir()] == ["0005"] and not any(place.exists() for place in left)
    shutil.rmtree(run.exported(5))  # the machine was switched off
    word = {state.turn.iteration: state.word for state in states(run) if state.stage.number == 6}
    assert word[1] == word[2] == "done" and word[5] == word[6] == "missing"
    shutil.rmtree(run.iterations / "0003/hf")
    assert {state.turn.iteration: state.word for state in states(run) if state.stage.number == 6}[3] == "missing"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: (root / "0005/hf/manifest.json").unlink(), "0005/hf: not complete: nothing is deleted"),
        (
            lambda root: (root / "0005/megatron/__0_0.distcp").write_bytes(b"0"),
            "__0_0.distcp: missing or of another size",
        ),
        (lambda root: (root / "0005/hf/proof.json").unlink(), "proof.json: missing"),
    ],
)
def test_nothing_goes_before_the_newest_is_complete(iterations, spoil, message):
    spoil(iterations)
    with pytest.raises(UserError, match=message):
        call(iterations, 5, "keep_checkpoints=1")
    assert kept(iterations) == [1, 2, 3, 4, 5]

"""keep_checkpoints: older weights go, but not before the newest are whole, nor what a rollback may need; resume goes on
as before."""

import json

import pytest

from megatron_papo.checkpoint.keep import oldest_kept
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.stage_output import require_input, verify_files
from tests.helpers import DEMO_CONFIG, run_module

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
        add(tmp_path, number)
    return tmp_path


def add(root, number):
    for name, weights in (("megatron", "__0_0.distcp"), ("hf", "model.safetensors")):
        directory = root / f"{number:04}" / name
        directory.mkdir(parents=True)
        (directory / weights).write_bytes(b"0123456789")
        (directory / "metrics.jsonl").write_text("{}\n")
        stage = "stage5_train" if name == "megatron" else "stage6_convert_to_hf"
        manifest = {
            "stage": stage,
            "fingerprint": str(number),
            "command": "again",
            "files": {weights: {"bytes": 10, "sha256": "?"}},
        }
        (directory / "manifest.json").write_text(json.dumps(manifest))
    (directory / "proof.json").write_text(json.dumps(ROWS))


def kept(root):
    return [int(path.name) for path in sorted(root.iterdir()) if list((path / "megatron").glob("*.distcp"))]


def call(root, newest, *overrides):
    arguments = [part for override in overrides for part in ("--set", override)]
    return run_module(
        "tools.keep_checkpoints", "--config", DEMO_CONFIG, *arguments, "--iterations", root, "--newest", newest
    )


def test_only_the_newest_are_kept_and_the_rest_stays_on_record(iterations):
    assert call(iterations, 5).returncode == 0 and kept(iterations) == [1, 2, 3, 4, 5]  # null: all
    done = call(iterations, 5, "keep_checkpoints=2")
    assert done.returncode == 0, done.stderr
    assert kept(iterations) == [4, 5] and "0003/megatron: 0.00 GB deleted" in done.stdout
    old = iterations / "0002"
    assert (old / "megatron" / "metrics.jsonl").exists() and (old / "hf" / "model.safetensors").exists()
    assert require_input(old / "megatron", ("stage5_train",), "hint") == "2"  # its stage still counts as done
    with pytest.raises(UserError, match="its weights were deleted .*raise keep_checkpoints, or make it again"):
        verify_files(old / "megatron")
    assert call(iterations, 2, "keep_checkpoints=2").returncode == 0 and kept(iterations) == [
        4,
        5,
    ]  # run again after a crash


@pytest.mark.parametrize(
    "keep, rollback, newest, oldest",
    [(1, 0, 5, 5), (2, 0, 5, 4), (1, 2, 5, 3), (4, 2, 5, 2), (3, 0, 2, 0)],
)
def test_what_a_rollback_needs_is_kept(keep, rollback, newest, oldest):
    """The next iteration may go back to `newest` - rollback (run_all.sh: CHECKPOINTS[i - ROLLBACK_ITERATIONS])."""
    config = load_config(DEMO_CONFIG, [f"keep_checkpoints={keep}", f"hacking_guard.rollback_iterations={rollback}"])
    assert oldest_kept(config, newest) == oldest
    assert oldest <= newest - rollback


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
    done = call(iterations, 5, "keep_checkpoints=1")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert kept(iterations) == [1, 2, 3, 4, 5]

"""tools.plot.guard on the metrics of a run that was rolled back once."""

import json

import pytest

from tests.helpers import run_module
from tools.plot.guard import PANELS, read_run, values_of


def row(step, attempt=0, **changes):
    return {"step": step, "attempt": attempt, **dict.fromkeys(PANELS, 0.1 + 0.01 * step), **changes}


@pytest.fixture
def run_dir(tmp_path):
    """Two iterations of two steps; the guard undid the first of the second iteration."""
    decision = {
        "step": 3,
        "action": "rollback_and_lower_gamma",
        "signs": ["level"],
        "ratios": {"level": 2.5, "variance": 1.0},
        "kl_prcp_scale": 0.1,
    }
    rows = {1: [row(1, accuracy=0.25), row(2, accuracy=0.75)], 2: [row(3), row(3, attempt=1), row(4, attempt=1)]}
    for iteration, decisions in ((1, []), (2, [decision])):
        directory = tmp_path / "named" / "iterations" / f"{iteration:04d}" / "megatron"
        directory.mkdir(parents=True)
        for name, lines in (("metrics.jsonl", rows[iteration]), ("guard.jsonl", decisions)):
            (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "named"


def test_steps_that_were_undone_do_not_count(run_dir):
    read = read_run(run_dir)
    assert [[line["step"] for line in rows] for rows in read.counted] == [[1, 2], [3, 4]]
    assert [[(line["step"], line["attempt"]) for line in rows] for rows in read.undone] == [[], [(3, 0)]]
    assert values_of("accuracy", read.counted)[:2] == [0.5, 0.5]
    assert values_of("kl_prcp_coef", read.counted) == pytest.approx([0.11, 0.12, 0.13, 0.14])
    assert values_of("entropy", read.counted) == pytest.approx([0.11, 0.1125, 0.116875, 0.12265625])


def test_a_run_is_all_it_needs(run_dir, tmp_path):
    result = run_module("tools.plot.guard", "--run", run_dir)
    assert result.returncode == 0, result.stderr
    decision = "named: step 3: rollback_and_lower_gamma: level x 2.5; gamma x 0.1 from then on"
    assert result.stdout.splitlines() == [decision, str(run_dir / "guard.png")]
    assert (run_dir / "guard.png").read_bytes().startswith(b"\x89PNG")
    both = run_module("tools.plot.guard", "--run", f"a b={run_dir}", "--run", run_dir, "--output", tmp_path / "two.png")
    assert both.returncode == 0 and both.stdout.startswith("a b: step 3") and "\nnamed: step 3" in both.stdout
    assert (tmp_path / "two.png").read_bytes() != (run_dir / "guard.png").read_bytes()


@pytest.mark.parametrize(
    "runs, message",
    [
        (["nowhere"], "--run nowhere: no such directory"),
        (["label=nowhere"], "--run label=nowhere: no such directory"),
        (["."], "holds no iterations/"),
        (["named", "named"], "two runs have the same label"),
    ],
)
def test_wrong_runs(run_dir, runs, message):
    paths = [run_dir.parent / name if "nowhere" not in name else name for name in runs]
    result = run_module("tools.plot.guard", *(part for path in paths for part in ("--run", path)))
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1

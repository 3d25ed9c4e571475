"""Numbers on the pages come from docs/numbers/, tables of stages from run/stages.py; a page that says something else is
noticed."""

import json

import pytest

from megatron_papo.run.stages import STAGES
from tests.helpers import run_module

DEMO = {"accuracy_papo": 0.855, "accuracy_cold_start": 0.25, "seconds_per_iteration": 34.56, "alarms": 3}


@pytest.fixture
def pages(tmp_path):
    """A README and one page with a value of demo.json each."""
    (tmp_path / "docs" / "numbers").mkdir(parents=True)
    (tmp_path / "docs" / "numbers" / "demo.json").write_text(json.dumps(DEMO))
    (tmp_path / "README.md").write_text("It is <!-- numbers: demo.accuracy_papo percent --><!-- end --> right.\n")
    (tmp_path / "docs" / "demo.md").write_text(
        "After <!-- numbers: demo.seconds_per_iteration seconds --><!-- end -->\n"
    )
    return tmp_path


def publish(root, *arguments):
    return run_module("tools.publish_numbers", "--root", root, *arguments)


def test_the_repository_is_up_to_date():
    done = run_module("tools.publish_numbers", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_values_are_written_and_compared(pages):
    before = publish(pages, "--check")
    assert before.returncode == 1 and before.stdout.count("out of date") == 2
    assert "right" in (pages / "README.md").read_text() and "85.5" not in (pages / "README.md").read_text()
    assert publish(pages).returncode == 0
    assert "-->85.5 %<!-- end --> right" in (pages / "README.md").read_text()
    assert "-->34.6 s<!-- end -->" in (pages / "docs" / "demo.md").read_text()
    assert publish(pages, "--check").returncode == 0
    (pages / "docs" / "numbers" / "demo.json").write_text(json.dumps(DEMO | {"accuracy_papo": 0.851}))
    after = publish(pages, "--check")
    assert after.returncode == 1 and "README.md: out of date" in after.stdout and "demo.md" not in after.stdout


def test_tables_show_every_seed(pages):
    masked = {"accuracy_cold_start_masked": 0.1, "accuracy_papo_masked": 0.2}
    for seed, accuracy in ((1, 0.5), (2, 0.625), (3, 0.75)):
        row = DEMO | masked | {"accuracy_papo": accuracy}
        (pages / "docs" / "numbers" / f"demo_seed{seed}.json").write_text(json.dumps(row))
        row["accuracy_papo"] -= 0.125
        (pages / "docs" / "numbers" / f"demo_default_seed{seed}.json").write_text(json.dumps(row))
    blocks = [f"<!-- numbers: {name} -->\n<!-- end -->\n" for name in ("demo_seeds", "demo_machines", "demo_range")]
    (pages / "docs" / "demo.md").write_text("\n".join(blocks))
    assert publish(pages).returncode == 0
    written = (pages / "docs" / "demo.md").read_text()
    assert "| 1 | 25.0 % | 50.0 % | +25.0 | 10.0 % | 20.0 % |\n" in written
    assert "| 3 | 25.0 % | 75.0 % | +50.0 |" in written
    assert "| AVX2 | 50.0 % (+25.0) | 62.5 % (+37.5) | 75.0 % (+50.0) |\n" in written
    assert "CAPABILITY=default`) | 37.5 % (+12.5) |" in written
    assert "add 12 to 50 points: the range of 6 runs" in written


def test_tables_of_stages(pages):
    """They say what the table of stages says: makers, outputs of a run, deciding keys; an edit by hand is noticed."""
    page = pages / "docs" / "pipeline.md"
    blocks = [f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("stages", "stages_in_a_run", "stage_keys")]
    page.write_text("\n".join(blocks))
    assert publish(pages).returncode == 0
    written = page.read_text()
    for stage in STAGES.values():
        assert written.count(f"| {stage.number} `{stage.name}` | ") == 2 and f"- `{stage.name}`: " in written
        assert f"| {stage.title} | " in written and f" | {stage.writes} |" in written
    assert "| `data` (1), `hf` (1, 2, 6 or yours), `previous` (4) | `iterations/NNNN/rollouts` |" in written
    assert "| `data` and `evaluation/sets/SET` |" in written and "| `evaluation/iteration_NNNN/SET` |" in written
    wrapped = (
        "- `stage2_sft`: seed, sft, model.{dtype, recompute}, data.{min_pixels, max_pixels, resize,\n  transparency}\n"
    )
    assert wrapped in written
    assert "- `stage3_convert_to_megatron`: none: its input alone\n" in written
    assert publish(pages, "--check").returncode == 0
    page.write_text(written.replace("`rollouts` (4)", "`rollouts` (3)", 1))
    assert "pipeline.md: out of date" in publish(pages, "--check").stdout


@pytest.mark.parametrize(
    "text, message",
    [
        ("a <!-- numbers: demo.accuracy percent --><!-- end -->", "demo.accuracy percent: KeyError 'accuracy'"),
        ("a <!-- numbers: other.alarms number --><!-- end -->", "KeyError 'other'"),
        ("a <!-- numbers: demo.alarms dozen --><!-- end -->", "KeyError 'dozen'"),
        ("a <!-- numbers: demo_sedes --><!-- end -->", "expected one of demo_seeds"),
        ("a <!-- numbers: demo.alarms number --> 3", "1 blocks are opened, 0 end"),
        ("<!-- table: stages -->\n", "1 blocks are opened, 0 end"),
        (
            "<!-- table: stagse -->\n<!-- end -->\n",
            "table: stagse: expected one of stages, stages_in_a_run, stage_keys",
        ),
        ("  <!-- numbers: demo.alarms number --><!-- end -->", "begins a line"),
    ],
)
def test_blocks_that_cannot_be_filled(pages, text, message):
    (pages / "README.md").write_text(text)
    done = publish(pages)
    assert done.returncode == 2 and f"{pages / 'README.md'}: " in done.stderr and message in done.stderr
    assert (pages / "README.md").read_text() == text


def test_a_run_is_taken(pages):
    """The means of the steps that count: the undone attempt at step 1 does not."""
    run = pages / "run"
    stage = run / "iterations" / "0001" / "megatron"
    stage.mkdir(parents=True)
    names = ("accuracy", "kl_prcp", "kl_ref", "entropy", "clip_fraction_high", "cut_off")
    steps = [(1, 9.0), (1, 0.25), (2, 0.75)]
    lines = [json.dumps({"step": step} | dict.fromkeys(names, value)) for step, value in steps]
    (stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (stage / "guard.jsonl").write_text(json.dumps({"step": 1, "action": "rollback"}) + "\n")
    unfinished = publish(pages, "--take", f"taken={run}")
    assert unfinished.returncode == 2 and "summary.json: not there" in unfinished.stderr
    (run / "summary.json").write_text(json.dumps(DEMO | {"paths": {"log": "log.txt"}}))
    assert publish(pages, "--take", f"taken={run}").returncode == 0
    taken = json.loads((pages / "docs" / "numbers" / "taken.json").read_text())
    assert taken == DEMO | {"training": [dict.fromkeys(names, 0.5)], "alarms": 1, "alarm_steps": [1]}


def test_taking_needs_a_name_and_no_check(pages):
    assert "expected NAME=RUN" in publish(pages, "--take", "runs/demo").stderr
    assert publish(pages, "--check", "--take", "a=b").returncode == 2

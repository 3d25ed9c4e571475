"""What run_all.sh is told before it runs anything."""

import pytest

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stages import all_turns
from megatron_papo.run.state import State
from tests.helpers import DEMO_CONFIG, ROOT
from tools.start_run import disk_note, key_of, parse, summary_of_done


def states_of(run, is_done):
    return [
        State(stage, turn, stage.output(run, turn), "done" if is_done(stage, turn) else "missing", seconds=60.0)
        for stage, turn in all_turns(run)
    ]


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path, load_config(DEMO_CONFIG, ["iterations=3"]))


@pytest.mark.parametrize(
    "is_done, words",
    [
        (lambda stage, turn: False, None),
        (lambda stage, turn: stage.number < 4, "4 of 15 outputs are there (4 minutes of work): skipped"),
        (lambda stage, turn: turn.iteration != 3, "iterations 1 to 2 complete: skipped"),
        (
            lambda stage, turn: (stage.number, turn.iteration) != (4, 1),
            "14 of 15 outputs are there (14 minutes of work): skipped",
        ),
        (
            lambda stage, turn: True,
            "15 of 15 outputs are there (15 minutes of work), iterations 1 to 3 complete: nothing to do",
        ),
    ],
)
def test_one_line_says_what_is_skipped(run, is_done, words):
    rows = states_of(run, is_done)
    todo = [key_of(row) for row in rows if row.word != "done"]
    said = summary_of_done(rows, todo)
    assert said is None if words is None else said.endswith(words)


def test_the_name_is_that_of_the_configuration_unless_it_is_given():
    assert parse([]).name == "demo"
    assert parse(["--config", "configs/papo_g_3b.yaml"]).name == "papo_g_3b"
    assert parse(["--config", "configs/papo_g_3b.yaml", "--name", "x.1"]).name == "x.1"


def test_a_configuration_in_a_home_that_there_is_not():
    with pytest.raises(UserError, match="^--config ~nobody_here/c.yaml: ~nobody_here: no such home directory"):
        parse(["--config", "~nobody_here/c.yaml"])


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "a b", "é", "a\nb"])
def test_names_that_are_no_directory_of_ours(name):
    with pytest.raises(UserError, match="--name"):
        parse(["--name", name])


def test_disk_is_counted_for_a_model_of_true_size(run, tmp_path):
    assert disk_note(run) is None  # the tiny model
    model = tmp_path / "model"
    model.mkdir()
    with open(model / "model.safetensors", "wb") as stream:
        stream.truncate(7_500_000_000)  # 3.75 G parameters; a sparse file
    preset = load_config(ROOT / "configs" / "papo_g_3b.yaml", [f"model.path={model}"])
    assert "take at most 270 GB at once" in disk_note(RunDirectory(tmp_path, preset))

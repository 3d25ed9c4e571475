"""A set that keep_best chose a checkpoint by is known again: by its content, in its run and outside."""

import pytest

from megatron_papo.config_files import load_config
from megatron_papo.evaluation.chosen_on import is_chosen_on
from megatron_papo.run.command_line import Task
from megatron_papo.run.records import Prompt, write_jsonl
from megatron_papo.run.run_config import write_run
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stages import STAGES, Turn
from tests.helpers import DEMO_CONFIG

INSTRUCTION = " Think."
STAGE = STAGES["stage7_evaluate"]


def prompts(numbers, text="<image>How many of {}?"):
    return [
        Prompt(id=f"{n}", problem=text.format(n), answer=f"{n}", token_ids=[1], num_tokens=1, images=[])
        for n in numbers
    ]


@pytest.fixture
def make_run(tmp_path):
    """Makes a run with a validation set of ten questions."""

    def make(name, *changes):
        config = load_config(DEMO_CONFIG, [f"data.prompt_template='{{problem}}{INSTRUCTION}'", *changes])
        run = RunDirectory(tmp_path / name, config)
        write_run(run, [], "test")
        place = run.evaluation_data("evaluation")
        place.mkdir(parents=True)
        write_jsonl(place / "prompts.jsonl", prompts(range(10)))
        return run

    return make


def outside(tmp_path, hf):
    """The task of an evaluation without a run's keep_best, of a checkpoint somewhere."""
    config = load_config(DEMO_CONFIG, [f"model.path='{hf}'", "sft=null", "data.sft=null", "data.train.count=1"])
    return Task.in_run(RunDirectory(tmp_path / "outside", config), STAGE, Turn(0, "evaluation"))


def test_in_its_run(make_run):
    best = make_run("best", "keep_best=1", "evaluate_every=1", "evaluation.benchmarks.other.source=x.jsonl")
    task = Task.in_run(best, STAGE, Turn(1, "evaluation"))
    assert is_chosen_on(task, "evaluation", prompts(range(10)))
    assert is_chosen_on(task, "other", prompts(range(10)))  # the same under another name
    assert not is_chosen_on(task, "other", prompts(range(10, 20)))
    assert not is_chosen_on(Task.in_run(best, STAGE, Turn(0, "evaluation")), "evaluation", prompts(range(10)))
    plain = make_run("plain")
    assert not is_chosen_on(Task.in_run(plain, STAGE, Turn(1, "evaluation")), "evaluation", prompts(range(10)))


def test_of_an_export_evaluated_without_its_run(make_run, tmp_path):
    best = make_run("best", "keep_best=1", "evaluate_every=1")
    best.exported(1).mkdir(parents=True)
    task = outside(tmp_path, best.exported(1))
    released = prompts(range(10), "<image> how many  of {}?" + INSTRUCTION)  # as another release writes them
    assert is_chosen_on(task, "mmk12", released)
    assert is_chosen_on(task, "mmk12", [*released, *prompts(range(20, 30))])  # half of it
    assert not is_chosen_on(task, "mmk12", [*released, *prompts(range(20, 31))])
    assert not is_chosen_on(task, "mmk12", prompts(range(10), "<image>What colour is {}?"))
    plain = make_run("plain")
    plain.exported(1).mkdir(parents=True)
    assert not is_chosen_on(outside(tmp_path, plain.exported(1)), "mmk12", released)
    (tmp_path / "hf").mkdir()
    assert not is_chosen_on(outside(tmp_path, tmp_path / "hf"), "mmk12", released)

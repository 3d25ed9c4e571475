"""Whether a checkpoint was chosen by the set that it is evaluated on: its accuracy there is no measure then."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_papo.data.problems import normalised
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import Task
from megatron_papo.run.records import Prompt, read_jsonl
from megatron_papo.run.run_config import CONFIG, open_run
from megatron_papo.run.run_directory import RunDirectory

SAME_SET = 0.5
"""Share of a set's prompts that another must hold to be the same set under another name, or another release of it."""


def is_chosen_on(task: Task, name: str, prompts: Sequence[Prompt]) -> bool:
    """Say whether keep_best of the run that made a checkpoint chooses by this set, whatever it is called there.

    Args:
        task: Turn of stage 7.
        name: Of the evaluation set.
        prompts: Of the set.
    """
    run = task.run if task.run is not None and task.whole_config.keep_best else run_of_export(task.path("hf"))
    if run is None or not run.config.keep_best:
        return False
    validation = run.config.evaluation.validation
    if run is task.run and task.turn.iteration == 0:
        return False  # nothing was chosen yet
    if run is task.run and validation == name:
        return True
    try:
        by = read_jsonl(run.evaluation_data(validation) / "prompts.jsonl", Prompt)
    except UserError:  # not there any more: nobody can tell
        return False
    instruction = run.config.data.prompt_template.partition("{problem}")[2].format()
    asked = questions(prompts, instruction)
    return len(asked & questions(by, instruction)) >= SAME_SET * len(asked)


def run_of_export(hf: Path) -> RunDirectory | None:
    """Return the run whose export a checkpoint is; None where it is none, or of a run that cannot be read."""
    whole = hf.resolve()
    if whole.name != "hf" or len(whole.parents) < 3 or not (whole.parents[2] / CONFIG).is_file():
        return None
    try:
        return open_run(whole.parents[2])
    except UserError:
        return None


def questions(prompts: Iterable[Prompt], instruction: str) -> set[tuple[str, str]]:
    """Return problems and answers. instruction: left out where a problem ends with it."""
    ending = instruction.strip()
    return {(normalised(prompt.problem.rstrip().removesuffix(ending)), prompt.answer.strip()) for prompt in prompts}

"""Interim checkpoints: what training saves when it is asked to end between two optimizer steps, and goes on from.

    OUTPUT.interim/   weights, optimizer and state after some steps of the iteration that makes OUTPUT, metrics.jsonl
                      and guard.jsonl so far, place.json (class Place), and constants_RANK.safetensors: what the loss
                      needs from the sweeps that came before the first step

Where OUTPUT itself is published with weights alone (checkpoint_every), OUTPUT.interim is the same checkpoint whole. An
interim checkpoint is told apart like OUTPUT itself, by what it is made from, and is deleted once nothing goes on from
it (checkpoint/keep.py).
"""

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from megatron_papo.distributed import collectives, process_groups
from megatron_papo.reading import read_record, reading
from megatron_papo.run.command_line import Task
from megatron_papo.run.end_request import EndRequest
from megatron_papo.run.manifest import Entry
from megatron_papo.run.stage_output import Input, interim_of, partial_of, verify_files
from megatron_papo.training.forward_step import PerRollout
from megatron_papo.training.metrics_log import DECISIONS, METRICS
from megatron_papo.training.policy import Policy

PLACE = "place.json"
AGAIN = "remove {}: the iteration is then trained from its start"


class Place(Entry):
    """place.json: where between the steps of an iteration a checkpoint lies."""

    steps: int = 0
    """Optimizer steps that are done, of this attempt."""
    attempt: int = 1
    """Rises when the guard has gone back."""
    checks: dict[str, float] = {}
    """What the sweeps said about the rollouts: goes into every line of metrics.jsonl."""


@dataclass
class Progress:
    """How far an iteration is, beside what the policy holds."""

    constants: list[PerRollout]
    """Of the loss, for this rank's rollouts of each step: from the sweeps before the first step."""
    place: Place


class Interim:
    """The interim checkpoint of one output of stage 5. All ranks make one and call the methods together."""

    def __init__(self, task: Task, inputs: dict[str, Input]):
        """Raises UserError where the place holds something that was made from something else.

        Args:
            task: The turn whose output it belongs to.
            inputs: Of that output; they are verified by the output itself.
        """
        verified = {name: replace(made_from, verify=False) for name, made_from in inputs.items()}
        self._output = replace(task, output=interim_of(task.output)).stage_output(verified)
        self.directory = self._output.output
        self.request, self._log = EndRequest(task.run), partial_of(task.output)

    def is_asked_for(self) -> bool:
        """Say on all ranks alike whether somebody wants training to end. Collective."""
        return self.request.is_agreed()

    @property
    def is_between_steps(self) -> bool:
        """Whether there was one to go on from, in the middle of the iteration, when this was made."""
        return self._output.done and (self.directory / PLACE).exists()

    @property
    def is_whole(self) -> bool:
        """Whether there was one of the whole iteration, whose output holds weights alone, when this was made."""
        return self._output.done and not (self.directory / PLACE).exists()

    def save(self, policy: Policy, progress: Progress | None) -> None:
        """Write it, in place of an earlier one.

        Args:
            policy: Its weights, optimizer and state.
            progress: Of the iteration; None: it is done, and its output published.
        """
        out, is_main = self._output, process_groups.is_main_rank()
        if is_main:
            shutil.rmtree(self.directory, ignore_errors=True)
        with out if is_main else nullcontext():
            collectives.barrier()  # out.partial is there
            out.hashes |= policy.save(out.partial, self.directory)
            if progress is not None:
                _save_constants(out.partial, progress.constants)
                if collectives.is_reporting_rank():  # which writes the log, and knows the checks
                    (out.partial / PLACE).write_text(progress.place.model_dump_json())
                    _copy_log(self._log, out.partial)
            collectives.barrier()  # every rank has written

    def load_whole(self, policy: Policy) -> None:
        """Bring the policy to the end of the iteration."""
        if process_groups.is_main_rank():
            verify_files(self.directory)
        collectives.barrier()
        policy.load(self.directory)

    def load(self, policy: Policy) -> Progress:
        """Bring the policy to where the iteration ended early, and its log to where it goes on; return how far it
        was."""
        self.load_whole(policy)
        if collectives.is_reporting_rank():
            _copy_log(self.directory, self._log)
        place = read_record(self.directory / PLACE, Place, AGAIN.format(self.directory))
        return Progress(_load_constants(self.directory), place)


def _copy_log(source: Path, target: Path) -> None:
    for name in (METRICS, DECISIONS):
        shutil.copyfile(source / name, target / name)


def _constants_file(directory: Path) -> Path:
    return directory / f"constants_{process_groups.rank()}.safetensors"


def _save_constants(directory: Path, constants: list[PerRollout]) -> None:
    """Each row of each constant of each step, and how many there are: none before the last pipeline stage, under the
    same names."""
    tensors = {
        f"{name}.{step}.{row}": values.detach().cpu().clone()
        for step, of_step in enumerate(constants)
        for name, rows in of_step.items()
        for row, values in enumerate(rows)
    }
    numbers = [{name: len(rows) for name, rows in of_step.items()} for of_step in constants]
    save_file(tensors, _constants_file(directory), metadata={"rows": json.dumps(numbers)})


def _load_constants(directory: Path) -> list[PerRollout]:
    """Return the constants of this rank's rollouts, step by step."""
    file, device = _constants_file(directory), process_groups.device()
    with reading(file, AGAIN.format(directory)), safe_open(file, "pt") as stored:
        return [
            {
                name: [stored.get_tensor(f"{name}.{step}.{row}").to(device) for row in range(number)]
                for name, number in numbers.items()
            }
            for step, numbers in enumerate(json.loads(stored.metadata()["rows"]))
        ]

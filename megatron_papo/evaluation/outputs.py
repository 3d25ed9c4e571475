"""What stage 7 has left, read again: the evaluations of a run, or of a checkpoint without one.

    runs/papo                               the last iteration that was evaluated
    runs/papo@0                             before training
    runs/papo/evaluation/iteration_0020     the same by its path; or a single set of it

A text with @N is one of these only where there is no directory of that name.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from megatron_papo.errors import UserError
from megatron_papo.evaluation.protocol import SAMPLING
from megatron_papo.evaluation.scores import SetAnswers, answer_of, collect_answers
from megatron_papo.reading import read_record, reading, shown
from megatron_papo.run.records import ImageShown, Prediction, Protocol, stream_jsonl
from megatron_papo.run.stage_output import partial_of, verify_files

AS_SAMPLED = ("dtype", *SAMPLING)
"""Settings in which all sets of an evaluation agree."""
PREDICTIONS, PROTOCOL = "predictions.jsonl", "protocol.json"
AGAIN = "evaluate again with stages.stage7_evaluate or tools.evaluate"
UNFINISHED = partial_of(Path("set")).suffix


@dataclass(frozen=True)
class EvaluatedSet:
    """The output of stage 7 for one set."""

    directory: Path
    protocol: Protocol
    answers: dict[ImageShown, SetAnswers]
    """By what was shown of the pictures."""


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint on the sets of a suite."""

    name: str
    """Of the run, with @N where an iteration was asked for."""
    directory: Path
    sets: dict[str, EvaluatedSet]

    @property
    def checkpoint(self) -> str:
        """The fingerprint of the checkpoint that answered all sets."""
        return next(iter(self.sets.values())).protocol.checkpoint


def read_evaluation(text: str, iteration: int | None = None, only: Collection[str] | None = None) -> Evaluation:
    """Return the evaluation that a user names as above.

    Raises UserError, also where its sets were not all answered by one checkpoint.

    Args:
        text: as a user types it.
        iteration: of a run whose name has no @N; None: the last one that was evaluated.
        only: names of the sets to read; None: all.
    """
    path, number, directories = evaluated_directories(text, iteration)
    sets: dict[str, EvaluatedSet] = {}
    protocols = {place: read_protocol(place) for place in directories}
    wanted = [place for place, protocol in protocols.items() if only is None or protocol.set in only]
    if not wanted:
        there = ", ".join(protocol.set for protocol in protocols.values())
        raise UserError(f"{shown(path)}: none of these sets was evaluated here: there is {there}")
    for one in map(read_evaluated_set, wanted):
        first = next(iter(sets.values()), one)
        if first.protocol.checkpoint != one.protocol.checkpoint:
            raise UserError(
                f"{shown(one.directory)}: answered by another checkpoint ({shown(one.protocol.hf)}) than"
                f" {first.protocol.set} beside it ({shown(first.protocol.hf)}): {AGAIN}"
            )
        different = [key for key in AS_SAMPLED if first.protocol.protocol.get(key) != one.protocol.protocol.get(key)]
        if different:
            raise UserError(
                f"{shown(one.directory)}: sampled otherwise ({', '.join(different)}) than {first.protocol.set} beside"
                f" it: there is no average over both: {AGAIN}, or name one of them alone with --sets"
            )
        if sets.setdefault(one.protocol.set, one) is not one:
            raise UserError(f"{shown(path)}: holds the set {one.protocol.set} twice: move one of them away")
    return Evaluation(_name(path) if number is None else f"{_name(path)}@{number}", path, sets)


def read_protocol(directory: Path) -> Protocol:
    """Return protocol.json of an output of stage 7. Raises UserError."""
    if not (directory / PROTOCOL).exists():
        raise UserError(
            f"{shown(directory)}: no {PROTOCOL}: evaluated by a version that did not write it: evaluate the checkpoint"
            " anew, .venv/bin/python -m tools.evaluate --hf DIR --suite FILE --output DIR"
        )
    return read_record(directory / PROTOCOL, Protocol, AGAIN)


def evaluated_directories(text: str, iteration: int | None = None) -> tuple[Path, int | None, list[Path]]:
    """Return the path of what a user names, the iteration if it has @N, and where its outputs of stage 7 lie.

    Raises UserError where there are none.

    Args:
        text: as a user types it.
        iteration: as of read_evaluation.
    """
    with reading(text, "name a run such as runs/demo, or an evaluation"):
        match = None if Path(text).exists() else re.fullmatch(r"(.+)@(\d{1,6})", text)
        path, number = (Path(match[1]), int(match[2])) if match else (Path(text), None)
        if not path.is_dir():
            raise UserError(f"{shown(path)}: no such directory: name a run such as runs/demo, or an evaluation")
        if match and not (path / "evaluation").is_dir():
            raise UserError(f"{shown(text)}: {shown(path)} is no run, of which @{number} names an iteration")
        return path, number, _directories(path, iteration if number is None else number)


def _name(path: Path) -> str:
    """Return what a table calls an evaluation: the name of its run where it lies in one."""
    whole = path.resolve()
    match = re.search(r"([^/]+)/evaluation/iteration_(\d+)(/[^/]+)?$", str(whole))
    return shown(f"{match[1]}@{int(match[2])}" if match else whole.name)


def _directories(path: Path, iteration: int | None) -> list[Path]:
    """Return where the outputs of stage 7 lie. Raises UserError where there are none."""
    if (path / PREDICTIONS).is_file():
        return [path]
    if sets := _sets_below(path):
        return sets
    iterations = {
        int(place.name.removeprefix("iteration_")): sets
        for place in (path / "evaluation").glob("iteration_[0-9]*")
        if place.name.removeprefix("iteration_").isdecimal() and (sets := _sets_below(place))
    }
    if not iterations:
        raise UserError(f"{shown(path)}: nothing was evaluated here: {AGAIN}")
    number = max(iterations) if iteration is None else iteration
    if number not in iterations:
        numbers = ", ".join(map(str, sorted(iterations)))
        raise UserError(f"{shown(path)}: iteration {number} was not evaluated: there is {numbers}")
    return iterations[number]


def _sets_below(directory: Path) -> list[Path]:
    """Return the outputs of stage 7 in a directory; those that are not finished are none."""
    return sorted(file.parent for file in directory.glob(f"*/{PREDICTIONS}") if file.parent.suffix != UNFINISHED)


def read_evaluated_set(directory: Path) -> EvaluatedSet:
    """Return an output of stage 7, of whose responses a few bytes each are kept. Raises UserError.

    directory: of one set; its files must be those that its manifest names.
    """
    verify_files(directory)
    protocol = read_protocol(directory)
    file = directory / PREDICTIONS
    answers: dict[ImageShown, SetAnswers] = {}
    for image, predictions in groupby(stream_jsonl(file, Prediction), key=lambda prediction: prediction.image):
        if image in answers:
            raise UserError(f"{shown(file)}: its predictions are not in order: {AGAIN}")
        with reading(file, AGAIN):
            answers[image] = collect_answers(map(answer_of, predictions), protocol.set, f"{file} ({image})")
    if "original" not in answers:
        raise UserError(f"{shown(file)}: holds no answers to the pictures as they are: {AGAIN}")
    return EvaluatedSet(directory, protocol, answers)

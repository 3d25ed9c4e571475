"""Which evaluations may stand in one table: those of the same prompts under the same protocol."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from megatron_papo.errors import UserError
from megatron_papo.evaluation.outputs import EvaluatedSet, Evaluation
from megatron_papo.evaluation.statistics import FEW_PROBLEMS, PromptScores
from megatron_papo.reading import shown
from megatron_papo.run.records import ImageShown, Protocol


@dataclass(frozen=True)
class Row:
    """What one row of a table is about: a checkpoint, or those of several runs that differ in their seed."""

    name: str
    runs: list[Evaluation]

    @property
    def sets(self) -> list[str]:
        """The names of the sets that all of its runs have."""
        return [name for name in self.runs[0].sets if all(name in run.sets for run in self.runs)]

    def of_set(self, name: str) -> list[EvaluatedSet]:
        """Return the answers of every run to a set that all have."""
        return [run.sets[name] for run in self.runs]

    def called(self, run: Evaluation) -> str:
        """Return what messages call one of the runs."""
        return self.name if len(self.runs) == 1 else f"{self.name} ({run.name})"


def require_comparable(rows: Sequence[Row], names: Sequence[str], image: ImageShown) -> list[str]:
    """Return what a reader should know of rows that were evaluated alike. Raises UserError, a line for each set, where
    they were not."""
    problems, notes, few = [], [], []
    for name in names:
        entries = [(row.called(run), run.sets[name]) for row in rows if name in row.sets for run in row.runs]
        (first_name, first), *others = entries
        for other_name, other in others:
            if different := _differences(first, other):
                problems.append(
                    f"{name}: {shown(first_name)} and {shown(other_name)} differ in {'; '.join(different)}: evaluate"
                    " both alike, or leave one out"
                )
                break
        problems += [
            f"{name}: {shown(row_name)} was not answered with the picture {image}: evaluate it again with"
            f" {'evaluation.masked_images' if image == 'masked' else 'evaluation.without_images'}=true"
            for row_name, one in entries
            if image not in one.answers
        ]
        samples = {row_name: one.answers["original"].right.shape[1] for row_name, one in entries}
        if len(set(samples.values())) > 1:
            words = ", ".join(f"{shown(row_name)} avg@{number}" for row_name, number in samples.items())
            notes.append(f"{name}: numbers of samples differ: {words}")
        problems_shown = len(set(first.answers["original"].problem_ids))
        if problems_shown < FEW_PROBLEMS:
            few.append(f"{name} {problems_shown}")
    if few:
        notes.append(f"too few problems for errors, intervals and p values to be trusted: {', '.join(few)}")
    called: dict[str, str] = {}
    for row in rows:
        for run in row.runs:
            before = called.setdefault(run.checkpoint, row.called(run))
            if before != row.called(run):
                notes.append(f"{shown(before)} and {shown(row.called(run))} are one checkpoint: what differs is chance")
    for row in rows:
        if missing := [name for name in names if name not in row.sets]:
            notes.append(f"{shown(row.name)} lacks {', '.join(missing)}: it has no averages over them")
    if problems:
        raise UserError(*problems)
    return notes


def _differences(one: EvaluatedSet, other: EvaluatedSet) -> list[str]:
    """Return in what two evaluations of a set differ so that they may not be compared."""
    first, second = _settings(one.protocol), _settings(other.protocol)
    if not (first.keys() & second.keys() & {"masked_image"}):  # the other was not answered with masked pictures
        first.pop("masked_image", None)
        second.pop("masked_image", None)
    numbers = " and ".join(str(len(side.answers["original"].prompt_ids)) for side in (one, other))
    same = one.protocol.data == other.protocol.data
    found = [] if same else [f"prompts ({numbers}; their problems, answers or pictures)"]
    return found + [
        shown(f"{key} ({first.get(key, 'not given')} and {second.get(key, 'not given')})")
        for key in sorted(first | second)
        if first.get(key) != second.get(key)
    ]


def _settings(protocol: Protocol) -> dict[str, JsonValue]:
    return protocol.protocol | {"groups": [*protocol.groups], "problems_of": protocol.problems_of}


def in_order(one: EvaluatedSet, image: ImageShown, ids: Sequence[str]) -> PromptScores:
    """Return the scores of the prompts `ids`. Raises UserError where the predictions are of others."""
    answers = one.answers[image]
    if answers.prompt_ids == ids:
        return answers.prompt_scores
    places = {prompt: place for place, prompt in enumerate(answers.prompt_ids)}
    if missing := [prompt for prompt in ids if prompt not in places]:
        raise UserError(
            f"{shown(one.directory)}: lacks prompt {shown(missing[0])}, which others of {one.protocol.set} have:"
            " evaluate it again"
        )
    if len(places) > len(ids):
        extra = next(prompt for prompt in places if prompt not in set(ids))
        raise UserError(
            f"{shown(one.directory)}: has prompt {shown(extra)}, which others of {one.protocol.set} lack:"
            " evaluate it again"
        )
    order = [places[prompt] for prompt in ids]
    whole = answers.prompt_scores
    return PromptScores(whole.scores[order], [whole.problems[place] for place in order])

"""Scores of joined files of predictions: graded here, or as their records say."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megatron_papo.config import BenchmarkConfig, Grading, RewardConfig
from megatron_papo.data.problems import normalised
from megatron_papo.errors import UserError
from megatron_papo.evaluation.joined_passes import JoinedSet
from megatron_papo.evaluation.outside_predictions import Response, responses
from megatron_papo.evaluation.scores import Answer, SetAnswers, collect_answers
from megatron_papo.reading import reading, shown
from megatron_papo.rollout.rewards import Grader, Submitted, boxed_answer, reward_of
from megatron_papo.run.console import counted, progress_bar
from megatron_papo.run.records import Record, Rewards

UNDER_WAY = 4096
"""Responses that are read ahead of the graders."""
COLUMN, BLOCK = "column:", "block:"
"""How the rules of a suite begin, see megatron_papo/data/problems.py."""


def grading_of(one: JoinedSet, chosen: Grading | None, suite: Mapping[str, BenchmarkConfig]) -> Grading | None:
    """Return how a set is graded; None: as its records say.

    Args:
        one: the set.
        chosen: by the user, for all sets.
        suite: sets by name, each with its grading.
    """
    if chosen is not None or one.ours:
        return chosen
    return suite[one.name].grading if one.name in suite else "mathruler"


class Grade(Record):
    """One response and its grade: a line of what `score --records` writes."""

    set: str
    place: str
    """FILE:LINE."""
    prompt: int
    """Number of the prompt in its set, from 1."""
    sample: int
    """From 1."""
    label: str
    """The answer of the data, as it stands in the file."""
    answer: str | None
    """Of the response: the content of its last box; None: it has none that closes."""
    right: bool
    format: bool
    timed_out: bool


def answers_of(
    one: JoinedSet,
    grading: Grading | None,
    entry: BenchmarkConfig | None,
    workers: int,
    record: Callable[[Grade], object] | None = None,
) -> SetAnswers:
    """Return the answers to a set. Raises UserError.

    Args:
        one: the set.
        grading: None: as its records say.
        entry: what the suite says of the set: which rows show the same problem.
        workers: processes that grade.
        record: called with every grade, in the order of the files; None: nobody asks.
    """

    def answers(graded: Iterator[tuple[_Row, Rewards]]) -> Iterator[Answer]:
        for row, rewards in graded:
            answer = _answer(row, rewards)
            if record is not None:
                record(_grade(one.name, row, answer))
            yield answer

    problems = _Problems(one, entry)
    where = ", ".join(shown(file.path) for file in one.files)
    with progress_bar(sum(len(passes.place) for passes in one.passes), shown(one.name), "responses") as bar:
        rows = counted(_located(one, problems), bar)
        if grading is None:
            return collect_answers(answers((row, row.recorded) for row in rows), problems.space, where)
        with Grader(reward_of(RewardConfig(workers=workers), grading)) as grader:
            return collect_answers(answers(_graded(rows, grader, grading)), problems.space, where)


@dataclass(frozen=True)
class _Row:
    """A response, where it belongs, and the problem of its prompt."""

    response: Response
    prompt: int
    sample: int
    problem: str | None

    @property
    def recorded(self) -> Rewards:
        if self.response.rewards is None:
            raise UserError(f"{self.response.place}: no rewards are recorded: say how to grade, --grading mathruler")
        return self.response.rewards


class _Problems:
    """Tells which problem the prompt of a response shows: ours say so, of others the suite's rule does."""

    def __init__(self, one: JoinedSet, entry: BenchmarkConfig | None):
        """Raises UserError where the prompts are not whole blocks.

        Args:
            one: the set.
            entry: what the suite says of it.
        """
        self.rule = entry.problem_by if entry and not one.ours else "row"
        self.space = (entry.problems_of if entry else None) or one.name
        self._labels: dict[int, Response] = {}
        if self._block and len(one.prompts) % self._block:
            raise UserError(
                f"{shown(one.files[0].path)}: {len(one.prompts)} prompts are no whole number of blocks of {self._block}"
                f" (problem_by of {shown(one.name)} in the suite): make the others, or name the set otherwise"
            )

    @property
    def column(self) -> str | None:
        return self.rule.removeprefix(COLUMN) if self.rule.startswith(COLUMN) else None

    @property
    def _block(self) -> int:
        return int(self.rule.removeprefix(BLOCK)) if self.rule.startswith(BLOCK) else 0

    def of(self, response: Response, prompt: int) -> str | None:
        """Return the problem of a prompt; None: its own."""
        if self.column is not None:
            return f"{self.space}/{response.problem}"
        if self.rule == "text":
            return f"{self.space}/{normalised(response.prompt[1] or '')}"
        if not self._block:
            return response.problem
        block = prompt // self._block
        first = self._labels.setdefault(block, response)
        if first.label.strip() != response.label.strip():
            raise UserError(
                f"{response.place} and {first.place}: different labels in one block of {self._block} rows, which should"
                " be versions of one problem: correct problem_by of the set in the suite"
            )
        return f"{self.space}/{block + 1}"


def _located(one: JoinedSet, problems: _Problems) -> Iterator[_Row]:
    for file, places in one.places():
        found = responses(file.path, file.image, problems.column)
        with reading(file.path, "do not change it while it is read"):
            for response, (prompt, sample) in zip(found, places, strict=True):
                yield _Row(response, prompt, sample, problems.of(response, prompt))


def _graded(rows: Iterator[_Row], grader: Grader, grading: Grading) -> Iterator[tuple[_Row, Rewards]]:
    """Yield the rows with the grades of `grader`, which works on some thousand at a time."""
    under_way: deque[tuple[_Row, Submitted]] = deque()
    for row in rows:
        # the authors' label is graded as it stands; any other grading takes the newline at its end for no part of it
        as_it_stands = grading == "published" and not row.response.ours
        label = row.response.label if as_it_stands else row.response.label.removesuffix("\n")
        how: Grading = "mathruler" if as_it_stands else grading
        try:
            cut_off, options = bool(row.response.cut_off), row.response.options
            submitted = grader.submit(row.response.text, label, cut_off, how, options)
        except UserError as error:
            raise UserError(f"{row.response.place}: {error}")
        under_way.append((row, submitted))
        if len(under_way) > UNDER_WAY:
            done, grade = under_way.popleft()
            yield done, grader.result(grade)
    for done, grade in under_way:
        yield done, grader.result(grade)


def _grade(name: str, row: _Row, answer: Answer) -> Grade:
    return Grade(
        set=name,
        place=row.response.place,
        prompt=row.prompt + 1,
        sample=row.sample + 1,
        label=row.response.label,
        answer=answer.content,
        right=answer.right,
        format=answer.formatted,
        timed_out=answer.timed_out,
    )


def _answer(row: _Row, rewards: Rewards) -> Answer:
    return Answer(
        prompt_id=str(row.prompt),
        problem_id=row.problem,
        sample=row.sample,
        right=rewards.accuracy == 1,
        formatted=rewards.format == 1,
        timed_out=rewards.timed_out,
        content=boxed_answer(row.response.text),
        cut_off=row.response.cut_off,
        tokens=row.response.tokens,
    )

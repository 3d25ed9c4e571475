"""From graded answers to numbers of sets, groups and a suite: what `--json` of the tools that evaluate prints.

    answers = collect_answers(map(answer_of, predictions), "mmk12", path)
    print(json.dumps(suite_scores({"mmk12": answers}, {"mmk12": ["general"]}).as_json()))

Nothing is graded again: whether a response is right, has the format and timed out stands in its `rewards`, whether it
was cut off in `finish_reason`; it is unparsed where its text has no box that closes. Of a response a few bytes are
kept, so that predictions may be streamed.
"""

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_papo.errors import UserError
from megatron_papo.evaluation import statistics
from megatron_papo.reading import shown
from megatron_papo.rollout.rewards import boxed_answer
from megatron_papo.run.records import Prediction

Json = dict[str, object]
COLUMNS = {"prompt": "q", "sample": "q", "content": "q", "tokens": "i"} | dict.fromkeys(
    ("cut_off", "answered", "right", "formatted", "timed_out"), "b"
)
"""What is kept of a response, with the type codes of arrays."""
UNKNOWN = -1
"""In place of 0 or 1, or of a length, where predictions of others do not say."""


class Answer(NamedTuple):
    """One graded response, as far as statistics ask."""

    prompt_id: str
    problem_id: str | None
    """None: the prompt's own."""
    sample: int
    right: bool
    formatted: bool
    timed_out: bool
    content: str | None
    """Of its last box; None: it has none, the response is unparsed."""
    cut_off: bool | None
    """None: not known, as of predictions that do not say why a response ended."""
    tokens: int | None
    """Length of the response; None: not known."""


def answer_of(prediction: Prediction) -> Answer:
    """Return what statistics need of a prediction. Raises ValueError where its accuracy or format is not 0 or 1."""
    rewards = prediction.rewards
    if rewards.accuracy not in (0, 1) or rewards.format not in (0, 1):
        raise ValueError(f"accuracy {rewards.accuracy:g}, format {rewards.format:g}: each is 0 or 1")
    return Answer(
        prompt_id=prediction.prompt_id,
        problem_id=prediction.problem_id,
        sample=prediction.sample,
        right=rewards.accuracy == 1,
        formatted=rewards.format == 1,
        timed_out=rewards.timed_out,
        content=boxed_answer(prediction.text),
        cut_off=prediction.finish_reason == "length",
        tokens=len(prediction.response_token_ids),
    )


@dataclass(frozen=True)
class SetAnswers:
    """All answers to the prompts of one set; every array is [prompts, samples]."""

    prompt_ids: list[str]
    problem_ids: list[str]
    right: NDArray[np.bool_]
    formatted: NDArray[np.bool_]
    timed_out: NDArray[np.bool_]
    answered: NDArray[np.bool_]
    """Has a box that closes."""
    contents: NDArray[np.int64]
    """Equal numbers for equal contents of boxes."""
    cut_off: NDArray[np.int8]
    """1, 0 or UNKNOWN."""
    tokens: NDArray[np.int32]
    """Or UNKNOWN."""

    @property
    def prompt_scores(self) -> statistics.PromptScores:
        """The mean over samples of every prompt."""
        return statistics.PromptScores(self.right.mean(axis=1), self.problem_ids)


def collect_answers(answers: Iterable[Answer], name: str, where: Path | str) -> SetAnswers:
    """Return the answers to a set in arrays: prompts in the order in which they first come, samples by number.

    Raises UserError where a prompt has fewer samples than another, one twice, or two problems.

    Args:
        answers: in any order.
        name: of the set; a prompt that names no problem is one of its own in it.
        where: what to call the source in errors.
    """
    places: dict[str, int] = {}
    problems: list[str] = []
    columns = {name: array(code) for name, code in COLUMNS.items()}
    for answer in answers:
        place = places.setdefault(answer.prompt_id, len(places))
        problem = answer.problem_id or f"{name}/{answer.prompt_id}"
        if place == len(problems):
            problems.append(problem)
        elif problems[place] != problem:
            raise UserError(
                f"{where}: prompt {shown(answer.prompt_id)} belongs to two problems, {shown(problems[place])} and"
                f" {shown(problem)}: evaluate the set again"
            )
        row = {
            "prompt": place,
            "sample": answer.sample,
            "content": _number_of(answer.content),
            "tokens": UNKNOWN if answer.tokens is None else answer.tokens,
            "cut_off": UNKNOWN if answer.cut_off is None else answer.cut_off,
            "answered": answer.content is not None,
            "right": answer.right,
            "formatted": answer.formatted,
            "timed_out": answer.timed_out,
        }
        for column, value in row.items():
            columns[column].append(value)
    if not places:
        raise UserError(f"{where}: holds no answers: evaluate the set again")
    table = {column: np.frombuffer(values, COLUMNS[column]) for column, values in columns.items()}
    shape = len(places), _samples_per_prompt(list(places), table["prompt"], table["sample"], where)
    order = np.lexsort((table["sample"], table["prompt"]))
    table = {column: values[order].reshape(shape) for column, values in table.items()}
    return SetAnswers(
        prompt_ids=list(places),
        problem_ids=problems,
        right=table["right"].astype(bool),
        formatted=table["formatted"].astype(bool),
        timed_out=table["timed_out"].astype(bool),
        answered=table["answered"].astype(bool),
        contents=table["content"],
        cut_off=table["cut_off"],
        tokens=table["tokens"],
    )


def _number_of(content: str | None) -> int:
    """Return a signed number of 64 bits that tells contents apart."""
    digest = hashlib.blake2b((content or "").encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _samples_per_prompt(ids: Sequence[str], prompts: NDArray, samples: NDArray, where: Path | str) -> int:
    """Return how many samples each prompt has. Raises UserError where they are not the same for all."""
    counts = np.bincount(prompts)
    most = int(np.bincount(counts).argmax())
    if (counts != most).any():
        odd = int(np.flatnonzero(counts != most)[0])
        raise UserError(
            f"{where}: prompt {shown(ids[odd])} has {counts[odd]} samples, others have {most}: avg@k needs the same"
            " number of every prompt: evaluate the set again"
        )
    pairs = np.stack([prompts, samples], axis=1)
    unique, times = np.unique(pairs, axis=0, return_counts=True)
    if len(unique) != len(pairs):
        prompt, sample = unique[times > 1][0].tolist()
        raise UserError(
            f"{where}: sample {sample} of prompt {shown(ids[prompt])} is there twice: evaluate the set again"
        )
    return most


@dataclass(frozen=True)
class SetScores:
    """The numbers of one set: shares, 0 to 1."""

    prompts: int
    samples_per_prompt: int
    avg: float
    """avg@k, k the number of samples."""
    standard_error: float | None
    """Of avg, clustered by problem; None where there are fewer than two problems."""
    pass_at: dict[int, float]
    maj: float
    """maj@k: of the most frequent answer to a prompt."""
    format: float
    cut_off: float | None
    """None: not known, as in `mean_tokens`."""
    timed_out: float
    unparsed: float
    mean_tokens: float | None
    variance: statistics.VarianceParts | None

    def as_json(self) -> Json:
        """Return what the tools print of a set."""
        names = ("prompts", "samples_per_prompt", "avg", "standard_error", "pass_at", "maj", "format", "cut_off",
                 "timed_out", "unparsed")  # fmt: skip
        values: Json = {name: getattr(self, name) for name in names}
        return values | {"pass_at": {str(k): value for k, value in self.pass_at.items()}}


@dataclass(frozen=True)
class MeanScore:
    """Of a group, or of all sets: the unweighted mean over its sets of avg@k."""

    avg: float
    standard_error: float | None
    """Clustered by problem, across sets that show the same problems."""


@dataclass(frozen=True)
class SuiteScores:
    """The numbers of a checkpoint on a suite."""

    sets: dict[str, SetScores]
    groups: dict[str, MeanScore]
    overall: MeanScore

    def as_json(self) -> Json:
        """Return the one object that `--json` prints."""
        return {
            "sets": {name: scores.as_json() for name, scores in self.sets.items()},
            "groups": {name: vars(mean).copy() for name, mean in self.groups.items()},
            "overall": vars(self.overall).copy(),
        }


def set_scores(answers: SetAnswers) -> SetScores:
    """Return the numbers of one set."""
    prompts, samples = answers.right.shape
    return SetScores(
        prompts=prompts,
        samples_per_prompt=samples,
        avg=float(answers.right.mean()),
        standard_error=statistics.standard_error([answers.prompt_scores]),
        pass_at=statistics.pass_at_k(answers.right),
        maj=statistics.majority_at_k(answers.right, answers.contents, answers.answered),
        format=float(answers.formatted.mean()),
        cut_off=_mean_if_known(answers.cut_off),
        timed_out=float(answers.timed_out.mean()),
        unparsed=float(1 - answers.answered.mean()),
        mean_tokens=_mean_if_known(answers.tokens),
        variance=statistics.variance_parts(answers.right, answers.problem_ids),
    )


def _mean_if_known(values: NDArray) -> float | None:
    return None if (values == UNKNOWN).any() else float(values.mean())


def mean_score(sets: Sequence[SetAnswers]) -> MeanScore:
    """Return the mean over sets."""
    scores = [answers.prompt_scores for answers in sets]
    return MeanScore(sum(float(one.scores.mean()) for one in scores) / len(sets), statistics.standard_error(scores))


def suite_scores(sets: Mapping[str, SetAnswers], groups: Mapping[str, Sequence[str]]) -> SuiteScores:
    """Return the numbers of a checkpoint on the sets of a suite, of its groups and of all sets together.

    Args:
        sets: by name, at least one.
        groups: of each set, the groups that it belongs to; a set that is not there belongs to none.
    """
    return SuiteScores(
        {name: set_scores(answers) for name, answers in sets.items()},
        {
            group: mean_score([sets[name] for name in names])
            for group, names in sets_by_group(list(sets), groups).items()
        },
        mean_score(list(sets.values())),
    )


def sets_by_group(names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the names of the sets of each group, in order."""
    found: dict[str, list[str]] = {}
    for name in names:
        for group in groups.get(name, ()):
            found.setdefault(group, []).append(name)
    return found

"""The JSONL contracts between stages: Prompt (stage 1), Rollout (stage 4), Prediction (stage 7). One record per
line."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from megatron_papo.errors import UserError
from megatron_papo.reading import reading


class Record(BaseModel):
    """A line of a file; every number in it is finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


TokenId = Annotated[int, Field(ge=0)]
LogProb = Annotated[float, Field(le=0)]


class Prompt(Record):
    id: str
    """Unique in its file."""
    problem: str
    answer: str
    token_ids: list[int]
    """The rendered chat prompt up to the start of the response, with exactly one image-pad token per image."""
    num_tokens: int
    """Length with every image-pad token expanded to its image's tokens."""
    images: list[str]
    """Paths relative to the directory of the file, one per image-pad token, in order: the native pictures, not
    resized."""
    saliency: list[str] = []
    """Likewise, the saliency map of each image, for masked_image.strategy `semantic`; [] where the data has none."""
    problem_id: str | None = None
    """Of an evaluation set: the problem that is shown, the same in every set and row that shows it."""
    options: list[str] = []
    """Of an evaluation set: the texts to choose from, A first; [] where there is nothing to choose."""
    token_ids_without_images: list[int] | None = None
    """Of an evaluation set: token_ids of the text alone; None where there is no image."""
    target: str | None = None
    """The response that stage 2 teaches; None outside sft.jsonl."""
    target_token_ids: list[int] | None = None
    """Its tokens, ending with the end-of-turn token."""

    def without_images(self) -> Self:
        """Return the prompt of the text alone."""
        ids = self.token_ids if self.token_ids_without_images is None else self.token_ids_without_images
        return self.model_copy(update={"token_ids": ids, "num_tokens": len(ids), "images": [], "saliency": []})


class Rewards(Record):
    overall: float
    accuracy: float
    format: float
    timed_out: bool = False
    """The grader hit its time limit; accuracy is 0."""
    overlong_penalty: float = 0.0
    """The soft overlong punishment that `overall` includes; <= 0, and 0 in evaluation."""


class Rollout(Record):
    """One sampled response with all that training needs; the images are the prompt's, in the same data directory."""

    prompt_id: str
    iteration: int
    epoch: int
    """How often the data order has been round when this prompt was drawn, from 0; part of the masked image's seed."""
    group: int
    """Number of the prompt in this iteration's batch, from 0. group * group_size + sample is the record's line
    number."""
    sample: int
    """Number of the response in its group, from 0."""
    answer: str
    prompt_token_ids: list[int]
    """As in Prompt.token_ids: one image-pad token per image."""
    prompt_num_tokens: int
    """Length with images expanded, as counted by the server and equal to ours."""
    images: list[str]
    saliency: list[str] = []
    """As in Prompt.saliency."""
    response_token_ids: list[TokenId]
    """As the server sampled them, the end-of-turn token included when it came."""
    rollout_log_probs: list[LogProb]
    """The server's log-prob of each response token, at `temperature`, before top_p, over the tokens it may sample. Same
    length."""
    text: str
    """The response decoded without special tokens: what was graded."""
    finish_reason: Literal["stop", "length"]
    rewards: Rewards
    temperature: float
    top_p: float
    sampling_seed: int
    masked_image_seed: int
    weight_version: str
    """What the server said its weights were when it answered: the fingerprint of the Hugging Face checkpoint."""
    staleness: int = 0
    """How many iterations older those weights are than the ones that this rollout trains first; 0 unless
    rollout.max_staleness is 1."""


ImageShown = Literal["original", "masked", "none"]
"""What a response of stage 7 was given of the prompt's images."""


class Prediction(Record):
    """One answer to a benchmark prompt."""

    prompt_id: str
    problem_id: str | None = None
    """As in Prompt.problem_id."""
    sample: int
    image: ImageShown
    answer: str
    options: list[str] = []
    """As in Prompt.options."""
    text: str
    response_token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    rewards: Rewards
    sampling_seed: int
    masked_image_seed: int | None


class Protocol(Record):
    """protocol.json of stage 7: what was evaluated, and how. Two evaluations may be compared where all of `protocol`
    and `data` agree."""

    set: str
    groups: list[str]
    group_sets: dict[str, list[str]] = {}
    """Of each of its groups, all sets of the suite that belong to it."""
    problems_of: str
    """Name of the set whose problems these are."""
    checkpoint: str
    """Fingerprint of the Hugging Face checkpoint."""
    hf: str
    """Where it was."""
    data: str
    """Hash of what the prompts ask."""
    protocol: dict[str, JsonValue]
    """All settings that decide the responses or their grades."""
    chosen_on: bool
    """keep_best of the run that made the checkpoint chooses by this set, whatever it is called there."""


class Metrics(BaseModel):
    """metrics.json of stage 7, as far as it is read again."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    accuracy: float = Field(ge=0, le=1)
    accuracy_masked: float | None = Field(default=None, ge=0, le=1)
    accuracy_none: float | None = Field(default=None, ge=0, le=1)


RecordType = TypeVar("RecordType", bound=Record)


def read_jsonl(path: Path, record: type[RecordType]) -> list[RecordType]:
    """All records of a file. A truncated or foreign line is a UserError that names file and line; so is an empty
    file."""
    return list(stream_jsonl(path, record))


def stream_jsonl(path: Path, record: type[RecordType]) -> Iterator[RecordType]:
    """Yield the records of a file one by one, with one line in memory at a time; errors are read_jsonl's."""
    number = 0
    with reading(path, "make the file again"), open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                raise UserError(f"{path}:{number}: the last line is not complete (truncated file): make the file again")
            yield _parse(line[:-1], record, f"{path}:{number}")
    if not number:
        raise UserError(f"{path}: holds no records: make the file again")


def _parse(line: bytes, record: type[RecordType], where: str) -> RecordType:
    with reading(f"{where}: not a {record.__name__} record", "make the file again"):
        return record.model_validate_json(line)


def write_jsonl(path: Path, records: Iterable[Record]) -> int:
    """Writes one record per line; returns how many.

    Raises UserError for a record that could not be read again, such as one with a number that is not finite.
    """
    count = 0
    with open(path, "w", encoding="utf-8") as stream:
        for count, record in enumerate(records, 1):
            line = record.model_dump_json()
            with reading(f"{path}:{count}: not written", "run the stage again"):
                type(record).model_validate_json(line)
            stream.write(line + "\n")
    return count


def groups_of(rollouts: list[Rollout], group_size: int, where: Path) -> Iterator[list[Rollout]]:
    """The rollouts of each prompt, in order. Raises UserError where a group is empty, incomplete or mixed."""
    if len(rollouts) % group_size:
        raise UserError(f"{where}: {len(rollouts)} rollouts are not whole groups of {group_size}: make the file again")
    for start in range(0, len(rollouts), group_size):
        group = rollouts[start : start + group_size]
        number = start // group_size
        expected = [(number, sample) for sample in range(group_size)]
        if [(r.group, r.sample) for r in group] != expected or len({r.prompt_id for r in group}) != 1:
            raise UserError(
                f"{where}:{start + 1}: group {number} is empty, incomplete or out of order: make the file again"
            )
        yield group

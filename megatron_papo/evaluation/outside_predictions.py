"""Files of predictions, line by line, whoever wrote them.

Of PAPO-Eval: JSON lines with prompt, predict, label and, since one of its versions, id; one pass over the prompts after
another. The label is decoded from tokens and ends with a newline. Of this pipeline: predictions.jsonl of stage 7.

A file is read twice: `scan` looks at every line before anything is graded, and keeps a few bytes of each; `responses`
yields them again. Neither holds more than a line.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_papo.errors import UserError
from megatron_papo.evaluation.outputs import PROTOCOL
from megatron_papo.reading import read_record, reading, refuse_constant, shown
from megatron_papo.run.records import ImageShown, Prediction, Protocol, Rewards
from megatron_papo.run.stage_output import verify_files

LONGEST_LINE = 64 << 20
"""Bytes: a response with its token ids has a few ten thousand."""
THEIRS = ("prompt", "predict", "label")
AGAIN = "make the file again, or leave it out"


class Response(NamedTuple):
    """One line of a file of predictions."""

    place: str
    """FILE:LINE, for errors."""
    prompt: tuple[str | None, ...]
    """What tells prompts apart within a set: prompt_id and answer; of PAPO-Eval's id, prompt and label."""
    label: str
    """The answer of the data, as it stands in the file."""
    text: str
    problem: str | None
    """Ours: problem_id. PAPO-Eval's: the entry of the column that was asked for."""
    sampling_seed: int | None
    rewards: Rewards | None
    """As recorded; None: PAPO-Eval records none."""
    cut_off: bool | None
    """None: not recorded, as `tokens`."""
    tokens: int | None
    options: tuple[str, ...] = ()
    """Ours: those of the prompt, that of A first. PAPO-Eval records none."""

    @property
    def ours(self) -> bool:
        return self.rewards is not None


@dataclass(frozen=True)
class PredictionsFile:
    """What `scan` found."""

    path: Path
    protocol: Protocol | None
    """Of an output of stage 7."""
    ours: bool
    digest: str
    """Of the whole content."""
    keys: list[bytes]
    """Of the prompt of each response, in order."""
    has_ids: bool
    """Its lines, PAPO-Eval's, have an id."""
    image: ImageShown
    seeds: set[bytes]
    """Of prompt and sampling seed of each response, where they are recorded."""


def scan(path: Path, image: ImageShown, column: str | None = None) -> PredictionsFile:
    """Read a whole file and return what is needed to join it with others. Raises UserError, naming the line.

    Args:
        path: of the file.
        image: which of our predictions count; of others every line does.
        column: of PAPO-Eval's lines, which must have it: what tells problems apart.
    """
    digest, keys, seeds, ours, has_ids = hashlib.sha256(), [], set(), False, True
    for response in responses(path, image, column, digest):
        key = _key(*response.prompt)
        keys.append(key)
        ours, has_ids = response.rewards is not None, has_ids and response.prompt[0] is not None
        if response.sampling_seed is not None:
            seeds.add(_key(*response.prompt, str(response.sampling_seed)))
    if not keys:
        what = (
            "holds no responses" if digest.digest() == hashlib.sha256().digest() else f"holds none with image {image}"
        )
        raise UserError(f"{shown(path)}: {what}: {AGAIN}")
    if not ours and image != "original":
        raise UserError(
            f"--image {image}: {shown(path)} does not say what was shown of the pictures: leave --image out"
        )
    beside = path.parent / PROTOCOL
    with reading(beside, "choose a directory that can be read"):
        has_protocol = ours and beside.is_file()
    if ours:
        verify_files(path.parent)
    protocol = read_record(beside, Protocol, "evaluate again, or remove it") if has_protocol else None
    return PredictionsFile(path, protocol, ours, digest.hexdigest(), keys, has_ids, image, seeds)


def responses(
    path: Path, image: ImageShown, column: str | None = None, digest: "hashlib._Hash | None" = None
) -> Iterator[Response]:
    """Yield the responses of a file in order. Raises UserError for a line that is none, as `scan` does.

    Args:
        path: of the file.
        image: as of `scan`.
        column: as of `scan`.
        digest: is updated with what is read.
    """
    ours: bool | None = None
    for place, line in _lines(path, digest):
        with reading(place, AGAIN):
            tree = json.loads(line, parse_constant=refuse_constant, object_pairs_hook=_without_repeated_keys)
            if not isinstance(tree, dict):
                raise ValueError(f"{_kind(tree)} where an object is expected")
            is_ours = "prompt_id" in tree and "prompt" not in tree
            if ours is not None and is_ours != ours:
                raise ValueError("a prediction of another program than those before it")
            ours = is_ours
            response = _of_ours(place, line, image) if ours else _of_papo_eval(place, tree, column)
        if response is not None:
            yield response


def _lines(path: Path, digest: "hashlib._Hash | None") -> Iterator[tuple[str, str]]:
    """Yield the lines that hold something, with their places."""
    with reading(path, "name a file of predictions"):
        if not path.is_file():
            raise UserError(f"{shown(path)}: no such file: name a file of predictions, or a directory of them")
        stream = open(path, "rb")
    with stream:
        number = 0
        while True:
            number += 1
            place = f"{shown(path)}:{number}"
            with reading(place, AGAIN):
                content = stream.readline(LONGEST_LINE + 1)
                if not content:
                    return
                if len(content) > LONGEST_LINE:
                    raise ValueError(f"longer than {LONGEST_LINE >> 20} MiB: no line of predictions")
                if digest is not None:
                    digest.update(content)
                line = content.decode("utf-8")
                if not line.endswith("\n") and not _is_json(line):
                    raise ValueError("the last line is not complete (truncated file)")
            if line.strip():
                yield place, line


def _of_ours(place: str, line: str, image: ImageShown) -> Response | None:
    """Return a line of stage 7; None where it was shown another image."""
    prediction = Prediction.model_validate_json(line)
    if prediction.image != image:
        return None
    _require_label(prediction.answer, "answer")
    return Response(
        place,
        prompt=(prediction.prompt_id, prediction.answer),
        label=prediction.answer,
        text=prediction.text,
        problem=prediction.problem_id,
        sampling_seed=prediction.sampling_seed,
        rewards=prediction.rewards,
        cut_off=prediction.finish_reason == "length",
        tokens=len(prediction.response_token_ids),
        options=tuple(prediction.options),
    )


def _of_papo_eval(place: str, tree: dict[str, object], column: str | None) -> Response:
    prompt, predict, label = (_text(tree, name) for name in THEIRS)
    _require_label(label, "label")
    identity = None if tree.get("id") is None else _entry(tree, "id")
    problem = None if column is None else _entry(tree, column)
    return Response(place, (identity, prompt, label), label, predict, problem, None, None, None, None)


def _text(tree: dict[str, object], name: str) -> str:
    """Return an entry that must be text. Raises ValueError."""
    if name not in tree:
        seen = ", ".join(shown(key, 40) for key in list(tree)[:8]) or "nothing"
        raise ValueError(f"has no {name} (PAPO-Eval's lines have {', '.join(THEIRS)}; this one has {seen})")
    value = tree[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_kind(value)}, expected text")
    return _unicode(value, name)


def _entry(tree: dict[str, object], name: str) -> str:
    """Return an entry that names something, as text. Raises ValueError."""
    value = tree.get(name)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        what = "is missing" if name not in tree else f"is {_kind(value)}"
        raise ValueError(f"{shown(name)} {what}, expected a text or a whole number")
    return _unicode(str(value), name)


def _unicode(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a character (a lone surrogate)")
    return text


def _require_label(label: str, name: str) -> None:
    if not label.strip():
        raise ValueError(f"{name} is empty: there is nothing to grade against")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _key(*parts: str | None) -> bytes:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _without_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("has a key twice")
    return tree

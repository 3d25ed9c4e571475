"""The forms in which benchmark sets are published: each a function from a row to what an evaluation needs.

`messages` is that of the authors' release, PAPO-Galaxy/PAPO_eval. The others are those of the sets' own pages on the
Hugging Face hub, written after their public descriptions and never tried on the real files:

    geometry3k   hiyouga/geometry3k       images, problem, answer
    mathvista    AI4Math/MathVista        question, choices (of some rows), unit, answer, decoded_image
    mathverse    AI4Math/MathVerse        question, question_for_eval, answer, image
    logicvista   lscpku/LogicVista        question, answer, image
    we_math      We-Math/We-Math          question, option (one text, "A. 3; B. 4; ..."), answer, image_path
    mmmu_pro     MMMU/MMMU_Pro            question, options (a list of Python as text), answer, image_1 ... image_7

Where a set has options they are shown below the question as "(A) text" lines, as MathVista's own query does; the answer
is the letter of the right one.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_papo.data.cells import picture_of, pictures_of, plain_text_of, require_unicode
from megatron_papo.data.chat import IMAGE_PLACE
from megatron_papo.errors import UserError
from megatron_papo.reading import shown

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """What a row of a benchmark says."""

    problem: str
    """With an `<image>` place for each picture."""
    answer: str
    images: Sequence[bytes | str]
    options: Sequence[str] = ()
    """Texts of the choices, that of A first."""


@dataclass(frozen=True)
class Form:
    read: Callable[[dict], Item]
    """Raises UserError for a row that cannot be used."""
    columns: tuple[str, ...]
    """That it reads; of a row that lacks one the value is None, or it is refused."""
    pictures: tuple[str, ...]
    """Of these, those with pictures."""


def read_item(form: str, row: dict) -> Item:
    """Return what a row of a form says. Raises UserError where it cannot be used: places without a picture, options
    without the answer's letter."""
    item = FORMS[form].read(row)
    places = item.problem.count(IMAGE_PLACE)
    if places and places != len(item.images):
        raise UserError(f"{len(item.images)} images for {places} {IMAGE_PLACE} places: correct or drop the row")
    for what, text in (*(("an option", text) for text in item.options), ("the question", item.problem)):
        require_unicode(text, what)
    if item.options and item.answer not in tuple(LETTERS[: len(item.options)]):
        raise UserError(
            f"the answer is {shown(repr(item.answer))}, the options go from A to {LETTERS[len(item.options) - 1]}:"
            " correct or drop the row"
        )
    return item


def _messages(row: dict) -> Item:
    """Return a conversation of two turns: what the user says, verbatim, and the answer."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"messages is {shown(repr(turns))}, expected the turns of user and assistant: set another form")
    roles = [turn.get("role") for turn in turns]
    if roles != ["user", "assistant"]:
        raise UserError(f"messages has the turns {shown(roles)}, expected user and assistant: correct or drop the row")
    problem = plain_text_of(turns[0], "content", "the user's content")
    answer = plain_text_of(turns[1], "content", "the answer (the assistant's content)")
    images = [
        image.removeprefix("./").removeprefix("data/") if isinstance(image, str) else image
        for image in pictures_of(row, "images") or []
    ]
    return Item(problem, answer, images)


def _geometry3k(row: dict) -> Item:
    return Item(plain_text_of(row, "problem"), plain_text_of(row, "answer"), pictures_of(row, "images") or [])


def _mathvista(row: dict) -> Item:
    """Return the question with its choices; the answer of the data is the text of one of them. A free answer is asked
    for in the unit that the row names."""
    question, answer = plain_text_of(row, "question"), plain_text_of(row, "answer")
    options = _list_of_texts(row.get("choices"), "choices")
    if options:
        if answer not in options:
            raise UserError(f"the answer {shown(repr(answer))} is none of the choices: correct or drop the row")
        answer = LETTERS[options.index(answer)]
    elif isinstance(row.get("unit"), str) and row["unit"]:
        question += f" (Unit: {row['unit']})"
    return Item(_with_options(question, options), answer, _one_picture(row, "decoded_image"), options)


def _mathverse(row: dict) -> Item:
    """Return the question, which holds its choices. Where it is empty (version Vision Only) the picture shows it."""
    question = row.get("question")
    text = question if isinstance(question, str) and question.strip() else "Answer the question in the picture."
    shown_text = row.get("question_for_eval")
    options = _lettered((shown_text if isinstance(shown_text, str) else text).splitlines())
    return Item(
        _with_place(text),
        plain_text_of(row, "answer"),
        _one_picture(row, "image"),
        options if isinstance(row.get("answer"), str) and row["answer"] in tuple(LETTERS) else (),
    )


def _logicvista(row: dict) -> Item:
    """Return the question; its options stand in the text or in the picture."""
    return Item(_with_place(plain_text_of(row, "question")), plain_text_of(row, "answer"), _one_picture(row, "image"))


def _we_math(row: dict) -> Item:
    text = plain_text_of(row, "option")
    parts = re.split(r";(?=\s*\(?[A-Z]\s*[.:)])", text.rstrip("; "))
    options = _lettered(parts)
    if len(options) != len(parts):
        raise UserError(f"option is {shown(repr(text))}, expected A. ...; B. ...: correct or drop the row")
    return Item(
        _with_options(plain_text_of(row, "question"), options),
        plain_text_of(row, "answer"),
        _one_picture(row, "image_path"),
        options,
    )


def _mmmu_pro(row: dict) -> Item:
    """Return the question with its options; `<image 2>` in either is where the second picture stands."""
    options = row.get("options")
    texts = _list_of_texts(options if isinstance(options, list) else python_texts(options), "options")
    if not texts:
        raise UserError("options is empty, expected the texts of the choices: correct or drop the row")
    if row.get("question") is None and row.get("image") is not None:  # configuration `vision`
        return Item(
            _with_place("Answer the question in the picture."),
            plain_text_of(row, "answer"),
            _one_picture(row, "image"),
            texts,
        )
    text = _with_options(plain_text_of(row, "question"), texts, place="")
    numbers = [int(number) for number in re.findall(r"<image (\d)>", text)]
    images = []
    for number in numbers or [number for number in range(1, 8) if row.get(f"image_{number}") is not None]:
        if row.get(f"image_{number}") is None:
            raise UserError(f"no image_{number} for its <image {number}>: correct or drop the row")
        images.append(picture_of(row[f"image_{number}"], f"image_{number}"))
    problem = re.sub(r"<image \d>", IMAGE_PLACE, text) if numbers else IMAGE_PLACE * len(images) + text
    return Item(problem, plain_text_of(row, "answer"), images, texts)


def python_texts(text: object) -> list[str]:
    """Return the texts of a list of them that is written as Python writes it, nothing being evaluated. Raises UserError
    where it is no such list."""
    refused = UserError(f"options is {shown(repr(text))}, expected a list of texts: correct or drop the row")
    written = text.strip() if isinstance(text, str) else ""
    if not (written.startswith("[") and written.endswith("]")):
        raise refused
    inner = written[1:-1].strip().removesuffix(",").rstrip()
    position, texts = 0, []
    while position < len(inner):
        found = _PYTHON_TEXT.match(inner, position)
        if found is None:
            raise refused
        texts.append(_ESCAPE.sub(_unescaped, found["text"][1:-1]))
        position = found.end()
    return texts


_PYTHON_TEXT = re.compile(r"""(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*(?:,\s*(?=\S)|$)""", re.DOTALL)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\n": ""}


def _unescaped(match: re.Match) -> str:
    """Return what an escape of a Python text stands for; one that Python does not know stands for itself."""
    code = match[1]
    if len(code) > 1:
        return chr(int(code[1:], 16))
    return _ESCAPES.get(code, code if code in "\\'\"" else match[0])


def _lettered(parts: Sequence[str]) -> list[str]:
    """Return the texts of the parts "A. text", "B: text", "(C) text", ..., other parts left out; [] where their letters
    are not A, B, C, ... in order."""
    found = [match for part in parts if (match := _LETTERED.match(part.strip()))]
    letters = "".join(match[1] for match in found)
    return [match[2].strip() for match in found] if LETTERS.startswith(letters) else []


_LETTERED = re.compile(r"\(?([A-Z])\s*[.:)]\s*(.*\S.*)", re.DOTALL)


def _list_of_texts(value: object, column: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise UserError(f"{column} is {shown(repr(value))}, expected a list of texts: correct or drop the row")
    if len(value) > len(LETTERS):
        raise UserError(f"{column} has {len(value)} texts, more than there are letters: correct or drop the row")
    return value


def _with_options(question: str, options: Sequence[str], place: str = IMAGE_PLACE) -> str:
    lines = [f"({letter}) {text}" for letter, text in zip(LETTERS, options)]
    return "\n".join([_with_place(question) if place else question, *(["Choices:", *lines] if lines else [])])


def _with_place(question: str) -> str:
    return question if IMAGE_PLACE in question else IMAGE_PLACE + question


def _one_picture(row: dict, column: str) -> list[bytes | str]:
    images = pictures_of(row, column) or []
    if len(images) != 1:
        raise UserError(f"{column}: {len(images)} pictures, expected one: correct or drop the row")
    return images


_PICTURES_OF_MMMU = ("image", *(f"image_{number}" for number in range(1, 8)))

FORMS = {
    "messages": Form(_messages, ("messages", "images"), ("images",)),
    "geometry3k": Form(_geometry3k, ("problem", "answer", "images"), ("images",)),
    "mathvista": Form(
        _mathvista, ("question", "choices", "unit", "answer", "decoded_image"), ("decoded_image",)
    ),
    "mathverse": Form(
        _mathverse, ("question", "question_for_eval", "answer", "image"), ("image",)
    ),
    "logicvista": Form(_logicvista, ("question", "answer", "image"), ("image",)),
    "we_math": Form(_we_math, ("question", "option", "answer", "image_path"), ("image_path",)),
    "mmmu_pro": Form(_mmmu_pro, ("question", "options", "answer", *_PICTURES_OF_MMMU), _PICTURES_OF_MMMU),
}  # fmt: skip
"""Name -> how its rows are read. `columns`, whose names the configuration says, is in rows.py."""

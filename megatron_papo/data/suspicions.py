"""Answers that can be graded, but that a right response would hardly match, or an empty one would."""

import re
from collections.abc import Callable, Collection, Sequence

Grade = Callable[[Sequence[tuple[str, str]]], Sequence[bool]]
"""Says of pairs (response, answer) whether the response is right."""

UNMATCHED = "answers that the same text in a box does not match"
WRAPPED = "answers with more around them than a response has in its box"
SENTENCE = "answers that are sentences"
NO_VALUE = "answers that stand for no value"
WITHOUT_BOX = "answers that a response without a box matches"
ONE_COLOUR = "pictures of one colour"

_PLAIN = re.compile(r"[A-Za-z]+|-?\d+(\.\d+)?")
"""Single words and plain numbers are compared as text: no need to try."""
_WRAPPINGS = (
    re.compile(r".*\banswer\b\s*(?:is|[:=])\s*:?\s*(?P<bare>.+?)\.?", re.DOTALL | re.IGNORECASE),
    re.compile(r".*####\s*(?P<bare>.+)", re.DOTALL),
    re.compile(r"<(\w+)>(?P<bare>.*)</\1>", re.DOTALL),
    re.compile(r"(\*\*|['\"])(?P<bare>.+)\1", re.DOTALL),
    re.compile(r"\[\s*(['\"])(?P<bare>.*)\1\s*\]", re.DOTALL),
    re.compile(r"(?:option|choice)\s*:?\s*\(?(?P<bare>[A-Z])\b.*", re.DOTALL | re.IGNORECASE),
    re.compile(r"\(?(?P<bare>[A-Z])\s*[.):\uff1a\uff0e\u3001].*", re.DOTALL),
)
"""What data sets put around the answer proper."""
_NO_VALUES = ("nan", "none", "null", "n/a", "inf", "-inf", "[]", "{}")
_WITHOUT_BOX = ("", "I do not know.")
_LONG_WORDS = 5


def suspicious_answers(answers: Collection[str], grade: Grade) -> dict[str, str]:
    """Return the answers that look wrong, each with the kind of its first fault.

    Args:
        answers: of a data set, each once.
        grade: the grader of responses.
    """
    found = {answer: kind for answer in answers if (kind := _by_look(answer)) is not None}
    questionable = [answer for answer in answers if not _PLAIN.fullmatch(answer.strip())]
    trials = [(kind, response, answer, right) for answer in questionable for kind, response, right in _trials(answer)]
    grades = grade([(response, answer) for _, response, answer, _ in trials]) if trials else []
    for (kind, _, answer, right), graded in zip(trials, grades, strict=True):
        if graded != right:
            found.setdefault(answer, kind)
    return found


def _trials(answer: str) -> list[tuple[str, str, bool]]:
    """Return the kind of fault, the response that shows it, and how that should be graded."""
    trials = [(WITHOUT_BOX, response, False) for response in _WITHOUT_BOX]
    trials.append((UNMATCHED, _boxed(answer), True))
    bare = _bare(answer)
    return trials if bare is None else [*trials, (WRAPPED, _boxed(bare), True)]


def _by_look(answer: str) -> str | None:
    text = answer.strip()
    if text.lower() in _NO_VALUES:
        return NO_VALUE
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", text))
    is_sentence = len(words) >= _LONG_WORDS or (len(words) >= 2 and text.endswith((".", "!", "?", "\u3002")))
    return SENTENCE if is_sentence and _bare(answer) is None else None


def _bare(answer: str) -> str | None:
    """Return what a response would have in its box where an answer has words or marks around it; None: it has not."""
    for wrapping in _WRAPPINGS:
        match = wrapping.fullmatch(answer.strip())
        if match is not None and match["bare"].strip():
            return match["bare"].strip()
    return None


def _boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"

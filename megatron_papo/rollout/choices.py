"""Multiple choice: which option the content of a box names. Plain text only: nothing here parses mathematics.

People and models write the same option as B, (B), B., \\text{B}, b, "B: 5 cm" or "5 cm". A text that names two options
("A or B", "AB", "(A) and (B)"), or the letter of one with the text of another, names none.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from string import ascii_uppercase

from megatron_papo.errors import UserError
from megatron_papo.reading import shown

LONGEST_CONTENT = 2000
"""Characters; a longer content names no option."""
NESTED = 4
"""Fonts within fonts that are taken off: \\textbf{\\text{B}} is two."""
OPTIONS_REMEMBERED = 1024
"""Prompts whose options are cleaned once for all responses: more than are under way at a time."""
_STOPS = str.maketrans({"\u3001": ". ", "\u3002": ". "})
"""Behind a letter Chinese texts have these."""
_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|rm|it|sf|tt|bb|cal|normal)|boldsymbol|mbox|hbox|operatorname|boxed)"
    r" ?\{([^{}]*)\}"
)
_SPACE = re.compile(r"\\(?:[ ,;:!]|q?quad(?![A-Za-z]))|~|\s+")
_SIZED = re.compile(r"\\(?:left|right) ?(?=[()\[\]])")
_LEAD = r"(?:(?:the )?(?:correct |final |right )?(?:answer|option|choice)(?: is)? ?:? ?)?"
_BARE = re.compile(_LEAD + r"(?:\(([A-Z])\)|\[([A-Z])\]|([A-Z])\)?) ?[.:]?", re.IGNORECASE)
"""A letter, in brackets or not, and at most a full stop or a colon."""
_LABELLED = re.compile(
    _LEAD + r"(?:(?:\(([A-Z])\)|\[([A-Z])\]) ?[.:]?|([A-Z]) ?[.:)]|([A-Z]) [-\u2013\u2014]) (\S.*)", re.IGNORECASE
)
"""A letter, what sets it apart, and text."""
_ANOTHER = re.compile(r"(?:or|and|both|nor|not)\b|[,;/&+=<>^*|-]", re.IGNORECASE)
"""With this the text behind a letter goes on to another option, or the letter was the first of a formula."""
_LABEL_WITHIN = re.compile(r"(?:^|[ (\[])([A-Z])[.:)\]]")


def right_letters(answer: str, options: Sequence[str]) -> frozenset[str]:
    """Return the letters of the right option: one, or several where options have the same text.

    Raises UserError where the answer is neither the letter of an option nor the text of one.

    Args:
        answer: of the data: a letter in any of the usual forms, or the text of an option.
        options: their texts, that of A first; none: not known, and every letter may be right.
    """
    letters = letters_named(answer, options)
    if letters:
        return letters
    known = f"one of the {len(options)} options" if options else "an option"
    raise UserError(f"answer {shown(answer)!r}: neither the letter nor the text of {known}: correct the row")


def right_texts(letters: frozenset[str], options: Sequence[str]) -> list[str]:
    """Return the texts of these options, those that say something."""
    texts = (text for letter, text in zip(ascii_uppercase, options, strict=False) if letter in letters)
    return [text for text in dict.fromkeys(texts) if text.strip()]


def letters_named(content: str, options: Sequence[str]) -> frozenset[str]:
    """Return the letters of the option that a text names: none where it names none or more than one.

    A capital letter is a letter whatever the options say; a small one is first looked for among their texts, as answers
    like `a` or `x` are. It takes linear time.

    Args:
        content: of a box, or an answer of the data.
        options: their texts, that of A first; none: not known.
    """
    text = _cleaned(content)
    letters = ascii_uppercase[: len(options)] if options else ascii_uppercase
    bare = _BARE.fullmatch(text)
    letter = _letter(bare) if bare else ""
    if letter.isupper():
        return frozenset(letter) & frozenset(letters)
    plain = _all_plain(tuple(options))
    same = frozenset(name for name, option in zip(letters, plain, strict=False) if option and option == _plain(text))
    if same:
        return same
    if letter:
        return frozenset(letter.upper()) & frozenset(letters)
    labelled = _LABELLED.fullmatch(text)
    if labelled is None:
        return frozenset()
    letter, rest = _letter(labelled).upper(), labelled[5]
    if letter not in letters:
        return frozenset()
    position = letters.index(letter)
    its_own = bool(plain) and plain[position] == _plain(rest)
    return frozenset(letter) if its_own or not _goes_on(letter, rest, plain) else frozenset()


def _goes_on(letter: str, rest: str, plain: Sequence[str]) -> bool:
    """Return whether the text behind a letter is that of another option, or names another letter."""
    if _plain(rest) in plain or _ANOTHER.match(rest):
        return True
    bare = _BARE.fullmatch(rest)
    others = {_letter(bare).upper()} if bare else set()
    return bool((others | set(_LABEL_WITHIN.findall(rest))) - {letter})


def _letter(match: re.Match[str]) -> str:
    """Return the group of the letter that took part: the first ones."""
    return next(group for group in match.groups() if group)


def _cleaned(content: str) -> str:
    """Return a text without LaTeX's fonts, dollar signs, emphasis and quotation marks, with plain single spaces."""
    if len(content) > LONGEST_CONTENT:
        return ""
    text = unicodedata.normalize("NFKC", content).translate(_STOPS).replace("$", "").replace("**", "")
    text = _SPACE.sub(" ", _SIZED.sub("", text))
    for _ in range(NESTED):
        text = _FONT.sub(r"\1", text)
    text = text.strip(" \"'`\u2018\u2019\u201c\u201d")
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    return " ".join(text.split())


@lru_cache(OPTIONS_REMEMBERED)
def _all_plain(options: tuple[str, ...]) -> tuple[str, ...]:
    """Return what _plain makes of options, which come again with every response to their prompt."""
    return tuple(_plain(option) for option in options)


def _plain(text: str) -> str:
    """Return a text as two options are compared: cleaned, without a last full stop and, of more than one character,
    without capitals."""
    text = _cleaned(text).removesuffix(".")
    return text.casefold() if len(text) > 1 else text

"""Which rows of an evaluation set show the same problem: what standard errors are clustered by.

A rule is `row` (each its own), `text` (those with the same text), `block:N` (N rows one after the other, versions of a
problem) or `column:NAME` (those with the same entry there).
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

from megatron_papo.config import PromptSource
from megatron_papo.data.cells import require_unicode
from megatron_papo.data.chat import IMAGE_PLACE
from megatron_papo.data.source_row import BadRow, SourceRow
from megatron_papo.errors import UserError
from megatron_papo.reading import shown

_COLUMN, _BLOCK = "column:", "block:"


def problem_column(source: PromptSource) -> str | None:
    """Return the column whose entries tell the problems of a set apart; None: its rule is another."""
    rule = getattr(source, "problem_by", "row")
    return rule.removeprefix(_COLUMN) if rule.startswith(_COLUMN) else None


def key_of(row: dict, column: str) -> str:
    """Return a row's entry in that column. Raises UserError where it is neither a text nor a whole number."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        seen = ", ".join(shown(name) for name in row)
        raise UserError(
            f"{column} is {shown(repr(value))}, expected a text or a whole number that tells the problem (the columns"
            f" are {seen}): correct problem_by"
        )
    require_unicode(str(value), column)
    return str(value)


def normalised(problem: str) -> str:
    """Return the text of a problem without places of pictures, case, and differences of white space."""
    return " ".join(problem.replace(IMAGE_PLACE, " ").casefold().split())


def with_problems(rows: Iterable[SourceRow | BadRow], rule: str) -> Iterator[SourceRow | BadRow]:
    """Return the rows with their problem_id, by a rule of the module's docstring; `row` and `column:NAME` leave them as
    they are. Rows that a rule does not fit become BadRows."""
    if rule.startswith(_BLOCK):
        yield from _blocks(rows, int(rule.removeprefix(_BLOCK)))
    elif rule == "text":
        for row in rows:
            yield row if isinstance(row, BadRow) else replace(row, problem_id=_digest(normalised(row.problem)))
    else:
        yield from rows


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _blocks(rows: Iterable[SourceRow | BadRow], size: int) -> Iterator[SourceRow | BadRow]:
    """Number blocks of rows from 1. Versions of one problem have one answer: a block with several is none."""
    block: list[SourceRow | BadRow] = []
    number = 0
    for row in rows:
        block.append(row)
        if len(block) == size:
            number += 1
            yield from _block(block, number)
            block = []
    for row in block:
        what = f"one of {len(block)} rows after the last whole block of {size}: add the others, or correct problem_by"
        yield row if isinstance(row, BadRow) else BadRow(row.place, what)


def _block(rows: list[SourceRow | BadRow], number: int) -> Iterator[SourceRow | BadRow]:
    answers = {row.answer: row.place for row in rows if isinstance(row, SourceRow)}
    for row in rows:
        if isinstance(row, BadRow):
            yield row
        elif len(answers) > 1:
            all_of_them = ", ".join(shown(repr(answer), 40) for answer in answers)
            yield BadRow(
                row.place,
                f"block {number} of {len(rows)} rows, to be versions of one problem, has the answers {all_of_them}:"
                " correct problem_by",
            )
        else:
            yield replace(row, problem_id=str(number))

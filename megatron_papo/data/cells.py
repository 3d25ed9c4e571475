"""The cells of a row: texts and pictures, or one line that says what is there instead."""

import math
from decimal import Decimal

from megatron_papo.errors import UserError
from megatron_papo.reading import shown

_CONVERSATIONS = ("conversations", "messages", "conversation")


def text_of(row: dict, column: str, key: str) -> str:
    """Return the text of a column; a number becomes one. Raises UserError for anything else.

    Args:
        row: as the data set has it.
        column: its name.
        key: of the data section that sets it, for the message.
    """
    _require_outermost(row, column)
    if column not in row:
        seen = ", ".join(shown(name) for name in row)
        if set(row) & set(_CONVERSATIONS):
            raise UserError(
                f"no column {column} (there are: {seen}): rows of conversations are not read: make one column of the"
                " problem, one of the answer and one of the pictures"
            )
        raise UserError(f"no column {column} (there are: {seen}): set data.{key}")
    value = row[column]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = value if isinstance(value, float) and not math.isfinite(value) else str(value)
    if isinstance(value, Decimal):
        value = f"{value:f}"
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{column} is {shown(repr(value))}, expected a text: correct or drop the row")
    require_unicode(value, column)
    return value


def require_unicode(text: str, what: str) -> None:
    """Raise UserError where half a surrogate pair stands in a text, which cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not valid Unicode (position {error.start}): correct or drop the row")


def _require_outermost(row: dict, column: str) -> None:
    """Raise UserError where the name of a column means one inside another."""
    outer, _, inner = column.partition(".")
    if inner and column not in row and outer in row:
        raise UserError(
            f"no column {column}: columns inside columns are not read: make {shown(inner)} of {shown(outer)} a column"
            " of its own"
        )


def plain_text_of(row: dict, column: str, what: str = "") -> str:
    """Return the text of a column of a known form. Raises UserError for a number, a list or nothing.

    Args:
        row: or a part of one.
        column: its name.
        what: to call it in messages; "": its name.
    """
    if column not in row:
        raise UserError(f"no {what or column} (there are: {', '.join(shown(name) for name in row)}): set another form")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{what or column} is {shown(repr(value))}, expected a text: correct or drop the row")
    require_unicode(value, what or column)
    return value


def pictures_of(row: dict, column: str) -> list[bytes | str] | None:
    """Return the pictures of a column, a list of them or a single one; None where there is nothing at all."""
    _require_outermost(row, column)
    value = row.get(column)
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    return [picture_of(item, f"{column}[{index}]") for index, item in enumerate(items)]


def picture_of(item: object, place: str) -> bytes | str:
    """Return a picture that is a path, bytes, or {bytes, path}. Raises UserError, which calls it `place`."""
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if not isinstance(item, (bytes, str)) or not item:
        raise UserError(
            f"{place}: expected a path, bytes or {{bytes, path}}, got {shown(repr(item), 60)}: correct or drop the row"
        )
    return item

"""The one door for what comes from outside: files, answers and names that somebody else made.

    with reading(path, "copy the checkpoint again"):
        tree = json.loads(path.read_text())

Inside, only a library or the operating system speaks. Whatever it raises becomes one line that names the file, says in
short what is wrong and what to do. Nothing read here is evaluated: JSON and YAML without constructors, no pickles.
"""

import codecs
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from megatron_papo.errors import UserError

SHORT = 160
"""Characters of a foreign message or name that a line quotes."""
_PANIC = "PanicException"
"""What libraries written in Rust (tokenizers, safetensors) raise for a fault of their own; not an Exception."""
Model = TypeVar("Model", bound=BaseModel)


@contextmanager
def reading(what: object, cure: str) -> Iterator[None]:
    """Turn whatever a reader of outside input raises into a UserError.

    Args:
        what: File, row or address, as the user knows it.
        cure: What to do about it, e.g. "copy the model again".
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise UserError(f"{shown(what)}: {in_short(error)}: {cure}") from error


def in_short(error: BaseException) -> str:
    """Return what an exception says on one line, without the data that some quote."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, ConnectionError):
        return f"cannot be reached ({shown(' '.join(str(error).split()))})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "too large for this machine's memory"
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        return shown(f"{field + ': ' if field else ''}{problem['msg']}")
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at line {error.lineno})"
    text = shown(" ".join(str(error).split()))
    if type(error) is ValueError and text:
        return text
    return f"damaged ({type(error).__name__}{': ' + text if text else ''})"


def shown(text: object, limit: int = SHORT) -> str:
    """Return text from outside as it can be printed: on one line, control and direction characters as escapes, cut to
    `limit` characters (0: not cut)."""
    plain = os.fspath(text) if isinstance(text, os.PathLike) else str(text)
    if limit and len(plain) > limit:
        plain = f"{plain[: limit * 2 // 3]} ... {plain[-limit // 4 :]}"
    if plain.isprintable():
        return plain
    return "".join(character if character.isprintable() else _escape(character) for character in plain)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def read_text(path: Path, cure: str) -> str:
    """Return the text of a UTF-8 file. Raises UserError."""
    with reading(path, cure):
        return Path(path).read_bytes().decode("utf-8")


def read_json(path: Path, cure: str) -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises UserError for anything else, NaN and Infinity included."""
    with reading(path, cure):
        content = Path(path).read_bytes()
        if content.startswith(codecs.BOM_UTF8):
            raise ValueError("begins with a byte order mark, which other readers refuse")
        tree = json.loads(content.decode("utf-8"), parse_constant=refuse_constant)
        if not isinstance(tree, dict):
            raise ValueError(f"a {type(tree).__name__} where an object is expected")
        return tree


def read_record(path: Path, model: type[Model], cure: str) -> Model:
    """Return the JSON object of a file as a typed record. Raises UserError."""
    with reading(path, cure):
        return model.model_validate_json(Path(path).read_bytes())


def refuse_constant(name: str) -> float:
    """Raise ValueError for NaN or Infinity: the argument parse_constant of json.loads."""
    raise ValueError(f"{name} is no number of JSON")

"""Configuration files: YAML -> Config, with `--set section.key=value`, and Config -> YAML.

An unknown key is an error that names the nearest known one; every mistake is one line.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_papo.config import Config, Section, section_type
from megatron_papo.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-6 as a string; this loader reads it as the number that everybody means. A repeated key is an
    error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {str(key) for key in keys if keys.count(key) > 1}
        if repeated:
            raise UserError(f"{node.start_mark.name}: repeated key {', '.join(sorted(repeated))}: keep one")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads YAML, applies `section.key=value` overrides (values are YAML), validates. Raises UserError, one line per
    mistake."""
    path = Path(path)
    try:
        with open(path) as stream:
            tree = yaml.load(stream, _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}")
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections at top level")
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_one_line(path, problem) for problem in error.errors()))


def _apply(tree: dict, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: expected section.key=value")
    *parents, last = name.strip().split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {parent} is not a section")
        tree = child
    try:
        tree[last] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {text!r} is not a YAML value")


def _one_line(path: Path, problem: ErrorDetails) -> str:
    location = problem["loc"]
    key = ".".join(str(part) for part in location) or "configuration"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key {key}: {hint}"
    if problem["type"] == "missing":
        return f"{path}: missing key {key}: add it"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return f"{path}: {key}: {message}{shown}"


def _known_keys(location: tuple) -> list[str]:
    section: type[Section] = Config
    for name in location:
        section = section_type(section.model_fields[name]) or section
    return list(section.model_fields)

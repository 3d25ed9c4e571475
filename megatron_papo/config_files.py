"""Configuration files: YAML -> Config, with `extends` and `--set section.key=value`, and Config -> YAML.

A file may begin with `extends: [published.yaml, dapo.yaml, 7b_8x80gb.yaml]`, names relative to itself. The first is the
base, the others are parts: the parts override the base, the file itself overrides the parts. Two parts may not set the
same key, and none of them may extend anything. Mappings are merged key by key; any other value, null and lists too,
replaces what was there. --set comes last.

An unknown key is an error that names the nearest known one; every mistake is one line that begins with its source.
"""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_papo.config import Config, PromptSource, Section, section_type
from megatron_papo.errors import UserError

EXTENDS = "extends"
DEFAULT = "default"


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration, and where each of its values comes from."""

    config: Config
    sources: dict[str, str]
    """Dotted key, of a leaf or of a section that is null -> the file that sets it, or `--set KEY=VALUE`."""
    base: str | None
    """The first file that the configuration extends."""

    def source_of(self, key: str) -> str:
        """Return what sets a dotted key: a file, a `--set`, or `default`."""
        return _source(self.sources, key) or DEFAULT


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and what it extends, apply `section.key=value` overrides (values are YAML), validate.

    Raises UserError, one line per mistake.
    """
    return resolve_config(path, overrides).config


def resolve_config(path: str | Path, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Do what load_config does, and also say where each value comes from."""
    path = Path(path)
    tree: dict = {}
    sources: dict[str, str] = {}
    layers = list(_layers(path))
    for file, layer in layers:
        _merge(tree, sources, layer, str(file))
    for override in overrides:
        _apply(tree, sources, override)
    try:
        return ResolvedConfig(Config.model_validate(tree), sources, str(layers[0][0]) if len(layers) > 1 else None)
    except ValidationError as error:
        raise UserError(*(_one_line(path, sources, problem) for problem in error.errors()))


def dump_config(config: Config) -> str:
    """Return a configuration as YAML with every key; load_config reads the same configuration from it."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-6 as a string; this loader reads it as the number that everybody means. A repeated key is an
    error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {str(key) for key in keys if keys.count(key) > 1}
        if repeated:
            raise UserError(f"{node.start_mark.name}: repeated key {', '.join(sorted(repeated))}: keep one")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what _Loader would take for a number, and writes text of several lines as a block."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_FLOAT = "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
_Loader.add_implicit_resolver(*_FLOAT)
_Dumper.add_implicit_resolver(*_FLOAT)
_Dumper.add_representer(str, _text)


def _layers(path: Path) -> Iterator[tuple[Path, dict]]:
    """Yield the files that make up a configuration with their contents, each overriding those before it."""
    top = _read(path)
    names = top.pop(EXTENDS, None)
    parts: dict[str, Path] = {}
    for number, file in enumerate(_extended(path, names)):
        tree = _read(file)
        if EXTENDS in tree:
            raise UserError(f"{file}: extends another file, and {path} extends it: only one of the two may")
        if number > 0:
            for key in _leaves(tree):
                other = parts.get(key) or next((parts[known] for known in parts if _nested(known, key)), None)
                if other is not None:
                    raise UserError(f"{path}: both {other} and {file} set {key}: extend one of them, and set it here")
            parts |= dict.fromkeys(_leaves(tree), file)
        yield file, tree
    yield path, top


def _extended(path: Path, names: object) -> list[Path]:
    """Return the files that `extends` of `path` names."""
    if names is None:
        return []
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: extends: expected a list of file names such as [published.yaml, 7b_8x80gb.yaml]")
    return [path.parent / name for name in names]


def _read(path: Path) -> dict:
    """Return the content of one YAML file as a dictionary. Raises UserError, and nothing else."""
    try:
        with open(path, "rb") as stream:
            tree = yaml.load(stream, _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections at top level")
    return tree


def _leaves(tree: dict, prefix: str = "") -> list[str]:
    """Return the dotted names of what a file sets: its values that are no mappings, and its empty mappings."""
    keys: list[str] = []
    for name, value in tree.items():
        keys += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]
    return keys


def _nested(key: str, other: str) -> bool:
    """Say whether one of two dotted keys lies in the section that the other names."""
    return key.startswith(f"{other}.") or other.startswith(f"{key}.")


def _merge(tree: dict, sources: dict[str, str], layer: dict, source: str, prefix: str = "") -> None:
    """Lay one file over `tree`, key by key, and note in `sources` that its values come from `source`."""
    for name, value in layer.items():
        key, old = f"{prefix}{name}", tree.get(name)
        if isinstance(value, dict) and value:
            if not isinstance(old, dict):
                _forget_sources(sources, key)
                tree[name] = {}
            _merge(tree[name], sources, value, source, f"{key}.")
        elif value != {} or not isinstance(old, dict):
            _forget_sources(sources, key)
            tree[name], sources[key] = value, source


def _apply(tree: dict, sources: dict[str, str], override: str) -> None:
    """Lay one `section.key=value` over `tree`."""
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: expected section.key=value")
    names = name.strip().split(".")
    if names[0] == EXTENDS:
        raise UserError(f"--set {override}: only a configuration file can extend others")
    below = tree
    for parent in names[:-1]:
        child = below.get(parent, {})
        if child is not None and not isinstance(child, dict):
            raise UserError(f"--set {override}: {parent} is not a section")
        below = child or {}
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"--set {override}: {text!r} is not a YAML value")
    layer: object = value
    for parent in reversed(names):
        layer = {parent: layer}
    assert isinstance(layer, dict)
    _forget(tree, sources, names)
    _merge(tree, sources, layer, f"--set {override}")


def _forget(tree: dict, sources: dict[str, str], names: list[str]) -> None:
    """Remove a key with all below it: --set replaces a section as a whole, where a file merges into it."""
    for name in names[:-1]:
        child = tree.get(name)
        if not isinstance(child, dict):
            return
        tree = child
    tree.pop(names[-1], None)
    _forget_sources(sources, ".".join(names))


def _forget_sources(sources: dict[str, str], key: str) -> None:
    for known in [known for known in sources if f"{known}.".startswith(f"{key}.")]:
        del sources[known]


def _source(sources: dict[str, str], key: str) -> str | None:
    """Return what sets a key, or the nearest section that it lies in."""
    while key:
        if key in sources:
            return sources[key]
        key = key.rpartition(".")[0]
    return None


def _one_line(path: Path, sources: dict[str, str], problem: ErrorDetails) -> str:
    location = problem["loc"]
    key = ".".join(str(part) for part in location) or "configuration"
    where = _source(sources, key) or next((sources[known] for known in sources if known.startswith(f"{key}.")), path)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key {key}: {hint}"
    if problem["type"] == "missing":
        return f"{path}: missing key {key}: add it"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return f"{where}: {key}: {message}{shown}"


def _known_keys(location: tuple) -> list[str]:
    section: type[Section] = Config
    for name in location:
        section = section_type(section.model_fields[name]) or section
    return list(section.model_fields) + ([] if location else [EXTENDS])


def with_absolute_paths(config: Config, start: Path) -> Config:
    """Return the configuration with the files and directories that it names as absolute paths.

    The name of a Hugging Face data set, which is no path, stays as it is.

    Args:
        config: As it was read.
        start: Directory that relative paths start from.
    """

    def absolute(path: str | None) -> str | None:
        return None if path is None else os.path.abspath(start / Path(path).expanduser())

    def source(of: PromptSource | None) -> PromptSource | None:
        if of is None or of.source == "synthetic":
            return of
        is_path = (start / of.source).exists() or of.source.startswith((".", "/", "~")) or "." in Path(of.source).suffix
        return of.model_copy(update={"source": absolute(of.source)}) if is_path else of

    data = config.data
    sources = {"train": source(data.train), "sft": source(data.sft), "evaluation": source(data.evaluation)}
    python = config.server.python
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": absolute(config.model.path)}),
            "data": data.model_copy(update=sources | {"image_root": absolute(data.image_root)}),
            "server": config.server.model_copy(update={"python": absolute(python) if python else None}),
        }
    )

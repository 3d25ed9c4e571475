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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_papo.config import Config, PromptSource, Section, entry_type, fields_along, kinds_of, section_type
from megatron_papo.errors import UserError
from megatron_papo.reading import reading, shown

EXTENDS = "extends"
DEFAULT = "default"
SourceType = TypeVar("SourceType", PromptSource, PromptSource | None)


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


def resolve_config(path: str | Path, overrides: Sequence[str] = (), below: Path | None = None) -> ResolvedConfig:
    """Do what load_config does, and also say where each value comes from.

    Args:
        path: Of the configuration.
        overrides: `section.key=value`.
        below: A file that the configuration overrides, though it does not extend it: what a part alone lacks.
    """
    path = Path(path)
    tree: dict = {}
    sources: dict[str, str] = {}
    layers = [*([] if below is None else _layers(below)), *_layers(path)]
    for file, layer in layers:
        _merge(tree, sources, layer, str(file))
    for override in overrides:
        _apply(tree, sources, override)
    try:
        return ResolvedConfig(Config.model_validate(tree), sources, str(layers[0][0]) if len(layers) > 1 else None)
    except ValidationError as error:
        raise UserError(*(line for problem in error.errors() for line in _lines(path, sources, problem)))


def dump_config(config: Config) -> str:
    """Return a configuration as YAML with every key; load_config reads the same configuration from it."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Loader(yaml.SafeLoader):
    """YAML as everybody means it: 1e-6 is a number, 010 and 1:30 are none, 2024-01-01 is text. A repeated key is an
    error, and so is an alias, by which a small file can hold a large one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {str(key) for key in keys if keys.count(key) > 1}
        if repeated:
            raise UserError(f"{node.start_mark.name}: repeated key {', '.join(sorted(repeated))}: keep one")
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"*{self.peek_event().anchor} stands for another value: write that out")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes what _Loader would take for a number, and writes text of several lines as a block."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_TAG = "tag:yaml.org,2002:"
_INT = f"{_TAG}int", re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
_FLOAT = (
    f"{_TAG}float",
    re.compile(
        r"^[-+]?((\d[\d_]*)?\.\d+([eE][-+]?\d+)?|\d[\d_]*\.?([eE][-+]?\d+)|\d[\d_]*\.|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, words) for tag, words in known if tag in (f"{_TAG}null", f"{_TAG}bool", f"{_TAG}merge")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(*_INT)
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
    with reading(path, "correct the configuration, or give another file"):
        loader = _Loader(path.read_bytes())
        loader.name = str(path)
        tree = _construct(loader, lambda node: _take_for(node, Config))
        if not isinstance(tree, dict):
            raise ValueError("expected a mapping of sections at top level")
        return tree


def _construct(loader: _Loader, take: Callable[[yaml.Node], None]) -> object:
    """Return what a document holds. take: sets the tags of its nodes to what the schema says they are."""
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        take(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" at line {error.problem_mark.line + 1}"
        raise ValueError(f"not YAML ({error.problem}{line})")


def _take_for(node: yaml.Node, section: type[Section] | None) -> None:
    """Set the tags of the plain scalars in a section to what its keys hold.

    Text is text, also where YAML has another meaning for it (off, 1, 2024-01-01); 1e3 is a whole number where one is
    wanted.
    """
    if section is None or not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        field = section.model_fields.get(key.value) if isinstance(key, yaml.ScalarNode) else None
        if field is not None:
            _take_value_for(value, field)


def _take_value_for(node: yaml.Node, field: FieldInfo) -> None:
    if isinstance(node, yaml.ScalarNode):
        _take_scalar_for(node, kinds_of(field))
    elif isinstance(node, yaml.SequenceNode) and field.annotation in (list[str], list[str] | None):
        for part in node.value:
            if isinstance(part, yaml.ScalarNode):
                _take_scalar_for(part, {str})
    elif (entry := entry_type(field)) is not None and isinstance(node, yaml.MappingNode):
        for _, section in node.value:
            _take_for(section, entry)
    else:
        _take_for(node, section_type(field))


def _take_scalar_for(node: yaml.ScalarNode, kinds: set[type]) -> None:
    if node.style is None and str in kinds and node.tag != f"{_TAG}null":
        node.tag = f"{_TAG}str"
    elif node.style is None and int in kinds and float not in kinds and node.tag == f"{_TAG}float":
        number = float(node.value.replace("_", ""))
        if number.is_integer() and abs(number) < 1 << 53:  # beyond, not every whole number is a float
            node.tag, node.value = f"{_TAG}int", str(int(number))


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
    override = shown(override)
    names = name.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"--set {override}: expected section.key=value")
    if names[0] == EXTENDS:
        raise UserError(f"--set {override}: only a configuration file can extend others")
    below = tree
    for parent in names[:-1]:
        child = below.get(parent, {})
        if child is not None and not isinstance(child, dict):
            raise UserError(f"--set {override}: {parent} is not a section")
        below = child or {}
    layer: object = _value(override, names, text)
    for parent in reversed(names):
        layer = {parent: layer}
    assert isinstance(layer, dict)
    _forget(tree, sources, names)
    _merge(tree, sources, layer, f"--set {override}")


def _value(override: str, names: list[str], text: str) -> object:
    """Return the value of `--set NAMES=TEXT`. For a key that holds text it is the text as it stands, unless that is
    quoted, or null where the key may be so; everything else is YAML."""
    try:
        field = fields_along(".".join(names))[-1]
    except KeyError:  # pydantic says so later, with the nearest key
        field = None
    words = text.strip()
    if field is not None and str in kinds_of(field) and words[:1] not in ("'", '"', "|", ">"):
        is_null = words in ("", "~", "null", "Null", "NULL")
        return None if is_null and type(None) in kinds_of(field) else words
    with reading(f"--set {override}", f"the value is YAML: quote text, e.g. --set '{shown(names[-1])}=\"...\"'"):
        return _construct(_Loader(text), lambda node: None if field is None else _take_value_for(node, field))


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


def _lines(path: Path, sources: dict[str, str], problem: ErrorDetails) -> list[str]:
    """Return what is wrong with a key, or with several that contradict each other, each on a line of its own."""
    location = tuple(part for part in problem["loc"] if part != "[key]")
    key = shown(".".join(str(part) for part in location)) or "configuration"
    where = _source(sources, key) or next((sources[known] for known in sources if known.startswith(f"{key}.")), path)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        nearest = difflib.get_close_matches(str(location[-1])[:100], known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(known)}"
        return [f"{where}: unknown key {key}: {hint}"]
    if problem["type"] == "missing":
        return [f"{path}: missing key {key}: add it"]
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    got = f" (got {shown(repr(given))})" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return [f"{where}: {key}: {line}{got}" for line in message.splitlines()]


def _known_keys(location: tuple) -> list[str]:
    section: type[Section] = Config
    names = iter(location)
    for name in names:
        field = section.model_fields[name]
        section = section_type(field) or entry_type(field) or section
        if entry_type(field) is not None:
            next(names, None)
    return list(section.model_fields) + ([] if location else [EXTENDS])


def with_absolute_paths(config: Config, start: Path) -> Config:
    """Return the configuration with the files and directories that it names as absolute paths.

    The name of a Hugging Face data set, which is no path, stays as it is.

    Args:
        config: As it was read.
        start: Directory that relative paths start from.
    """

    def absolute(path: str | None) -> str | None:
        return None if path is None else os.path.abspath(start / path)

    def source(of: SourceType) -> SourceType:
        if of is None or of.source == "synthetic":
            return of
        is_path = (start / of.source).exists() or of.source.startswith((".", "/")) or "." in Path(of.source).suffix
        return of.model_copy(update={"source": absolute(of.source)}) if is_path else of

    data = config.data
    sources = {"train": source(data.train), "sft": source(data.sft), "evaluation": source(data.evaluation)}
    python, evaluation = config.server.python, config.evaluation
    benchmarks = {name: source(entry) for name, entry in evaluation.benchmarks.items()}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": absolute(config.model.path)}),
            "data": data.model_copy(update=sources | {"image_root": absolute(data.image_root)}),
            "server": config.server.model_copy(update={"python": absolute(python) if python else None}),
            "evaluation": evaluation.model_copy(
                update={"benchmarks": benchmarks, "source": absolute(evaluation.source)}
            ),
        }
    )

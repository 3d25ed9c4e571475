"""A view of the configuration through which a stage reads the keys that it lists, and no other.

    config = view(load_config(path), ["seed", "rollout", "data.min_pixels"], "stage4_rollout")
    config.data.min_pixels          # as in the whole configuration
    config.data.max_pixels          # KeyNotListed

What a stage reads without listing it would be missing from its fingerprint: hence an error at once.
"""

from collections.abc import Sequence
from functools import cache
from types import new_class
from typing import Any, TypeVar, cast

from pydantic import ConfigDict

from megatron_papo.config import Config, Section, fields_along

SectionType = TypeVar("SectionType", bound=Section)

_STAGE, _PREFIX = "_stage", "_prefix"


class KeyNotListed(Exception):
    """A mistake in the program, not in the configuration: a stage reads a key that it does not list.

    No AttributeError, so that neither hasattr nor a default of getattr swallows it.
    """


def view(config: Config, keys: Sequence[str], stage: str) -> Config:
    """Return `config` as far as `keys` go; any other key raises KeyNotListed when it is read.

    A section that is listed whole is the section of `config` itself. One that is listed in part has the listed keys
    and all its properties, which work where they reach listed keys only. Whether a section is null may be asked as soon
    as any of its keys is listed.

    Args:
        config: The whole configuration.
        keys: Dotted names of leaves and sections. One that the schema lacks is a KeyError.
        stage: Whose keys these are, for the error.
    """
    for key in keys:
        fields_along(key)
    return _part(config, frozenset(keys), stage, "")


def _part(section: SectionType, keys: frozenset[str], stage: str, prefix: str) -> SectionType:
    """Return the view of one section; `prefix`: its dotted name and a dot, "" for the whole configuration."""
    listed: dict[str, object] = {_STAGE: stage, _PREFIX: prefix}
    for name in type(section).model_fields:
        key, value = prefix + name, getattr(section, name)
        if key in keys:
            listed[name] = value
        elif any(other.startswith(f"{key}.") for other in keys):
            listed[name] = _part(value, keys, stage, f"{key}.") if isinstance(value, Section) else value
    part = object.__new__(_part_type(type(section)))
    object.__setattr__(part, "__dict__", listed)
    object.__setattr__(part, "__pydantic_fields_set__", set(listed) - {_STAGE, _PREFIX})
    object.__setattr__(part, "__pydantic_extra__", None)
    object.__setattr__(part, "__pydantic_private__", None)
    return part


@cache
def _part_type(section: type[SectionType]) -> type[SectionType]:
    """Return the subclass of a section's type whose instances hold only some of its keys."""

    def refuse(self: Section, name: str) -> KeyNotListed:
        where = vars(self)
        return KeyNotListed(
            f"{where[_STAGE]} reads {where[_PREFIX]}{name}, which its entry in the table of stages does not list"
        )

    def read(self: Section, name: str) -> Any:
        """Python asks here for what the instance does not hold."""
        if name in section.model_fields:
            raise refuse(self, name)
        raise AttributeError(f"{section.__name__} has no {name}")

    def read_whole(self: Section, *_: object, **__: object) -> Any:
        """Stand for what needs every key of the section."""
        raise refuse(self, next(name for name in section.model_fields if name not in vars(self)))

    def describe(self: Section) -> str:
        where = vars(self)
        listed = sorted(name for name in where if name in section.model_fields)
        return f"<{section.__name__} as {where[_STAGE]} may read it: {', '.join(listed)}>"

    whole = ("model_dump", "model_dump_json", "model_copy", "__iter__", "__eq__")
    body: dict[str, object] = dict.fromkeys(whole, read_whole)
    body |= {"__getattr__": read, "__repr__": describe, "__str__": describe, "__hash__": None}
    body |= {"model_config": ConfigDict(defer_build=True), "__module__": __name__}
    return cast(
        "type[SectionType]", new_class(f"PartOf{section.__name__}", (section,), {}, lambda names: names.update(body))
    )

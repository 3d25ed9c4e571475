"""The records beside an output: manifest.json, which says what made it from what, and pruned.json, which says that its
weights were deleted. Read here and nowhere else."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from megatron_papo.errors import UserError
from megatron_papo.reading import read_record, reading

MANIFEST = "manifest.json"
PRUNED = "pruned.json"
"""In a checkpoint whose weights keep_checkpoints or keep_exports has deleted: what it was stays on record."""
LONGEST_NAME = 255
"""Bytes that a file system takes as the name of a file."""


def _is_inside(name: str) -> str:
    path = PurePosixPath(name)
    if name != str(path) or path.is_absolute() or ".." in path.parts or "\0" in name or name == ".":
        raise ValueError("not the name of a file below the directory")
    if any(len(part.encode("utf-8", "surrogateescape")) > LONGEST_NAME for part in path.parts):
        raise ValueError("a name too long for any file")
    return name


FileName = Annotated[str, AfterValidator(_is_inside)]
"""Of a file below the directory of the record, with slashes."""
Key = Literal["keep_checkpoints", "keep_exports", "checkpoint_every"]


class Entry(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class FileEntry(Entry):
    """One file of an output."""

    bytes: int = Field(ge=0)
    sha256: str


class Recipe(Entry):
    """What decides an output."""

    stage: str = ""
    config: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    """Fingerprints, by name."""


class Manifest(Entry):
    """manifest.json of a published output."""

    stage: str
    fingerprint: str = Field(min_length=1)
    """sha256 of the recipe."""
    recipe: Recipe = Recipe()
    inputs: dict[str, str] = {}
    """Where the inputs were, by name."""
    command: str = ""
    counts: dict[str, Any] = {}
    seconds: float = Field(default=0.0, ge=0)
    git_commit: str | None = None
    packages: dict[str, str | None] = {}
    files: dict[FileName, FileEntry]


class Pruned(Entry):
    """pruned.json of a checkpoint or export whose weights were deleted."""

    reason: str = ""
    key: Key
    """The key of the configuration that asked for it."""
    when: str = ""


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of a published output; None where there is none. Raises UserError where it is damaged."""
    path = Path(directory) / MANIFEST
    with reading(path, "choose a directory that can be read"):
        if not path.is_file():
            return None
    return read_record(path, Manifest, f"damaged manifest: remove {directory} and make it again")


def require_weights(directory: Path) -> None:
    """Raise UserError, naming the key to raise, where the weights of a checkpoint or export were deleted."""
    path = Path(directory) / PRUNED
    with reading(path, "choose a directory that can be read"):
        if not path.exists():
            return
    key = read_record(path, Pruned, f"make {directory} again").key
    cure = f"raise {key}"
    if key == "checkpoint_every":
        cure = "go on with run_all.sh --resident, which needs none of them, or lower checkpoint_every"
    raise UserError(f"{directory}: its weights were deleted ({PRUNED} says when and why): {cure}, or make it again")

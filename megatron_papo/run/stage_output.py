"""Stage outputs: a directory that appears whole or not at all, with a manifest that says what made it from what.

A stage works in `<output>.partial`; when it is finished every file is hashed and fsynced, manifest.json is written
last, and one atomic rename publishes the directory. A killed stage leaves at most a `.partial`, which the next attempt
removes.

    fingerprint = sha256(stage, the configuration sections it reads, its arguments, its inputs' fingerprints)

An output that carries the fingerprint already is done; one with another fingerprint is refused, never overwritten.
"""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_papo.errors import UserError
from megatron_papo.reading import reading
from megatron_papo.run.console import Item, counted, progress_bar
from megatron_papo.run.describing import (
    command_line,
    git_commit,
    package_versions,
    process_start,
    seconds_since,
)
from megatron_papo.run.manifest import MANIFEST, PRUNED, FileEntry, Manifest, Recipe, read_manifest, require_weights
from megatron_papo.run.output_lock import OutputLock
from megatron_papo.run.room import refusal, sync_directory
from megatron_papo.run.run_config import RECORD

MARK = ".made-by-megatron-papo"
"""In a .partial: it is ours, and may be removed."""
MANY_FILES = 1000
"""From so many files on, hashing them is shown."""

__all__ = ["MANIFEST", "PRUNED", "Input", "StageOutput", "read_manifest", "require_weights"]


def file_hash(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_fingerprint(path: Path, known: dict[str, str] | None = None) -> str:
    """Of a file or directory that no stage made: its relative names and contents. known: relative name -> sha256, where
    it is known already."""
    with reading(path, "copy it again, or correct its permissions"):
        if path.is_file():
            return file_hash(path)
        known = known or {}
        rows = [
            (name, known.get(name) or file_hash(path / name))
            for name in (str(file.relative_to(path)) for file in _files(path))
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@dataclass(frozen=True)
class Input:
    """What an output is made from: where it is, and what tells it apart from another one."""

    path: Path | None
    """None: nothing on disk (a data set by name)."""
    fingerprint: str
    verify: bool = True
    """Compare the files with their manifest before the stage uses them. False: this process has done so, or made
    them."""


def require_input(path: Path, made_by: tuple[str, ...], hint: str) -> Input:
    """Return an input that one of the stages `made_by` must have published. Raises UserError if it is missing or
    foreign.

    Only the manifest is read here: the files are verified when a stage that is not done yet enters its StageOutput.

    Args:
        path: Directory of the output.
        made_by: Names of the stages that may have made it.
        hint: The command that makes it, shown in the error.
    """
    if not path.exists():
        partial = " (only an unfinished .partial is there)" if partial_of(path).exists() else ""
        raise UserError(f"{path}: not there{partial}: make it with: {hint}")
    manifest = read_manifest(path)
    if manifest is None or manifest.stage not in made_by:
        maker = "no manifest.json" if manifest is None else f"made by {manifest.stage}"
        raise UserError(f"{path}: {maker}, expected the output of {' or '.join(made_by)}: make it with: {hint}")
    return Input(path, manifest.fingerprint)


def input_made_or_from_outside(path: Path, hint: str, outside: Callable[[Path], str] = content_fingerprint) -> Input:
    """Return an input that a stage made (told apart by its manifest) or that comes from outside (by its content).

    Raises UserError if it is not there.

    Args:
        path: File or directory.
        hint: What to do where it is missing.
        outside: Returns the fingerprint of something that no stage made.
    """
    if not path.exists():
        raise UserError(f"{path}: not there: {hint}")
    manifest = read_manifest(path) if path.is_dir() else None
    return Input(path, outside(path) if manifest is None else manifest.fingerprint)


def verify_files(directory: Path, known: dict[str, str] | None = None, only_sizes: tuple[str, ...] = ()) -> None:
    """Compares every file of a published output with its manifest, by size and hash. Nothing to compare without a
    manifest.

    known: relative name -> sha256, of files that were hashed already. only_sizes: endings of names that are compared by
    size alone.
    """
    manifest = read_manifest(directory) if directory.is_dir() else None
    if manifest is None:
        return
    require_weights(directory)
    known = known or {}
    again = f"remove {directory} and make it again with: {command_again(directory, manifest)}"
    for name in _shown_if_many(list(manifest.files), f"{directory}: verify"):
        file, entry = directory / name, manifest.files[name]
        with reading(file, again):
            if not file.is_file():
                raise UserError(f"{file}: missing from the checkpoint or data directory, damaged: {again}")
            same = file.stat().st_size == entry.bytes
            by_size = name.endswith(only_sizes)
            if not same or not (by_size or (known.get(name) or file_hash(file)) == entry.sha256):
                raise UserError(f"{file}: differs from its manifest, damaged: {again}")


def command_again(directory: Path, manifest: Manifest) -> str:
    """Return the command that made an output; of a run that has been renamed or moved since, with its new place."""
    words = shlex.split(manifest.command)
    root = next((parent for parent in directory.parents if (parent / RECORD).is_file()), None)
    if root is not None and "--run" in words[:-1]:
        words[words.index("--run") + 1] = str(root)
    return shlex.join(words)


class StageOutput:
    """One stage's output directory.

    out = StageOutput("stage4_rollout", output, values_at(config, ["seed", "rollout"]), {"data": require_input(...)})
    if out.done:
        return
    with out:                                  # verifies the inputs' files, makes out.partial
        ... write files below out.partial ...
        out.counts["rollouts"] = n
                                               # leaving publishes; an exception removes out.partial
    """

    def __init__(
        self,
        stage: str,
        output: Path,
        values: Mapping[str, object],
        inputs: Mapping[str, Input],
        arguments: Mapping[str, object] | None = None,
        started: float | None = None,
        replaces: Callable[[dict[str, Any], dict[str, Any]], bool] | None = None,
    ):
        """Compare what is to be made with what is there. Raises UserError if that was made from something else.

        Args:
            stage: Its name, e.g. "stage4_rollout".
            output: The directory to make.
            values: The configuration keys that decide the result, with their values as plain data.
            inputs: What it is made from, by name.
            arguments: Anything else that decides the result (an iteration number).
            started: time.time() from which the manifest's seconds count; None: the start of this process.
            replaces: Says of two recipes, of what is there and of what is to be made, whether the second takes the
                place of the first; that stays until the other is complete. None: never.
        """
        self._replaces, self._is_replacing = replaces, False
        self.stage, self.output = stage, require_place(Path(output))
        self.partial = partial_of(self.output)
        self.counts: dict[str, Any] = {}
        self.hashes: dict[str, str] = {}
        """Relative name -> sha256, of files below .partial whose writer has hashed them; the others are hashed when
        they are published."""
        self.inputs = dict(inputs)
        self.started = process_start() if started is None else started
        self._recipe: dict[str, Any] = {
            "stage": stage,
            "config": nested(values),
            "arguments": dict(arguments or {}),
            "inputs": {name: made_from.fingerprint for name, made_from in inputs.items()},
        }
        self.fingerprint = self._hash_recipe()
        self.done = self._is_done()

    def _hash_recipe(self) -> str:
        return hashlib.sha256(json.dumps(self._recipe, sort_keys=True).encode()).hexdigest()

    def complete_input(self, name: str, fingerprint: str) -> None:
        """Sets the fingerprint of an input that became known while the input was read."""
        self._recipe["inputs"][name] = fingerprint
        self.fingerprint = self._hash_recipe()

    def _is_done(self) -> bool:
        if not self.output.exists():
            return False
        manifest = read_manifest(self.output)
        if manifest is None:
            raise UserError(
                f"{self.output}: exists and is not an output of this pipeline: remove it, or choose another --output"
            )
        if manifest.fingerprint != self.fingerprint:
            made, changed = manifest.recipe.model_dump(), differences(manifest.recipe.model_dump(), self._recipe)
            if self._replaces is not None and self._replaces(made, self._recipe):
                self._is_replacing = True
                return False
            raise UserError(
                f"{self.output}: made from something else ({changed}): remove it or choose another --output (or --name)"
            )
        return True

    def announce_done(self) -> None:
        """Say that there is nothing to do; where an input has moved since, its new place is put on record."""
        self._record_places()
        print(f"{self.stage}: {self.output} is there already, made from the same inputs: nothing to do", flush=True)

    def _record_places(self) -> None:
        manifest = read_manifest(self.output)
        places = _places(self.inputs)
        if manifest is None or manifest.inputs == places:
            return
        partial = self.output / f"{MANIFEST}.partial"
        try:
            partial.write_text(_as_json(manifest.model_copy(update={"inputs": places})))
            partial.replace(self.output / MANIFEST)
        except OSError:  # a read-only or full place: it is compared by content again next time
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def __enter__(self):
        for path in {made_from.path for made_from in self.inputs.values() if made_from.verify and made_from.path}:
            verify_files(path)
        self._lock = OutputLock(self.output)
        try:
            if self._is_done():  # another process made it in the meantime
                raise UserError(f"{self.output}: was made by another process just now: nothing left to do")
            _remove_partial(self.partial)
            self.partial.mkdir(parents=True)
            (self.partial / MARK).touch()
        except OSError as error:
            self._lock.release()
            raise UserError(f"{self.partial}: cannot create: {error.strerror}")
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self._publish()
            elif not isinstance(error, UserError) and (why := refusal(error)) is not None:
                raise self._refused(why)
        except OSError as refused:
            kind = type(refused)
            raise self._refused(refused.strerror or str(refused))
        except BaseException as ended:
            kind = type(ended)
            raise
        finally:
            if kind is not None:
                shutil.rmtree(self.partial, ignore_errors=True)
            self._lock.release()
        return False

    def _refused(self, why: str) -> UserError:
        return UserError(
            f"{self.output}: cannot write: {why}: nothing was left behind; free space there, or choose another --output"
        )

    def _publish(self) -> None:
        files: dict[str, FileEntry] = {}
        paths = [file for file in _files(self.partial) if file != self.partial / MARK]
        for file in _shown_if_many(paths, f"{self.output}: hash"):
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
            name = str(file.relative_to(self.partial))
            files[name] = FileEntry(bytes=file.stat().st_size, sha256=self.hashes.get(name) or file_hash(file))
        manifest = Manifest(
            stage=self.stage,
            fingerprint=self.fingerprint,
            recipe=Recipe(**self._recipe),
            inputs=_places(self.inputs),
            command=command_line(),
            counts=self.counts,
            seconds=seconds_since(self.started),
            git_commit=git_commit(),
            packages=package_versions(),
            files=files,
        )
        path = self.partial / MANIFEST
        with open(path, "w") as stream:
            stream.write(_as_json(manifest))
            stream.flush()
            os.fsync(stream.fileno())
        for directory in {file.parent for file in _files(self.partial)}:
            sync_directory(directory)
        replaced = partial_of(self.output.with_name(self.output.name + ".replaced"))
        shutil.rmtree(replaced, ignore_errors=True)
        if self._is_replacing and self.output.exists():  # what else has come into its place stays, and is an error
            os.rename(self.output, replaced)
        os.rename(self.partial, self.output)
        (self.output / MARK).unlink()
        sync_directory(self.output.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def _as_json(manifest: Manifest) -> str:
    """Return a manifest as it is written: with names that are no UTF-8, which pydantic's own writer refuses."""
    return json.dumps(manifest.model_dump(), indent=1)


def _shown_if_many(items: list[Item], title: str) -> Iterator[Item]:
    """Yield the items, with a progress bar where there are many."""
    if len(items) < MANY_FILES:
        yield from items
        return
    with progress_bar(len(items), title, "files") as bar:
        yield from counted(items, bar)


def _places(inputs: Mapping[str, Input]) -> dict[str, str]:
    return {name: str(made_from.path) for name, made_from in inputs.items() if made_from.path}


def require_place(output: Path) -> Path:
    """Return an output's path. Raises UserError for one at which no directory can be, or none beside others."""
    if output.name in ("", ".."):
        raise UserError(f"--output {output}: name a directory to make, e.g. {output / 'checkpoint'}")
    with reading(output, "choose another --output"):
        with suppress(FileNotFoundError):
            partial_of(interim_of(output)).lstat()  # the longest of the names beside it
        if os.path.lexists(output) and not output.is_dir():
            what = "a link to nothing" if output.is_symlink() and not output.exists() else "not a directory"
            raise UserError(f"{output}: {what}: choose another --output (or --name)")
    return output


def partial_of(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _remove_partial(partial: Path) -> None:
    """Remove what a killed attempt left, the mark last. Raises UserError for a directory that is somebody's own."""
    if not partial.is_symlink() and not partial.exists():
        return
    if partial.is_symlink() or not partial.is_dir() or (any(partial.iterdir()) and not (partial / MARK).is_file()):
        raise UserError(
            f"{partial}: is in the way, and not of this pipeline's making ({MARK} is missing): move or remove it"
        )
    for child in partial.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child, ignore_errors=True)
        elif child.name != MARK:
            child.unlink()
    shutil.rmtree(partial, ignore_errors=True)


def samples_of(output: Path) -> Path:
    """Return the file that keeps the samples of an output until it is published (sglang/sample_store.py)."""
    return output.with_name(output.name + ".samples.jsonl")


def interim_of(output: Path) -> Path:
    """Return the checkpoint from which training goes on that was asked to end (training/interim.py)."""
    return output.with_name(output.name + ".interim")


def _files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob("*") if file.is_file())


def nested(values: Mapping[str, object]) -> dict[str, Any]:
    """{"data.min_pixels": 3} -> {"data": {"min_pixels": 3}}."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, leaf = key.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[leaf] = value
    return tree


def differences(old: dict, new: dict, prefix: str = "") -> str:
    """The dotted keys in which two recipes differ, at most five."""

    def walk(a, b, name):
        if isinstance(a, dict) and isinstance(b, dict):
            return [row for key in sorted(a.keys() | b.keys()) for row in walk(a.get(key), b.get(key), f"{name}.{key}")]
        return [] if a == b else [name.lstrip(".")]

    rows = walk(old, new, prefix)
    return "differs in " + ", ".join(rows[:5]) + (", ..." if len(rows) > 5 else "")

"""The configuration that a run directory owns: written when the run starts, read by every stage, changed only where it
may.

config.yaml is for people and for stages; .config.yaml beside it is the record by which an edit by hand is noticed.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_papo.config import Change, Config, changes, is_place
from megatron_papo.config_files import dump_config, load_config, resolve_config, with_absolute_paths
from megatron_papo.errors import UserError
from megatron_papo.reading import read_text, reading, shown
from megatron_papo.run.describing import describes
from megatron_papo.run.room import cannot_write, replace_file
from megatron_papo.run.run_directory import RunDirectory

CONFIG = "config.yaml"
RECORD = ".config.yaml"
OUTPUTS = ("data", "evaluation", "iterations", "reference", "sft")
"""What stands in a run directory as soon as anything has been made."""


def open_run(root: Path, overrides: Sequence[str] = ()) -> RunDirectory:
    """Return a run that was started, with `--set` of living keys for this process alone.

    Raises UserError for a directory that is no run, and for frozen keys or places that are not those of the run.
    """
    config = load_config(_existing(root), list(overrides))
    differences = changes(_recorded(root), config)
    _refuse_frozen(root, differences)
    moved = [change.key for change in differences if is_place(change.key)]
    if moved:
        raise UserError(
            f"{root}: {', '.join(moved)} changed since the run was last started: start it with bash run_all.sh --name"
            f" {root.name}, which checks that the same data and model lie there"
        )
    return RunDirectory(root, config)


def _refuse_what_is_no_directory(root: Path) -> None:
    with reading(root, "choose another --name"):
        if (root.exists() or root.is_symlink()) and not root.is_dir():
            raise UserError(f"{root}: is no directory: choose another --name, or move it away")


def settle_run(
    root: Path,
    default: Path,
    given: Path | None,
    overrides: Sequence[str],
    caller: Path,
    *,
    below: Path | None = None,
    option: str = "--name",
) -> tuple[RunDirectory, list[Change]]:
    """Return the run with the configuration that a start asks for, and what changes by it. Nothing is written.

    Raises UserError, one line per key, if a frozen key would change once anything has been made.

    Args:
        root: The run's directory, there or not.
        default: Configuration of a new run that names none.
        given: The configuration file on the command line, if any; of an existing run its own is the default.
        overrides: `section.key=value`.
        caller: Directory that relative paths in the configuration start from.
        below: What `given`, a part of a configuration, lacks.
        option: By which another directory is chosen.
    """
    _refuse_what_is_no_directory(root)
    if not (root / CONFIG).exists():
        _refuse_older_layout(root)
        return RunDirectory(
            root, with_absolute_paths(resolve_config(given or default, overrides, below).config, caller)
        ), []
    config = with_absolute_paths(resolve_config(given or root / CONFIG, overrides, below).config, caller)
    recorded = _recorded(root)
    if not any((root / name).exists() for name in OUTPUTS):  # nothing was made by the old values
        return RunDirectory(root, config), changes(recorded, config)
    by_hand = changes(recorded, load_config(root / CONFIG)) if given is None else []
    _refuse_frozen(root, by_hand, "edited by hand: put the old value back, or ", option)
    differences = changes(recorded, config)
    _refuse_frozen(root, differences, option=option)
    return RunDirectory(root, config), differences


def write_run(run: RunDirectory, differences: Sequence[Change], command: str) -> None:
    """Write the configuration of a run that starts, or what changed in it; the log says so."""
    try:
        run.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(run.root, error.strerror or str(error))
    is_new = not (run.root / CONFIG).exists()
    if not is_new and not differences:
        return
    _empty_memory(run, is_new)
    heading = (
        f"# The configuration of this run, every key. Started with: {shown(command, limit=0)}\n"
        "# Keys that may change while a run lives are changed with --set: .venv/bin/python -m tools.show_config"
        " --living says which.\n"
    )
    if not is_new:
        text = read_text(run.root / CONFIG, "restore it from .config.yaml beside it")
        heading = "".join(line for line in text.splitlines(True)[:2] if line.startswith("#"))
    text = heading + dump_config(run.config)
    for name in (RECORD, CONFIG):  # without config.yaml there is no run yet
        replace_file(run.root / name, text)
    with describes(run.log), open(run.log, "a", encoding="utf-8", errors="backslashreplace") as log:
        if is_new:
            log.write(f"{now()} run: started with: {shown(command, limit=0)}\n")
        log.writelines(
            f"{now()} run: {change.key}: {shown(change.old, limit=0)} -> {shown(change.new, limit=0)}\n"
            for change in differences
        )


def _empty_memory(run: RunDirectory, is_new: bool) -> None:
    """Remove what lies below export_directory of an earlier run in this place, or where the key was another one."""
    before = run if is_new else RunDirectory(run.root, _recorded(run.root))
    if before.memory is not None and (is_new or before.memory != run.memory):
        shutil.rmtree(before.memory, ignore_errors=True)


def now() -> str:
    """Return the time as the log writes it."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _existing(root: Path) -> Path:
    _refuse_what_is_no_directory(root)
    if not (root / CONFIG).is_file():
        _refuse_older_layout(root)
        raise UserError(
            f"{root}: no run ({CONFIG} is missing): start one with bash run_all.sh --config FILE --name {root.name}"
        )
    return root / CONFIG


def _refuse_older_layout(root: Path) -> None:
    parts = [name for name in OUTPUTS if (root / name).exists()]
    if parts:
        raise UserError(
            f"{root}: holds {', '.join(parts)} but no {CONFIG}: a run of an older version, which this one cannot"
            " continue:"
            " finish it with that version, or choose another --name"
        )


def _recorded(root: Path) -> Config:
    if not (root / RECORD).is_file():
        raise UserError(
            f"{root / RECORD}: missing: the record of the run's configuration: restore it, or choose another --name"
        )
    return load_config(root / RECORD)


def _refuse_frozen(root: Path, differences: Sequence[Change], cure: str = "", option: str = "--name") -> None:
    lines = [
        f"{root}: {change.key} is {change.old} in this run, not {change.new}: {cure}choose another {option}"
        for change in differences
        if not change.living
    ]
    if lines:
        raise UserError(*lines)

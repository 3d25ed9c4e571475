"""Deletes the weights of a run's older Megatron checkpoints and exports, as keep_checkpoints and keep_exports of the
configuration say.

Nothing is deleted before the newest is complete. What the hacking guard may go back to is kept, and what keep_best
holds. What was deleted leaves its manifest, everything but weights, and pruned.json: its stage counts as done, and who
asks for its weights is told which key to raise. An interim checkpoint (training/interim.py) goes without a trace.
"""

import shutil
import time
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

from megatron_papo.checkpoint.proof import require_proof
from megatron_papo.errors import UserError
from megatron_papo.reading import read_record
from megatron_papo.run.manifest import MANIFEST, PRUNED, Key, Pruned, read_manifest
from megatron_papo.run.records import Metrics
from megatron_papo.run.room import replace_file
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stage_output import interim_of, partial_of
from megatron_papo.run.state import needed_exports

WEIGHTS = ("*.distcp", ".metadata", "common.pt", "metadata.json", "*.safetensors")
"""What a checkpoint or an export loses."""
WEIGHTS_ALONE = "weights_alone"
"""In the counts of a checkpoint without optimizer, which lies between two whole ones of a resident run."""
NONE: AbstractSet[int] = frozenset()


def kept_checkpoints(
    newest: int, saved: list[int], keep: int | None, rollback_iterations: int, best: AbstractSet[int] = NONE
) -> set[int]:
    """Return those of the iterations `saved` whose Megatron checkpoint stays.

    The newest `keep`; whatever the hacking guard may go back to; the best; and what is newer than `newest` altogether.
    Iteration i + 1 may go back to the last saved one that is at least rollback_iterations older than i.

    Args:
        newest: the iteration that is finished; the run goes on from the last one saved up to it.
        saved: iterations with a checkpoint, in any order; not every iteration need have one.
        keep: how many; None: all.
        rollback_iterations: of the hacking guard.
        best: iterations that keep_best holds.
    """
    if keep is None:
        return set(saved)
    older = sorted(number for number in saved if number <= newest)
    if not older:
        return set(saved)
    reachable = max((number for number in older if number <= older[-1] - rollback_iterations), default=0)
    first = min(reachable, older[-keep:][0])
    return {number for number in saved if number >= first or number in best}


def kept_exports(
    newest: int, exported: list[int], keep: int | None, best: AbstractSet[int] = NONE, needed: AbstractSet[int] = NONE
) -> set[int]:
    """Return those of the iterations `exported` whose Hugging Face checkpoint stays.

    The newest `keep`, the best, those that something still needs, and what is newer than `newest` altogether.

    Args:
        newest: the iteration that is finished.
        exported: iterations with an export, in any order.
        keep: how many; None: all.
        best: iterations that keep_best holds.
        needed: iterations whose export a stage has yet to read.
    """
    if keep is None:
        return set(exported)
    last = set(sorted(number for number in exported if number <= newest)[-keep:])
    return {number for number in exported if number > newest or number in last | best | needed}


def tidy(run: RunDirectory, newest: int) -> None:
    """Delete the weights that the cadence of a run does not keep, once iteration `newest` is exported.

    Raises UserError, deleting nothing, unless checkpoint and export of iteration `newest` are complete.
    """
    config, best = run.config, best_iterations(run)
    saved, exported = (published_iterations(run.iterations, name) for name in ("megatron", "hf"))
    whole = [number for number in saved if not holds_weights_alone(run.trained(number))]
    rollback = config.hacking_guard.rollback_iterations
    kept = kept_checkpoints(newest, whole, config.keep_checkpoints, rollback, best)
    between = {number for number in saved if number not in whole and number >= newest}  # exported, and then of no use
    waiting = {number for number in run.evaluated_iterations() if number > 0 and not _is_evaluated(run, number)}
    waiting |= {run.sampled_by(newest + 1)}
    kept_of_exports = kept_exports(newest, exported, config.keep_exports, best, waiting)
    _remove_interims(run)
    _remove_exported_weights(run)
    _remove_from_memory(run, newest)
    gone = [run.trained(number) for number in _iterations(run.iterations, "megatron") if number not in kept | between]
    gone += [run.exported(number) for number in _iterations(run.iterations, "hf") if number not in kept_of_exports]
    if not any(map(_weights, gone)):  # of one whose deletion was interrupted, some are there
        return
    require_complete(run, newest)
    for number in set(saved) - set(whole) - between:
        prune(run.trained(number), "checkpoint_every", config.checkpoint_every)
    _prune_others(run.iterations, "megatron", kept | between, "keep_checkpoints", config.keep_checkpoints)
    _prune_others(run.iterations, "hf", kept_of_exports, "keep_exports", config.keep_exports)


def _remove_interims(run: RunDirectory) -> None:
    """Remove the interim checkpoints that no training goes on from: the iteration is published whole, or the next one
    is published."""
    for number in sorted(int(place.name) for place in run.iterations.glob("*") if place.name.isdigit()):
        published, following = (read_manifest(run.trained(later)) for later in (number, number + 1))
        is_whole = published is not None and not holds_weights_alone(run.trained(number))
        if is_whole or following is not None:
            shutil.rmtree(interim_of(run.trained(number)), ignore_errors=True)


def _remove_exported_weights(run: RunDirectory) -> None:
    """Remove the weights that exports were made from, of a process that was killed meanwhile."""
    for number in _iterations(run.iterations, "megatron"):
        place = run.weights_to_export(number)
        for left in (place, partial_of(place)):
            shutil.rmtree(left, ignore_errors=True)


def _remove_from_memory(run: RunDirectory, newest: int) -> None:
    """Remove the exports in memory that nothing samples from any more."""
    if run.memory is None:
        return
    needed = needed_exports(run)
    for place in run.memory.glob("*"):
        if place.name.isdigit() and int(place.name) < newest and int(place.name) not in needed:
            shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        run.memory.rmdir()  # once it is empty


def best_iterations(run: RunDirectory) -> set[int]:
    """Return the keep_best iterations with the highest accuracy on evaluation.validation so far; of equals the
    later."""
    scores = []
    for number in run.evaluated_iterations():
        metrics = run.evaluated(number, run.config.evaluation.validation) / "metrics.json"
        if number > 0 and metrics.is_file():
            scores.append((read_record(metrics, Metrics, "evaluate again").accuracy, number))
    return {number for _, number in sorted(scores)[-run.config.keep_best :]} if run.config.keep_best else set()


def _is_evaluated(run: RunDirectory, number: int) -> bool:
    return all(read_manifest(run.evaluated(number, name)) is not None for name in run.evaluated_sets(number))


def holds_weights_alone(checkpoint: Path) -> bool:
    """Say whether a checkpoint is one between two whole ones (checkpoint_every)."""
    manifest = read_manifest(checkpoint)
    return manifest is not None and bool(manifest.counts.get(WEIGHTS_ALONE, False))


def published_iterations(iterations: Path, name: str) -> list[int]:
    """Return the iterations whose directory `name` is published with its weights, in order."""
    return [number for number in _iterations(iterations, name) if not _at(iterations, number, name, PRUNED).exists()]


def _prune_others(iterations: Path, name: str, kept: set[int], key: Key, keep: int | None) -> None:
    """Prune what is not kept; where somebody stopped in the middle of it, finish."""
    for number in _iterations(iterations, name):
        if number not in kept:
            prune(_at(iterations, number, name), key, keep)


def _iterations(iterations: Path, name: str) -> list[int]:
    numbers = (path.parts[-3] for path in iterations.glob(f"*/{name}/{MANIFEST}"))
    return sorted(int(number) for number in numbers if number.isdigit())


def _at(iterations: Path, number: int, *parts: str) -> Path:
    return iterations.joinpath(f"{number:04}", *parts)


def require_complete(run: RunDirectory, newest: int) -> None:
    """Raise UserError unless the newest checkpoint and its export are there whole, and the export's proof."""
    _require_files(run.trained(newest))
    require_complete_export(run.exported(newest))


def require_complete_export(directory: Path) -> None:
    """Raise UserError unless an export is there whole, with its proof."""
    _require_files(directory)
    require_proof(directory)


def _require_files(directory: Path) -> None:
    """Raise UserError unless all files of a published output are there in their sizes."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(f"{directory}: not complete: nothing is deleted; run the stage that makes it")
    if (directory / PRUNED).exists():
        return
    for file, entry in manifest.files.items():
        if not (directory / file).is_file() or (directory / file).stat().st_size != entry.bytes:
            raise UserError(
                f"{directory / file}: missing or of another size than its manifest says: nothing is deleted"
            )


def _weights(directory: Path) -> list[Path]:
    return [file for pattern in WEIGHTS for file in sorted(directory.glob(pattern))]


def note_pruned(directory: Path, key: Key, keep: int | None) -> None:
    """Leave the note in a checkpoint or export without weights that says which key to change for them."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    replace_file(directory / PRUNED, Pruned(reason=f"{key}: {keep}", key=key, when=when).model_dump_json())


def prune(directory: Path, key: Key, keep: int | None) -> None:
    """Delete the weights of a published checkpoint or export, leaving a note; nothing to do where that has happened.

    Args:
        directory: of the output.
        key: of the configuration, which its users are told to raise.
        keep: the value of that key, for the note.
    """
    files = _weights(directory)
    if not files or not (directory / MANIFEST).is_file():
        return
    if not (directory / PRUNED).exists():  # before the weights go: a checkpoint without them is never without the note
        note_pruned(directory, key, keep)
    freed = 0
    for file in files:
        freed += file.stat().st_size
        file.unlink()
    print(f"{key}: {directory}: {freed / 1e9:.2f} GB deleted", flush=True)

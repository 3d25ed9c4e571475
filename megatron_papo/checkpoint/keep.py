"""Deletes the weights of a run's older Megatron checkpoints, as keep_checkpoints of the configuration says.

Nothing is deleted before the newest iteration's checkpoint and its export are complete, files and proof. What the
hacking guard may go back to is kept. A deleted checkpoint leaves its manifest, metrics and pruned.json: its stage
counts as done, and says so when it is asked for.
"""

import json
import os
import time
from pathlib import Path

from megatron_papo.checkpoint.proof import require_proof
from megatron_papo.config import Config
from megatron_papo.errors import UserError
from megatron_papo.run.stage_output import MANIFEST, PRUNED, read_manifest

WEIGHTS = ("*.distcp", ".metadata", "common.pt", "metadata.json")


def keep_newest(config: Config, iterations: Path, newest: int) -> None:
    """Of the checkpoints below iterations/, once that of iteration `newest` is finished. Raises UserError, deleting
    nothing, if it is not."""
    if config.keep_checkpoints is None:
        return
    require_complete(iterations, newest)
    for number in range(1, oldest_kept(config, newest)):
        prune(iterations / f"{number:04}" / "megatron", config.keep_checkpoints)


def oldest_kept(config: Config, newest: int) -> int:
    """Iteration i + 1 starts from iteration i and may go back to iteration i - rollback_iterations, so that many are
    kept besides i."""
    return newest - max(config.keep_checkpoints, config.hacking_guard.rollback_iterations + 1) + 1


def require_complete(iterations: Path, newest: int) -> None:
    """Raises UserError unless the newest checkpoint and its export are there whole: all files in their sizes, and the
    proof."""
    for name in ("megatron", "hf"):
        directory = iterations / f"{newest:04}" / name
        manifest = read_manifest(directory)
        if manifest is None:
            raise UserError(f"{directory}: not complete: nothing is deleted; run the stage that makes it")
        if (directory / PRUNED).exists():
            continue
        for file, entry in manifest["files"].items():
            if not (directory / file).is_file() or (directory / file).stat().st_size != entry["bytes"]:
                raise UserError(
                    f"{directory / file}: missing or of another size than its manifest says: nothing is deleted"
                )
    require_proof(iterations / f"{newest:04}" / "hf")


def prune(directory: Path, kept: int) -> None:
    """Deletes a checkpoint's weights; nothing to do where that has happened, or where there is none."""
    if not (directory / MANIFEST).is_file() or not any(directory.glob("*.distcp")):
        return
    note = {"reason": f"keep_checkpoints: {kept}", "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    path = directory / PRUNED
    path.write_text(json.dumps(note))
    with open(path) as stream:
        os.fsync(stream.fileno())  # before the weights go, so that a checkpoint without them is never without the note
    freed = 0
    for file in (file for pattern in WEIGHTS for file in directory.glob(pattern)):
        freed += file.stat().st_size
        file.unlink()
    print(f"keep_checkpoints: {directory}: {freed / 1e9:.2f} GB deleted", flush=True)

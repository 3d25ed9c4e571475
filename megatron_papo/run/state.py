"""Where a run stands: of every output whether it is done, stale, missing or being made, by the table of stages."""

import os
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_papo.config import PromptSource
from megatron_papo.errors import UserError
from megatron_papo.run.manifest import MANIFEST, PRUNED, Manifest, read_manifest
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stage_output import differences, nested, partial_of
from megatron_papo.run.stages import Stage, Turn, all_turns, maker, set_section

Word = Literal["done", "stale", "missing", "running"]


@dataclass(frozen=True)
class State:
    """Of one output of a run."""

    stage: Stage
    turn: Turn
    output: Path
    word: Word
    reason: str = ""
    """Of a stale output: the key or input that is not what it was made from. Of a pruned one: that it is. Of a missing
    one: why it cannot be made any more."""
    bytes: int = 0
    seconds: float = 0.0


def states(run: RunDirectory) -> list[State]:
    """Return the state of everything that a whole run makes, in its order. Nothing is hashed: manifests are
    compared."""
    found: list[State] = []
    stale: set[Path] = set()
    for stage, turn in all_turns(run):
        state = _state(run, stage, turn, stale)
        if state.word == "stale":
            stale.add(state.output)
        found.append(state)
    return found


def _state(run: RunDirectory, stage: Stage, turn: Turn, stale: set[Path]) -> State:
    output, number = stage.output(run, turn), turn.iteration or 0
    manifest = read_manifest(output)
    if stage.number == 6 and run.in_memory(number) and read_manifest(run.trained(number)) is None:
        manifest = None  # what lies there is of an earlier attempt, and goes before this one's is made
    if manifest is None:
        if stage.number == 6 and is_done_with(run, number):
            return State(stage, turn, output, "done", "was needed in memory only")
        is_lost = stage.number == 7 and (run.exported(number) / PRUNED).exists()
        why = "the export was deleted before" if is_lost else ""
        return State(stage, turn, output, "running" if is_locked(output) else "missing", why)
    reason = what_differs(run, stage, turn, manifest, stale)
    size = sum(entry.bytes for entry in manifest.files.values())
    pruned = (output / PRUNED).exists()
    word: Word = "stale" if reason else "done"
    return State(
        stage, turn, output, word, reason or "weights deleted" * pruned, 0 if pruned else size, manifest.seconds
    )


def needed_exports(run: RunDirectory) -> set[int]:
    """Return the iterations whose export a stage has yet to read, or the run ends with."""
    needed = {
        number
        for number in run.evaluated_iterations()
        if not all((run.evaluated(number, name) / MANIFEST).exists() for name in run.evaluated_sets(number))
    }
    numbers = range(1, run.config.iterations + 1)
    needed |= {run.sampled_by(number) for number in numbers if not (run.rollouts(number) / MANIFEST).exists()}
    return (needed | {run.config.iterations}) - {0}


def is_done_with(run: RunDirectory, number: int) -> bool:
    """Say of an iteration whether it was exported into memory and is not needed any more: it is trained, and its
    checkpoint holds no weights."""
    trained = run.trained(number)
    return (trained / MANIFEST).exists() and (trained / PRUNED).exists() and number not in needed_exports(run)


def require_current(run: RunDirectory, output: Path) -> None:
    """Raise UserError where an output of a run is there, but is not what the run would make now."""
    made_by = maker(run, output)
    manifest = read_manifest(output) if made_by else None
    if made_by is None or manifest is None:
        return
    reason = what_differs(run, *made_by, manifest, frozenset())
    if reason:
        number = made_by[0].number
        raise UserError(
            f"{output}: made from something else ({reason}): put it back, or remove {output} and make it again with:"
            f" bash run_all.sh --name {run.root.name} --stages {number}"
        )


def what_differs(run: RunDirectory, stage: Stage, turn: Turn, manifest: Manifest, stale: AbstractSet[Path]) -> str:
    """Return the key or input in which an output differs from what the run would make now; "" if in none.

    Args:
        run: Its configuration is compared.
        stage, turn: What made the output.
        manifest: Of the output.
        stale: Outputs of which that is known already.
    """
    recipe = manifest.recipe.model_dump()
    wanted = {"config": nested(stage.values(run.config, turn)), "arguments": stage.arguments(turn)}
    if wanted != {name: recipe[name] for name in wanted} and stage.number not in (3, 6):
        return differences({name: recipe[name] for name in wanted}, wanted)
    recorded_places = manifest.inputs
    for spec in stage.needed_inputs(run.config, turn):
        path = spec.path(run, turn)
        made = read_manifest(path)
        recorded = recorded_places.get(spec.name)
        if path in stale:
            return f"input {spec.name} is stale"
        known = recipe["inputs"].get(spec.name)  # None: stage 1 reads the tokenizer alone
        if made is not None and known not in (None, made.fingerprint):
            return f"input {spec.name} is another one"
        from_outside = made is None and not run.holds(path)
        if from_outside and recorded is not None and not is_same_place(recorded, path):
            return f"input {spec.name} was at {recorded}"
    return _moved_sources(run, stage, turn, recorded_places)


def _moved_sources(run: RunDirectory, stage: Stage, turn: Turn, recorded: Mapping[str, str]) -> str:
    """Say which source of stage 1 lies elsewhere than when it was read: its content is then to be compared."""
    if stage.number != 1:
        return ""
    data = run.config.data
    own: dict[str, PromptSource | None] = {"train": data.train, "sft": data.sft}
    wanted = own if turn.evaluation_set is None else run.config.evaluation_sets
    for name, source in wanted.items():
        if source is None or (turn.evaluation_set not in (None, name)):
            continue
        place = None if source.source == "synthetic" else str(Path(source.source))
        if recorded.get(name) != place:
            key = f"data.{name}" if name in own else set_section(name)[1]
            return f"{key}.source is {source.source}, was {recorded.get(name, 'synthetic')}"
    return ""


def is_same_place(recorded: str, path: Path) -> bool:
    """Say whether two paths are the same one."""
    return os.path.abspath(recorded) == os.path.abspath(path)


def is_locked(output: Path) -> bool:
    """Say whether a process holds the lock of an output, as this machine's kernel sees it; its lock is left alone."""
    try:
        inode = os.stat(output.with_name(output.name + ".lock")).st_ino
        locks = Path("/proc/locks").read_text()
    except OSError:
        return partial_of(output).exists() and not Path("/proc/locks").exists()
    return any(line.split()[5].rpartition(":")[2] == str(inode) for line in locks.splitlines() if "FLOCK" in line)

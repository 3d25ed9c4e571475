"""What run_all.sh asks before it runs anything: which run this is, what is left to do, and where everything lies.

    .venv/bin/python -m tools.start_run [arguments of run_all.sh] --write --caller "$PWD"

Without --write it checks the arguments and prints the run's directory and device as shell assignments, no more. With
--write the run's config.yaml is written or brought up to date (run/run_config.py says what may change), and the
assignments are printed that the loop of run_all.sh needs. With --dry-run nothing is written, and PATHS says what each
command reads and makes. What can be known before anything runs is said here, all of it at once (tools/start_checks.py).
"""

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_papo.config import Change, expand_home
from megatron_papo.config_notes import notes
from megatron_papo.distributed.gpus import device_of, hide_unused_gpus
from megatron_papo.errors import UserError
from megatron_papo.reading import reading, shown
from megatron_papo.run.command_line import launcher, run
from megatron_papo.run.run_config import CONFIG, settle_run, write_run
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stages import STAGES, paths
from megatron_papo.run.state import State, states
from tools.plan_memory import needs, size_in_bytes
from tools.start_checks import (
    checkpoint_bytes,
    descriptors_note,
    problems_of_machine,
    problems_of_places,
    problems_of_run,
)

NUMBERS = range(1, 8)
DEFAULT_CONFIG = Path("configs/demo.yaml")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments of run_all.sh, and --write and --caller, which it adds. Mistakes are UserErrors."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--stages", default="all")
    parser.add_argument("--plan")
    for flag in ("--resident", "--dry-run", "--write"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--caller", type=Path, default=Path.cwd())
    try:
        args, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        option = error.argument_name
        raise UserError(
            f"{option} needs a value: see --help" if "expected one" in str(error) else f"{error}: see --help"
        )
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}: see --help")
    if args.config is not None:
        with reading(f"--config {args.config}", "give another file"):
            args.config = args.caller / expand_home(str(args.config))
    if args.plan is not None:
        size_in_bytes(args.plan, "--plan")
        if not args.dry_run:
            raise UserError("--plan goes with --dry-run: it says what a run will need, and starts nothing")
    args.name = name_of(args)
    args.stages = parse_stages(args.stages)
    together = {4, 5, 6}
    if args.resident and together & set(args.stages) and not together <= set(args.stages):
        raise UserError("--resident runs stages 4, 5 and 6 together: --stages leaves some of them out")
    return args


def name_of(args: argparse.Namespace) -> str:
    """Return the run's name: --name, or that of the configuration file."""
    name = (args.config or DEFAULT_CONFIG).stem if args.name is None else args.name
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name):
        raise UserError(
            f"--name {name}: use letters, digits, dot, dash and underscore, at most 100, and begin with no dot"
        )
    return name


def parse_stages(text: str) -> list[int]:
    """Return the stages that "1,4-6" or "all" names, in order."""
    if text == "all":
        return list(NUMBERS)
    mistake = UserError(f"--stages {text}: expected numbers from 1 to 7 such as 1,2,4-6, or all")
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not re.fullmatch("[1-7]", first) or not re.fullmatch("[1-7]", last or first):
            raise mistake
        chosen |= set(range(int(first), int(last or first) + 1))
    if not chosen:
        raise mistake
    return sorted(chosen)


def key_of(state: State) -> str:
    """Return what run_all.sh calls a command: its stage, and the iteration where it has one."""
    number, iteration = state.stage.number, state.turn.iteration
    return f"{number}" if iteration is None else f"{number}:{iteration}"


def summary_of_done(rows: Sequence[State], todo: Sequence[str]) -> str | None:
    """Return one line on what is there already; None for a new run."""
    done = [row for row in rows if row.word == "done"]
    if not done:
        return None
    complete = 0
    for row in rows:
        if row.turn.iteration and row.stage.number in (4, 5, 6):
            if row.word != "done":
                break
            complete = row.turn.iteration if row.stage.number == 6 else complete
    words = (
        f"{len(done)} of {len(rows)} outputs are there ({sum(row.seconds for row in done) / 60:.0f} minutes of work)"
    )
    if complete:
        words += f", iterations 1 to {complete} complete"
    return words + (": skipped" if todo else ": nothing to do")


def assignments(args: argparse.Namespace, directory: RunDirectory, rows: Sequence[State]) -> dict[str, str]:
    """Return what run_all.sh must know, by the names of its variables."""
    chosen = [row for row in rows if row.stage.number in args.stages]
    todo = [key_of(row) for row in chosen if row.word != "done" and not (row.word == "missing" and row.reason)]
    if args.dry_run:
        todo = [key_of(row) for row in rows if row.stage.number in args.stages]
    first = min((int(key.partition(":")[2]) for key in todo if key[0] in "456"), default=0)
    config = directory.config
    said = summary_of_done(rows, todo)
    if said is not None and not args.dry_run:
        print(f"{directory.root}: {said}", file=sys.stderr)
    return {
        "TODO": " ".join(dict.fromkeys(todo)),
        "FIRST": str(first),
        "ITERATIONS": str(config.iterations),
        "START_SFT": " ".join(launcher(STAGES["stage2_sft"], config)),
        "START_TRAIN": " ".join(launcher(STAGES["stage5_train"], config)),
        "RESIDENT": str(int(args.resident)),
        "SUMMARY": str(int(7 in args.stages)),
    }


def what_it_reads_and_makes(directory: RunDirectory, rows: Sequence[State]) -> dict[str, str]:
    """Return, by key, the lines that --dry-run shows under a command."""
    lines_of: dict[str, str] = {}
    for row in rows:
        inputs = paths(row.stage, directory, row.turn)
        lines = "".join(f"    reads {name:<10} {path}\n" for name, path in inputs.items()) + f"    makes {row.output}\n"
        lines_of[key_of(row)] = lines_of.get(key_of(row), "") + lines
    return lines_of


def disk_note(directory: RunDirectory) -> str | None:
    """Return how much disk the checkpoints of a run will take at most; None for a small or unknown model."""
    needed = checkpoint_bytes(directory)
    if not needed:
        return None
    free = shutil.disk_usage(directory.root if directory.root.is_dir() else Path.cwd()).free
    return f"checkpoints and exports take at most {needed / 1e9:,.0f} GB at once, {free / 1e9:,.0f} GB are free"


def notes_of_start(directory: RunDirectory, todo: Sequence[str]) -> list[str]:
    """Return what a person should be told before the work begins."""
    stages = {key[0] for key in todo}
    found = [*notes(directory.config), disk_note(directory)] if "5" in stages else []
    found += [descriptors_note(directory.config)] if stages & {"4", "7"} else []
    return [note for note in found if note is not None]


def prefetch_command(args: argparse.Namespace, root: Path) -> str:
    """Return what downloads the model and data of a run: tools.prefetch with its configuration."""
    config = root / CONFIG if (root / CONFIG).is_file() and args.config is None else args.config or DEFAULT_CONFIG
    shown_as = config.relative_to(Path.cwd()) if config.is_relative_to(Path.cwd()) else config
    words = ["tools.prefetch", "--config", str(shown_as)]
    return shlex.join(words + [word for override in args.overrides for word in ("--set", override)])


def refuse_problems(
    args: argparse.Namespace, directory: RunDirectory, differences: Sequence[Change], todo: Sequence[str]
) -> None:
    """Raise UserError with everything that is known to go wrong, a line each. Of a dry run, what this machine lacks is
    only said: another one may have it."""
    problems = problems_of_run(directory, todo) + problems_of_places(directory, differences)
    prefetch = prefetch_command(args, directory.root)
    of_machine = problems_of_machine(directory, todo, own_launcher="TRAIN_LAUNCHER" in os.environ, prefetch=prefetch)
    if args.dry_run:
        for line in of_machine:
            print(f"note: not here: {shown(line, limit=0)}", file=sys.stderr)
    else:
        problems += [line for line in of_machine if line not in problems]
    if problems:
        raise UserError(*problems)


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    args = parse()
    root = Path("runs") / args.name
    directory, differences = settle_run(root, DEFAULT_CONFIG, args.config, args.overrides, args.caller)
    if not args.write:
        device = device_of(directory.config)
        said = hide_unused_gpus(directory.config)
        if said is not None:
            print(f"note: {said}", file=sys.stderr)
        hidden = int(said is not None)
        print(f"RUN={shlex.quote(str(root))} DRY_RUN={int(args.dry_run)} DEVICE={device} HIDE_GPUS={hidden}")
        return
    rows = states(directory)
    values = assignments(args, directory, rows)
    refuse_problems(args, directory, differences, values["TODO"].split())
    if not args.dry_run:
        if not (root / CONFIG).exists():
            print(f"{root}: new run, by {args.config or DEFAULT_CONFIG}", file=sys.stderr)
        write_run(directory, differences, os.environ.get("RUN_ALL", "bash run_all.sh"))
        for change in differences:
            print(f"{root}: {change.key}: {change.old} -> {change.new}", file=sys.stderr)
        for note in notes_of_start(directory, values["TODO"].split()):
            print(f"note: {note}", file=sys.stderr)
    print("\n".join(f"{name}={shlex.quote(value)}" for name, value in values.items()))
    if args.dry_run:
        texts = what_it_reads_and_makes(directory, rows)
        print("declare -gA PATHS=(" + " ".join(f"[{key}]={shlex.quote(text)}" for key, text in texts.items()) + ")")
        needed = "".join(f"{line}\n" for line in needs(directory.config, args.plan))
        print(f"NEEDS={shlex.quote(needed)}")


if __name__ == "__main__":
    run(main)

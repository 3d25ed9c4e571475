"""What every stage and tool has in common on the command line."""

import argparse
import errno
import io
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_papo.config import Config
from megatron_papo.config_files import load_config
from megatron_papo.config_view import view
from megatron_papo.distributed import gpus, process_groups
from megatron_papo.errors import UserError
from megatron_papo.reading import shown
from megatron_papo.run import console
from megatron_papo.run.describing import typed_python
from megatron_papo.run.end_request import ENDED_EARLY, EndedEarly
from megatron_papo.run.outside import remembered_fingerprint
from megatron_papo.run.room import cannot_write, refusal
from megatron_papo.run.run_config import open_run
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stage_output import (
    Input,
    StageOutput,
    content_fingerprint,
    input_made_or_from_outside,
    require_input,
    require_place,
)
from megatron_papo.run.stages import STAGES, Stage, Turn, maker, paths
from megatron_papo.run.state import require_current

RUN_FORM = """

In a run: --run runs/NAME, and which turn; every input and the output may still be given as a path of its own.
Without a run: --config FILE [--set KEY=VALUE ...] with every input and the output given."""


@dataclass(frozen=True)
class Task:
    """One output that a stage is asked to make."""

    stage: Stage
    turn: Turn
    config: Config
    """The keys that the stage lists, no other."""
    whole_config: Config = field(repr=False)
    """For fingerprints and commands, not for the work."""
    paths: dict[str, Path]
    """Of the inputs that are needed, by name."""
    output: Path
    run: RunDirectory | None

    @classmethod
    def in_run(cls, run: RunDirectory, stage: Stage, turn: Turn) -> "Task":
        """Return a turn of a stage with the paths that the run gives it."""
        shown = view(run.config, stage.keys, stage.name)
        return cls(stage, turn, shown, run.config, paths(stage, run, turn), stage.output(run, turn), run)

    @property
    def iteration(self) -> int:
        if self.turn.iteration is None:
            raise UserError(f"--iteration: missing: {self.stage.name} works on one iteration at a time")
        return self.turn.iteration

    def path(self, name: str) -> Path:
        """Return where a needed input lies."""
        return self.paths[name]

    def hint(self, name: str) -> str:
        """Return the command that makes an input."""
        made = None if self.run is None else maker(self.run, self.paths[name], self.turn.iteration or 0)
        if self.run is not None and made is not None:
            return stage_command(made[0], self.whole_config, ["--run", str(self.run.root), *str(made[1]).split()])
        spec = next(spec for spec in self.stage.inputs if spec.name == name)
        return stage_command(STAGES[spec.made_by[0]], self.whole_config, ["..."])

    def require(self, name: str) -> Path:
        """Return where an input is, not hashed. Raises UserError where it is missing, or not what the run would
        make."""
        path = self.paths[name]
        if self.run is not None:
            require_current(self.run, path)
        if not path.exists():
            raise UserError(
                f"{path}: not there: give --{name} a checkpoint directory, or make it with: {self.hint(name)}"
            )
        return path

    def input(self, name: str, outside: Callable[[Path], str] = content_fingerprint) -> Input:
        """Return a needed input with its fingerprint. Raises UserError, naming the command that makes it."""
        spec, path = next(spec for spec in self.stage.inputs if spec.name == name), self.paths[name]
        if not spec.from_outside:
            if self.run is not None:
                require_current(self.run, path)
            return require_input(path, spec.made_by, self.hint(name))
        root = None if self.run is None else self.run.root
        place = self.require(name)
        return input_made_or_from_outside(place, "", lambda there: remembered_fingerprint(root, there, outside))

    def inputs(self, outside: Callable[[Path], str] = content_fingerprint) -> dict[str, Input]:
        """Return all needed inputs, by name. outside: hashes one that no stage made.

        Raises UserError where one is missing, or is not what the run would make now; so may be what it was made from.
        """
        if self.run is not None:
            for path in (self.run.data, self.run.reference):  # where things from outside enter a run
                require_current(self.run, path)
        return {name: self.input(name, outside) for name in self.paths}

    def stage_output(
        self,
        inputs: dict[str, Input],
        started: float | None = None,
        replaces: Callable[[dict[str, Any], dict[str, Any]], bool] | None = None,
    ) -> StageOutput:
        """Return the output, which may be done already. started, replaces: see StageOutput."""
        values, arguments = self.stage.values(self.whole_config, self.turn), self.stage.arguments(self.turn)
        return StageOutput(self.stage.name, self.output, values, inputs, arguments, started, replaces)


class StageParser:
    """The command line of a stage, from its row in the table."""

    def __init__(self, name: str, description: str):
        self.stage = STAGES[name]
        self.parser = argparse.ArgumentParser(
            prog=f".venv/bin/python -m stages.{name}", description=description + RUN_FORM,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        add = self.parser.add_argument
        add("--run", type=Path, metavar="DIR", help="run directory, e.g. runs/demo, which run_all.sh has started")
        add(
            "--config",
            type=Path,
            metavar="FILE",
            help="YAML configuration, e.g. configs/demo.yaml, where there is no --run",
        )
        set_help = "override one value (may be repeated); in a run, only keys that may change while it lives"
        add("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help=set_help)
        if self.has_iterations:
            first = 0 if name == "stage7_evaluate" else 1
            add("--iteration", type=int, metavar="N", help=f"number of the iteration, from {first}")
            add("--iterations", type=iteration_range, metavar="A-B", help="stay for all of these iterations of the run")
        if self.has_sets:
            set_help = "only this evaluation set of the run (may be repeated)"
            add("--evaluation-set", dest="evaluation_sets", action="append", metavar="NAME", help=set_help)
        for spec in self.stage.inputs:
            made_by = " or ".join(f"stage {STAGES[maker_name].number}" for maker_name in spec.made_by)
            add(f"--{spec.name}", type=Path, metavar="DIR", help=f"{spec.help} (in a run: what {made_by} made)")
        add("--output", type=Path, metavar="DIR", help="directory to make; complete or absent, never half-written")

    @property
    def has_iterations(self) -> bool:
        return self.stage.number in (4, 5, 6, 7)

    @property
    def has_sets(self) -> bool:
        return self.stage.number in (1, 7)

    def parse(self, arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[Task]]:
        """Return the arguments and the tasks that they name, at least one. Raises UserError for a contradiction."""
        args = self.parser.parse_args(arguments)
        if (args.run is None) == (args.config is None):
            self.parser.error("give --run DIR, or --config FILE with every input and the output")
        if args.run is not None:
            run = open_run(args.run, args.overrides)
            choose_device(run.config)
            turns = self._turns(args, run)
            if args.output is not None and len(turns) > 1:
                words = "; ".join(str(turn) or "training data" for turn in turns)
                raise UserError(
                    f"--output {args.output}: one directory for {len(turns)} outputs ({words}): say which one"
                )
            return args, [self._task(args, run.config, turn, run) for turn in turns]
        if getattr(args, "iterations", None) is not None:
            self.parser.error("--iterations stands for the iterations of a --run: give --iteration")
        if self.stage.iteration_decides and args.iteration is None:
            self.parser.error("without --run needed: --iteration")
        names = list(dict.fromkeys(getattr(args, "evaluation_sets", None) or [None]))
        if len(names) > 1:
            self.parser.error("without --run one output is made: give one --evaluation-set")
        turn = Turn(getattr(args, "iteration", None), names[0])
        config = load_config(args.config, args.overrides)
        choose_device(config)
        return args, [self._task(args, config, turn, None)]

    def _turns(self, args: argparse.Namespace, run: RunDirectory) -> list[Turn]:
        turns, wanted = self.stage.turns(run), list(dict.fromkeys(getattr(args, "evaluation_sets", None) or []))
        for name in wanted:
            if name not in run.config.evaluation_sets:
                names = ", ".join(run.config.evaluation_sets)
                raise UserError(f"--evaluation-set {name}: the run has no set of that name: there is {names}")
        if self.has_iterations:
            numbers = args.iterations or ([] if args.iteration is None else [args.iteration])
            if not numbers:
                self.parser.error("say which iteration of the run: --iteration N, or --iterations A-B")
            if self.has_sets:
                return [Turn(number, name) for number in numbers for name in wanted or run.evaluated_sets(number)]
            return [Turn(number) for number in numbers]
        return [turn for turn in turns if turn.evaluation_set in wanted] if wanted else turns

    def _task(self, args: argparse.Namespace, config: Config, turn: Turn, run: RunDirectory | None) -> Task:
        self._check_iteration(turn)
        options = vars(args)
        missing = [] if run is not None or args.output is not None else ["output"]
        where: dict[str, Path] = {}
        for spec in self.stage.inputs:
            given = options[spec.name]
            if given is None and run is not None and spec.needed(config, turn):
                given = spec.path(run, turn)
            if spec.needed(config, turn) and given is None:
                missing.append(spec.name)
            elif spec.needed(config, turn):
                where[spec.name] = given
        if missing:
            self.parser.error("without --run needed: " + ", ".join(f"--{name}" for name in missing))
        output = require_place(args.output or self.stage.output(_present(run), turn))
        shown = view(config, self.stage.keys, self.stage.name)
        return Task(self.stage, turn, shown, config, where, output, run)

    def _check_iteration(self, turn: Turn) -> None:
        lowest = 0 if self.stage.number == 7 else 1
        if turn.iteration is not None and turn.iteration < lowest:
            raise UserError(f"--iteration {turn.iteration}: iterations count from {lowest}")


def choose_device(config: Config) -> None:
    """Hide the GPUs that a run does not compute on from this process, and say so once."""
    said = gpus.hide_unused_gpus(config)
    if said is not None and process_groups.is_main_rank():
        print(said, flush=True)


def _present(run: RunDirectory | None) -> RunDirectory:
    assert run is not None
    return run


def iteration_range(text: str) -> list[int]:
    """Return the numbers of `A-B`, for argparse."""
    first, dash, last = text.partition("-")
    if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
        raise argparse.ArgumentTypeError(f"{text}: expected two numbers such as 1-20")
    if int(last or first) - int(first) > 1_000_000 or int(last or first) < int(first):
        raise argparse.ArgumentTypeError(f"{text}: expected a first and a last iteration such as 1-20")
    return list(range(int(first), int(last or first) + 1))


def launcher(stage: Stage, config: Config) -> list[str]:
    """Return what starts a stage: Python, or torchrun with its number of processes."""
    if stage.processes is None:
        return [typed_python()]
    processes = str(max(1, stage.processes(config)))
    return [typed_python(), "-m", "tools.torchrun", "--standalone", "--nproc-per-node", processes]


def stage_command(stage: Stage, config: Config, arguments: Sequence[str]) -> str:
    """Return a stage's command line as it can be typed."""
    return shlex.join([*launcher(stage, config), "-m", f"stages.{stage.name}"]) + " " + " ".join(arguments)


def run(main: Callable[[], None], interrupted: str = "") -> None:
    """Run a command and leave; a UserError becomes `error: ...` lines on stderr and exit status 2.

    interrupted: what to say on stderr of a command that was ended with Ctrl-C.

    So does a disk that takes no more, wherever something was written; work that was asked to end leaves with 75. Names
    that are no UTF-8 are printed as escapes.
    """
    status = 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    process_groups.forget_left_over()
    process_groups.die_with_launcher()  # also while it still imports and waits for the others
    console.quiet()
    try:
        main()
    except UserError as error:
        for line in error.lines:
            print(f"error: {shown(line, limit=0)}", file=sys.stderr, flush=True)
        status = 2
    except EndedEarly as ended:
        if process_groups.is_main_rank():
            print(ended, flush=True)
        status = ENDED_EARLY
    except KeyboardInterrupt:
        if interrupted:
            print(f"\n{interrupted}", file=sys.stderr, flush=True)
        status = 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 141
    except Exception as error:
        if (problem := _of_file_system(error)) is None:
            raise
        print(f"error: {shown(problem, limit=0)}", file=sys.stderr, flush=True)
        status = 2
    process_groups.leave(status)


def _of_file_system(error: Exception) -> UserError | None:
    """Return what to say where a file system takes no more, or no such name; None for anything else."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UserError(f"{shown(error.filename)}: {error.strerror}: give a shorter one")
    if (why := refusal(error)) is None:
        return None
    return cannot_write(getattr(error, "filename", None) or f"{Path.cwd()} or {tempfile.gettempdir()}", why)


def add_server_option(parser: StageParser) -> None:
    """Give a stage that samples its --server."""
    help_text = "directory of the run's servers, started there if none runs, or URLs (default in a run: its server/)"
    parser.parser.add_argument("--server", metavar="DIR|URL", help=help_text)


def server_of(args: argparse.Namespace, task: Task) -> str:
    """Return the servers that a task samples from. Raises UserError where none are named."""
    if args.server is not None:
        return args.server
    if task.run is None:
        raise UserError("--server: missing: name the directory of a server, or the URL of a running one")
    return str(task.run.server)

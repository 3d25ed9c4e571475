"""Evaluate a checkpoint on a suite. No run is needed: the output is what stages 1 and 7 make.

    .venv/bin/python -m tools.evaluate --hf DIR --suite configs/benchmarks/papo.yaml --output DIR
    .venv/bin/python -m tools.evaluate --hf DIR --suite F --output DIR --set evaluation.masked_images=true --json
    .venv/bin/python -m tools.compare DIR OTHER --baseline OTHER

A suite is a configuration file with evaluation.benchmarks, or a part of one; what it leaves out is as in
configs/published.yaml. tools.suite check says beforehand what is missing of its sets. Killed? The same command goes on
with the responses that are missing; with more --set evaluation.samples_per_prompt it asks for the additional ones. The
servers are started on this machine, unless --server names some, and stopped in the end.

--json prints one object instead of the table, everything else goes to stderr: `sets`, `groups`, `overall`, all numbers
as fractions, and under `images` the same for answers to masked pictures and to none.

reads   the sets of the suite; a Hugging Face checkpoint, which may be a run's export
writes  OUTPUT/evaluation/sets/SET (prompts and pictures) and OUTPUT/evaluation/iteration_0000/SET (predictions.jsonl,
        metrics.json, protocol.json), OUTPUT/config.yaml
"""

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_papo.config import Config
from megatron_papo.data.chat import require_checkpoint
from megatron_papo.distributed.gpus import count_gpus, device_of
from megatron_papo.errors import UserError
from megatron_papo.evaluation.comparable import Row
from megatron_papo.evaluation.comparison import compare
from megatron_papo.evaluation.evaluate import evaluate_all
from megatron_papo.evaluation.outputs import Evaluation, read_evaluation
from megatron_papo.evaluation.scores import suite_scores
from megatron_papo.evaluation.tables import Wanted, as_text, grid_of
from megatron_papo.reading import shown
from megatron_papo.run.command_line import Task, choose_device, run
from megatron_papo.run.output_lock import OutputLock
from megatron_papo.run.records import ImageShown
from megatron_papo.run.run_config import settle_run, write_run
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stages import STAGES, Turn
from megatron_papo.sglang.server import stop_all, urls_of
from tools.start_checks import problems_of_machine, problems_of_run
from tools.suite import DEFAULTS, read_suite

NO_TRAINING = (
    "data.train={source: synthetic, count: 1}",
    "data.sft=null",
    "data.evaluation=null",
    "sft=null",
    "rollout.max_response_tokens=1",
    "evaluate_every=null",
    "keep_best=0",
)
"""In place of what only training reads, and the start checks look at."""
ON_ALL_GPUS = ("server.first_gpu=0",)
STAGES_WANTED = ("1", "7:0")
"""As run_all.sh calls them."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=".venv/bin/python -m tools.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint")
    add("--suite", type=Path, required=True, metavar="FILE", help="configuration with evaluation.benchmarks")
    add("--output", type=Path, required=True, metavar="DIR", help="directory to make, or to go on with")
    add("--source", metavar="DIR", help="local copy of all sets (default: where each set's source says)")
    add("--sets", nargs="+", metavar="SET", help="only these sets (default: all)")
    set_help = "override one value (may be repeated), e.g. evaluation.without_images=true, server.replicas=8"
    add("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help=set_help)
    add("--server", metavar="DIR|URL", help="servers to use (default: started in OUTPUT/server, stopped in the end)")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> list[str]:
    """Return what is laid over the suite: an evaluation alone, of this checkpoint, on this machine, as asked for.

    Raises UserError where the suite names no set.
    """
    moved = [] if args.source is None else [f"evaluation.source={json.dumps(str(Path(args.source).absolute()))}"]
    place = f"model.path={json.dumps(str(args.hf.absolute()))}"
    found = read_suite(args.suite)
    dtype = [] if device_of(found) == "cuda" and count_gpus() else ["model.dtype=float32"]
    first = [f"evaluation.validation={next(iter(found.evaluation.benchmarks))}"]
    return [place, *NO_TRAINING, *ON_ALL_GPUS, *first, *dtype, *moved, *args.overrides]


def open_output(args: argparse.Namespace) -> tuple[RunDirectory, list[str]]:
    """Return the output and the names of the sets to evaluate on. Its configuration is written once all is well.

    Raises UserError with everything that is known to go wrong, and for an output of another evaluation.
    """
    require_checkpoint(args.hf)
    directory, differences = settle_run(
        args.output, DEFAULTS, args.suite, settings_of(args), Path.cwd(), below=DEFAULTS, option="--output"
    )
    for change in differences:
        if change.key == "model.path" and (directory.root / "evaluation").exists():
            raise UserError(
                f"{args.output}: holds an evaluation of {change.old}, not of {change.new}: choose another --output"
            )
    names = chosen_sets(directory.config, args.sets)
    choose_device(directory.config)
    problems = problems_of_run(directory, STAGES_WANTED) + problems_of_machine(
        directory, STAGES_WANTED, own_launcher=True
    )
    if problems:
        raise UserError(*dict.fromkeys(problems))
    write_run(directory, differences, shlex.join(["tools.evaluate", *sys.argv[1:]]))
    return directory, names


def chosen_sets(config: Config, wanted: Sequence[str] | None) -> list[str]:
    """Return the names of the sets to evaluate on. Raises UserError for one that there is not."""
    names = list(config.evaluation_sets)
    unknown = [name for name in wanted or [] if name not in names]
    if unknown:
        raise UserError(f"--sets {shown(unknown[0])}: the suite has no set of that name: there is {', '.join(names)}")
    return names if wanted is None else [name for name in names if name in wanted]


def evaluate(args: argparse.Namespace) -> Evaluation:
    """Make what is missing of the output, and read it. Raises UserError where another process is at it."""
    if args.server is not None:
        urls_of(args.server)
    lock = OutputLock(args.output.absolute())
    try:
        return evaluate_alone(args)
    finally:
        lock.release()


def evaluate_alone(args: argparse.Namespace) -> Evaluation:
    """Do what `evaluate` does, once no other process may."""
    directory, names = open_output(args)
    prepare(directory, names)
    server = args.server or str(directory.server)
    try:
        tasks = [Task.in_run(directory, STAGES["stage7_evaluate"], Turn(0, name)) for name in names]
        evaluate_all(tasks, lambda task: server)
    finally:
        if args.server is None:
            stop_all(directory.server)
    evaluation = read_evaluation(str(directory.root), 0, names)
    return replace(evaluation, sets={name: evaluation.sets[name] for name in names})


def prepare(directory: RunDirectory, names: Sequence[str]) -> None:
    """Have stage 1 make the sets that are not there yet. It says itself what is wrong, and ends this process then."""
    chosen = [word for name in names for word in ("--evaluation-set", name)]
    command = [sys.executable, "-m", "stages.stage1_prepare_data", "--run", str(directory.root), *chosen]
    status = subprocess.run(command, stdout=sys.stdout).returncode
    if status:
        sys.exit(status)


def as_json(evaluation: Evaluation) -> dict[str, object]:
    """Return what --json prints."""
    groups = {name: one.protocol.groups for name, one in evaluation.sets.items()}

    def of(image: ImageShown) -> dict[str, object]:
        answers = {name: one.answers[image] for name, one in evaluation.sets.items() if image in one.answers}
        return suite_scores(answers, groups).as_json() if answers else {}

    others: tuple[ImageShown, ...] = ("masked", "none")
    images = {image: found for image in others if (found := of(image))}
    return of("original") | ({"images": images} if images else {})


def main() -> None:
    args = parse()
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        evaluation = evaluate(args)
    if args.json:
        print(json.dumps(as_json(evaluation), indent=1, allow_nan=False))
        return
    vision = any(len(one.answers) > 1 for one in evaluation.sets.values())
    print(as_text(grid_of(compare([Row(evaluation.name, [evaluation])], None, "original"), Wanted(vision=vision))))
    command = shlex.join([".venv/bin/python", "-m", "tools.compare", str(args.output)])
    print(f"predictions and protocol: {args.output / 'evaluation'}; beside others: {command} ...")


if __name__ == "__main__":
    run(main, interrupted="interrupted: the same command goes on with the responses that are missing")

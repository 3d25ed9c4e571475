"""Write the measured numbers and the tables of the stages into README.md and docs/.

    .venv/bin/python -m tools.publish_numbers  fill every marked block
    .venv/bin/python -m tools.publish_numbers --check  exit status 1 if a page is out of date
    .venv/bin/python -m tools.publish_numbers --take demo_seed1=runs/demo  first a run's numbers into docs/numbers

A page marks what is written into it by `<!-- numbers: NAME -->` and `<!-- end -->`. NAME is a table of TABLES below, or
one value, `FILE.KEY FORMAT`, e.g. `demo_seed1.accuracy_papo percent`. So a number that stands on two pages has
one source, the files in docs/numbers/. `<!-- table: NAME -->` stands for what megatron_papo/run/stages.py says, a table
of STAGE_TABLES.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_papo.config import expand_home
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.evaluation.comparison import Cell, Comparison, RowScores
from megatron_papo.evaluation.tables import Wanted, grid_of, markdown_lines
from megatron_papo.reading import read_json, reading
from megatron_papo.run.command_line import run
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stages import STAGES, Stage, Turn

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?P<start><!-- (?P<kind>numbers|table): (?P<name>[^>]+?) -->)(?P<text>.*?)(?P<end><!-- end -->)", re.DOTALL
)
OPENING = re.compile(r"<!-- (numbers|table):")
WIDTH = 100
"""Of the lines of a page."""
SEEDS = (1, 2, 3)
MACHINES = {"AVX2": "demo_seed{}", "none (`ATEN_CPU_CAPABILITY=default`)": "demo_default_seed{}"}
"""Vector instructions that torch was run with -> the runs, by seed: each rounds differently."""
TRAINING = ("accuracy", "kl_prcp", "kl_ref", "entropy", "clip_fraction_high", "cut_off")
"""Metrics of a training step that the demo's page shows, as means over an iteration."""

Numbers = dict[str, dict[str, Any]]
"""The content of docs/numbers/: name of the file -> its JSON object."""


def percent(value: float) -> str:
    """Return 0.8555 as "85.5 %"; half a tenth is rounded to the even side, as Python does."""
    return f"{100 * value:.1f} %"


FORMATS: dict[str, Callable[[float], str]] = {
    "percent": percent,
    "seconds": "{:.1f} s".format,
    "number": "{:g}".format,
    "ratio": "{:.2f}".format,
}


def demo_seeds(numbers: Numbers) -> list[str]:
    """Return the table of the demo's accuracies, a row per seed."""
    lines = [
        "| seed | cold start | after PAPO | gain | masked, cold start | masked, after |",
        "|---|---|---|---|---|---|",
    ]
    for seed in SEEDS:
        demo = numbers[f"demo_seed{seed}"]
        masked = percent(demo["accuracy_cold_start_masked"]), percent(demo["accuracy_papo_masked"])
        cells = [percent(demo["accuracy_cold_start"]), percent(demo["accuracy_papo"]), f"{gain_of(demo):+.1f}", *masked]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    return lines


def demo_machines(numbers: Numbers) -> list[str]:
    """Return the table of the demo's accuracy after PAPO and its gain, a row per set of vector instructions."""
    titles = ["vector instructions", *(f"seed {seed}" for seed in SEEDS)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for machine, name in MACHINES.items():
        demos = [numbers[name.format(seed)] for seed in SEEDS]
        cells = [f"{percent(demo['accuracy_papo'])} ({gain_of(demo):+.1f})" for demo in demos]
        lines.append(f"| {machine} | {' | '.join(cells)} |")
    return lines


def demo_range(numbers: Numbers) -> list[str]:
    """Return the lowest and the highest gain of all runs of the demo as a sentence."""
    gains = [gain_of(numbers[name.format(seed)]) for name in MACHINES.values() for seed in SEEDS]
    return [
        f"Expect PAPO to add {min(gains):.0f} to {max(gains):.0f} points: the range of {len(gains)} runs,",
        "three seeds with and without vector instructions.",
    ]


def gain_of(demo: dict[str, Any]) -> float:
    """Return by how many points PAPO raised the held-out accuracy."""
    return 100 * float(demo["accuracy_papo"] - demo["accuracy_cold_start"])


def demo_training(numbers: Numbers) -> list[str]:
    """Return the table of the first seed's training, a row per iteration."""
    lines = [
        "| iteration | accuracy of the rollouts | KL_prcp | KL_ref | entropy | clipped high | cut off |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(numbers["demo_seed1"]["training"], 1):
        middle = [f"{row[name]:.3f}" for name in ("kl_prcp", "kl_ref", "entropy")]
        cells = [percent(row["accuracy"]), *middle, percent(row["clip_fraction_high"]), percent(row["cut_off"])]
        lines.append(f"| {number} | {' | '.join(cells)} |")
    return lines


def demo_accuracy(numbers: Numbers) -> list[str]:
    """Return the table that the first seed's run ends with."""
    demo = numbers["demo_seed1"]
    lines = ["| held-out accuracy | with the picture | picture masked |", "|---|---|---|"]
    for title, name in (("cold start", "cold_start"), ("after PAPO", "papo")):
        lines.append(f"| {title} | {percent(demo[f'accuracy_{name}'])} | {percent(demo[f'accuracy_{name}_masked'])} |")
    return lines


def demo_seconds(numbers: Numbers) -> list[str]:
    """Return the first seed's seconds, in all and by stage, as a sentence."""
    demo = numbers["demo_seed1"]
    stages = ", ".join(f"stage {name[len('stage')]} {seconds:.0f} s" for name, seconds in demo["seconds"].items())
    return [f"The stages of a run took {demo['seconds_total'] / 60:.1f} minutes:", f"{stages}."]


def guarded_runs(numbers: Numbers) -> list[str]:
    """Return the table of the hacking guard: the demo at twenty times its gamma, and at its own."""
    demos = [numbers[f"demo_seed{seed}"] for seed in SEEDS]
    warned, guarded = numbers["gamma02_warn"], numbers["gamma02"]
    accuracies = ", ".join(percent(demo["accuracy_papo"]) for demo in demos)
    alarms = sum(demo["alarms"] for demo in demos)
    return [
        "| run | held-out accuracy | what the guard did |",
        "|---|---|---|",
        f"| cold start | {percent(demos[0]['accuracy_cold_start'])} | |",
        f"| gamma 0.2, guard only warning | {percent(warned['accuracy_papo'])} | {alarms_of(warned)} |",
        f"| gamma 0.2, guard | {percent(guarded['accuracy_papo'])} | {alarms_of(guarded)}: back to the checkpoint,"
        " gamma 0.02 from then on |",
        f"| gamma 0.01 (the demo), guard; seeds 1, 2, 3 | {accuracies} | {alarms} alarms in three runs |",
    ]


def miniature(numbers: Numbers) -> list[str]:
    """Return the table, without its notes, that tools.compare prints of the demo's model before and after PAPO on the
    nine sets in miniature, each of enough problems for marks; the file is what it prints with --format json."""
    taken = numbers["miniature"]

    def cells(of_kind: dict[str, dict[str, Any]]) -> dict[str, Cell]:
        return {name: Cell(**cell) for name, cell in of_kind.items()}

    rows = [
        RowScores(row["name"], cells(row["sets"]), cells(row["groups"]), Cell(**row["overall"]))
        for row in taken["rows"]
    ]
    sets = [*taken["rows"][0]["sets"]]
    comparison = Comparison(rows, sets, taken["groups"], taken["baseline"], "original", {}, taken["prompts"], [])
    return markdown_lines(grid_of(comparison, Wanted()))


def launching(numbers: Numbers) -> list[str]:
    """Return the table of what the launching thread does for one rollout, before and after, by tools.benchmark_host."""
    before, after = numbers["host_before"], numbers["host"]
    lines = [
        "| per rollout | plain, before | group, before | plain | group | group, before / group |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in (("kernels", "kernels"), ("attention", "of these attention"), ("waits", "waits for the GPU")):
        counts = [found[f"{name}_{layout}"] for found in (before, after) for layout in ("plain", "group")]
        ratio = f"{counts[1] / counts[3]:.2f}" if counts[3] else ""
        cells = [f"{count:.0f}" if count >= 100 else f"{count:.1f}" for count in counts]
        lines.append(f"| {title} | {' | '.join(cells)} | {ratio} |")
    return lines


def alarms_of(run_numbers: dict[str, Any]) -> str:
    """Return "9 alarms, the first at step 18"."""
    count = run_numbers["alarms"]
    return f"{count} alarm{'s' * (count != 1)}, the first at step {run_numbers['alarm_steps'][0]}"


TABLES: dict[str, Callable[[Numbers], list[str]]] = {
    function.__name__: function
    for function in (
        demo_seeds,
        demo_machines,
        demo_range,
        demo_training,
        demo_accuracy,
        demo_seconds,
        guarded_runs,
        miniature,
        launching,
    )
}


def stages() -> list[str]:
    """Return the table of the stages as README shows it: what they do, read and write."""
    lines = ["| stage | what it does | reads | writes |", "|---|---|---|---|"]
    for stage in STAGES.values():
        lines.append(f"| {titled(stage)} | {stage.title} | {', '.join(inputs_of(stage))} | {stage.writes} |")
    return lines


def stages_in_a_run() -> list[str]:
    """Return the table of where the stages find their inputs and put their outputs in a run."""
    run_directory = RunDirectory(Path("runs/NAME"), load_config(ROOT / "configs" / "demo.yaml"))
    lines = ["| stage | started by | inputs (made by stage) | output in runs/NAME |", "|---|---|---|---|"]
    for stage in STAGES.values():
        launcher = "python" if stage.processes is None else "torchrun"
        outputs = " and ".join(f"`{path}`" for path in outputs_of(stage, run_directory))
        lines.append(f"| {titled(stage)} | {launcher} | {', '.join(inputs_of(stage))} | {outputs} |")
    return lines


def stage_keys() -> list[str]:
    """Return the list of the keys that decide the output of each stage."""
    lines: list[str] = []
    for stage in STAGES.values():
        decided = keys_in_words(stage.decided_by) or "none: its input alone"
        if stage.iteration_decides:
            decided += ", and the number of the iteration"
        if stage.decided_by_of_set:
            decided += f"; of an evaluation set {keys_in_words(stage.decided_by_of_set)}"
        text = textwrap.wrap(f"- {stage.name}: {decided}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        lines += [text[0].replace(stage.name, f"`{stage.name}`", 1), *text[1:]]
    return lines


def titled(stage: Stage) -> str:
    return f"{stage.number} `{stage.name}`"


def inputs_of(stage: Stage) -> list[str]:
    """Return what a stage reads, each with the stages that may have made it, e.g. "`hf` (1, 2 or 6)"."""
    words = []
    for spec in stage.inputs:
        makers = [str(number) for number in sorted(STAGES[name].number for name in spec.made_by)]
        *first, last = makers + ["yours"] * spec.from_outside
        words.append(f"`{spec.name}` ({', '.join(first)}{' or ' if first else ''}{last})")
    return words


def outputs_of(stage: Stage, run_directory: RunDirectory) -> list[str]:
    """Return the paths of a stage's outputs in a run, with NNNN for the iteration and SET for the evaluation set."""
    turns = [Turn(1234, "SET")] + ([Turn(1234)] if stage.decided_by_of_set else [])
    paths = [stage.output(run_directory, turn).relative_to(run_directory.root) for turn in reversed(turns)]
    return [str(path).replace("1234", "NNNN") for path in paths]


def keys_in_words(keys: Sequence[str]) -> str:
    """Return dotted keys with those of one section together: "seed, data.train.{split, count}"."""
    sections: dict[str, list[str]] = {}
    for key in keys:
        section, _, leaf = key.rpartition(".")
        sections.setdefault(section or key, []).append(leaf)
    words = []
    for section, leaves in sections.items():
        alone = section in keys or len(leaves) == 1
        words += (
            [section if section in keys else f"{section}.{leaves[0]}"]
            if alone
            else [f"{section}.{{{', '.join(leaves)}}}"]
        )
    return ", ".join(words)


STAGE_TABLES: dict[str, Callable[[], list[str]]] = {
    function.__name__: function for function in (stages, stages_in_a_run, stage_keys)
}


def filled(page: Path, numbers: Numbers) -> str:
    """Return the text of a page with every block filled. Raises UserError for a block that cannot be."""
    text = page.read_text()
    opened, closed = len(OPENING.findall(text)), len(BLOCK.findall(text))
    if opened != closed or text.count("<!-- end -->") != closed:
        raise UserError(f"{page}: {opened} blocks are opened, {closed} end as they should with <!-- end -->")
    for block in BLOCK.finditer(text):
        is_table = block["kind"] == "table" or block["name"] in TABLES
        if not is_table and not text[: block.start()].rpartition("\n")[2].strip():
            raise UserError(f"{page}: {block['name']} begins a line, which makes the line HTML: put a word before it")
    return BLOCK.sub(lambda block: block["start"] + text_of(block, numbers, page) + block["end"], text)


def text_of(block: re.Match[str], numbers: Numbers, page: Path) -> str:
    """Return what stands between the two marks of a block, which may be of either kind."""
    name = block["name"]
    if block["kind"] == "numbers":
        return block_text(name, numbers, page)
    if name not in STAGE_TABLES:
        raise UserError(f"{page}: table: {name}: expected one of {', '.join(STAGE_TABLES)}")
    return "\n" + "\n".join(STAGE_TABLES[name]()) + "\n"


def block_text(name: str, numbers: Numbers, page: Path) -> str:
    """Return what stands between the two marks: a table on lines of its own, a value within its line."""
    try:
        if name in TABLES:
            return "\n" + "\n".join(TABLES[name](numbers)) + "\n"
        place, form = name.split()
        file, key = place.split(".")
        return FORMATS[form](numbers[file][key])
    except (KeyError, ValueError, TypeError) as error:
        known = ", ".join(TABLES)
        raise UserError(
            f"{page}: numbers: {name}: {type(error).__name__} {error}: expected one of {known}, or FILE.KEY FORMAT with"
            f" a key of docs/numbers/FILE.json and a format of {', '.join(FORMATS)}"
        )


def read_numbers(directory: Path) -> Numbers:
    """Return the content of docs/numbers/. Raises UserError where a file is no JSON object."""
    return {path.stem: read_json(path, "take the numbers again") for path in sorted(directory.glob("*.json"))}


def numbers_of_run(directory: Path) -> dict[str, Any]:
    """Return what the pages may show of a run: its summary.json without paths, means of its training, its alarms."""
    from megatron_papo.training.metrics_log import read_metrics

    file = directory / "summary.json"
    if not file.is_file():
        raise UserError(f"{file}: not there: the run has not ended; bash run_all.sh --name {directory.name} goes on")
    again = f"remove it and start the run again: bash run_all.sh --name {directory.name}"
    summary = read_json(file, again)
    summary.pop("paths", None)
    with reading(directory, again):
        stages = sorted((directory / "iterations").glob("*/megatron"))
        rows = [read_metrics(stage / "metrics.jsonl") for stage in stages]
        training = [{name: mean(step[name] for step in steps) for name in TRAINING} for steps in rows]
        decisions = [json.loads(line) for stage in stages for line in (stage / "guard.jsonl").read_text().splitlines()]
        alarms = {"alarms": len(decisions), "alarm_steps": [decision["step"] for decision in decisions]}
    return summary | {"training": training} | alarms


def take(directory: Path, choice: str) -> None:
    """Write docs/numbers/NAME.json for `choice`, NAME=RUN."""
    name, equals, path = choice.partition("=")
    if not equals or not re.fullmatch(r"\w+", name):
        raise UserError(f"--take {choice}: expected NAME=RUN, e.g. demo_seed1=runs/demo")
    with reading(f"--take {choice}", "give the directory of a run"):
        directory_of_run = Path(expand_home(path))
    text = json.dumps(numbers_of_run(directory_of_run), indent=1)
    (directory / f"{name}.json").write_text(text + "\n")


def main() -> None:
    """Fill the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a page is out of date")
    take_help = "take the numbers of a finished run into docs/numbers/NAME.json first (may be repeated)"
    parser.add_argument("--take", action="append", default=[], metavar="NAME=RUN", help=take_help)
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="where README.md and docs/ are")
    arguments = parser.parse_args()
    if arguments.check and arguments.take:
        parser.error("--check changes nothing: leave --take out")
    docs = arguments.root / "docs"
    for choice in arguments.take:
        take(docs / "numbers", choice)
    numbers = read_numbers(docs / "numbers")
    changed = []
    for page in (arguments.root / "README.md", *sorted(docs.glob("*.md"))):
        text = filled(page, numbers)
        if text != page.read_text():
            changed.append(page)
            if not arguments.check:
                page.write_text(text)
    words = "out of date: run .venv/bin/python -m tools.publish_numbers" if arguments.check else "written"
    for page in changed:
        print(f"{page}: {words}")
    sys.exit(1 if arguments.check and changed else 0)


if __name__ == "__main__":
    run(main)

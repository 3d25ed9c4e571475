"""Puts checkpoints beside each other on the sets that they were evaluated on, with errors, differences and p values.

    .venv/bin/python -m tools.compare runs/grpo runs/papo --baseline grpo --published table1
    .venv/bin/python -m tools.compare runs/papo@0 papo=runs/seed1,runs/seed2,runs/seed3 --baseline runs/papo@0 --vision

A row is a checkpoint, named by a run (its last evaluated iteration), RUN@N (iteration N, 0 before training), an output
of tools.evaluate, or the directory of an iteration or set below one of these. NAME=ROW calls it NAME; NAME=RUN,RUN,...
is one row: the mean over runs that differ in their seed, with its spread.

Rows must have answered the same prompts under the same protocol; the number of samples may differ. A table is printed
with its checkpoints or its sets below each other, whichever is narrower. --format json has fractions, the tables
percent. docs/evaluation.md says how to read the numbers.

reads   protocol.json and predictions.jsonl of stage 7
writes  nothing but standard output
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from megatron_papo.errors import UserError
from megatron_papo.evaluation import published
from megatron_papo.evaluation.comparable import Row
from megatron_papo.evaluation.comparison import Comparison, compare, with_published
from megatron_papo.evaluation.outputs import read_evaluation
from megatron_papo.evaluation.tables import RowsAre, Wanted, as_latex, as_markdown, as_text, grid_of
from megatron_papo.reading import shown
from megatron_papo.run.command_line import run
from megatron_papo.run.records import ImageShown

WRITERS = {"text": as_text, "markdown": as_markdown, "latex": as_latex}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=".venv/bin/python -m tools.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("rows", nargs="*", metavar="[NAME=]RUN[,RUN...]", help="what is compared, in the order of the rows")
    add("--baseline", metavar="ROW", help="name of the row that the others are compared with, or another RUN")
    add("--iteration", type=int, metavar="N", help="of runs that are named without @N (default: the last evaluated)")
    add("--sets", nargs="+", metavar="SET", help="only these sets")
    add(
        "--image",
        choices=get_args(ImageShown),
        default="original",
        help="what was shown of the pictures (default: original)",
    )
    add("--vision", action="store_true", help="lines with the accuracy without the picture, and what the picture gains")
    add(
        "--power",
        action="store_true",
        help="lines with the smallest difference that each set would have shown, and the part of sampling in the error",
    )
    add(
        "--rates",
        action="store_true",
        help="lines with pass@k, maj@k, format, cut off, timed out, unparsed, mean length",
    )
    add("--published", choices=[*published.TABLES], help="published rows beside them, marked as such")
    add("--format", choices=[*WRITERS, "json"], default="text", help="default: text")
    add(
        "--rows-are",
        choices=get_args(RowsAre),
        help="what stands below each other (default: what makes the table narrower; in LaTeX checkpoints)",
    )
    args = parser.parse_args()
    if not args.rows and not args.published:
        parser.error("name a run or an evaluation, or --published table1")
    if args.published and args.image != "original":
        parser.error("published rows are with the pictures: leave --image or --published out")
    if args.baseline is not None and not args.rows:
        parser.error("--baseline has nothing to be compared with: name a run or an evaluation")
    return args


def read_row(text: str, iteration: int | None, sets: Sequence[str] | None) -> Row:
    """Return the row that a user names. Raises UserError.

    Args:
        text: as above.
        iteration: of runs that are named without @N; None: the last one evaluated.
        sets: names of the sets to read; None: all.
    """
    name, members = None, [text]
    if "=" in text and not Path(text).exists():
        name, _, several = text.partition("=")
        members = several.split(",")
        if not name.strip() or not all(members):
            raise UserError(f"{shown(text)}: write NAME=RUN, or NAME=RUN,RUN,... for several training seeds")
    elif "," in text and not Path(text).exists():
        raise UserError(f"{shown(text)}: no such directory: several training seeds need a name, as NAME=RUN,RUN,...")
    runs = [read_evaluation(member, iteration, sets) for member in members]
    if len({evaluation.checkpoint for evaluation in runs}) < len(runs):
        raise UserError(f"{shown(text)}: names one checkpoint twice: a row is over runs of different seeds")
    return Row(runs[0].name if name is None else shown(name), runs)


def read_rows(args: argparse.Namespace) -> tuple[list[Row], str | None]:
    """Return the rows, and the name of the one that is the baseline; one that is no row becomes the first.

    Raises UserError, also for two rows of one name. Where the last parts of two paths are the same, the whole paths are
    the names.
    """
    rows = {text: read_row(text, args.iteration, args.sets) for text in dict.fromkeys(args.rows)}
    baseline = args.baseline
    if baseline is not None and baseline not in rows and baseline not in {row.name for row in rows.values()}:
        row = _baseline_apart(baseline, args, [row.name for row in rows.values()])
        same = [text for text, other in rows.items() if _places(other) == _places(row)]
        rows = rows if same else {baseline: row, **rows}
        baseline = same[0] if same else baseline
    names = [row.name for row in rows.values()]
    for text, row in rows.items():
        if names.count(row.name) > 1 and "=" not in text:
            rows[text] = replace(row, name=shown(text))
    names = [row.name for row in rows.values()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]}: two rows of this name: call one of them something else, as OTHER=RUN")
    return [*rows.values()], rows[baseline].name if baseline in rows else baseline


def _baseline_apart(text: str, args: argparse.Namespace, names: Sequence[str]) -> Row:
    """Return a baseline that is none of the rows by its name. Raises UserError, naming the rows."""
    try:
        return read_row(text, args.iteration, args.sets)
    except UserError as error:
        raise UserError(f"--baseline {shown(text)}: no row of that name, there is {', '.join(names)}; {error}")


def _places(row: Row) -> list[set[Path]]:
    """Return where the outputs lie that a row was read from, by run."""
    return [{one.directory.resolve() for one in run.sets.values()} for run in row.runs]


def main() -> None:
    args = parse()
    rows, baseline = read_rows(args)
    if rows:
        comparison = compare(rows, baseline, args.image)
        if unknown := [name for name in args.sets or [] if name not in comparison.sets]:
            raise UserError(f"--sets {shown(unknown[0])}: no row has it, there is {', '.join(comparison.sets)}")
    else:
        groups = {group: list(members) for group, members in published.GROUPS.items()}
        comparison = Comparison([], list(published.SETS), groups, None, args.image, {}, {}, [])
    if args.published:
        comparison = with_published(comparison, args.published)
    if args.format == "json":
        print(json.dumps(comparison.as_json(), indent=1, allow_nan=False))
    else:
        wanted = Wanted(vision=args.vision, power=args.power, rates=args.rates)
        rows_are: RowsAre | None = args.rows_are or ("checkpoints" if args.format == "latex" else None)
        print(WRITERS[args.format](grid_of(comparison, wanted, rows_are)), end="")


if __name__ == "__main__":
    run(main)

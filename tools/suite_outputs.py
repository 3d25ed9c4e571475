"""The subcommands of tools.suite that read responses: score, export. No server, no model."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_papo.config import BenchmarkConfig, Grading
from megatron_papo.errors import UserError
from megatron_papo.evaluation.joined_passes import JoinedSet, joined_sets
from megatron_papo.evaluation.lmms_eval_files import write_lmms_eval_files
from megatron_papo.evaluation.outputs import read_evaluation
from megatron_papo.evaluation.outside_scores import Grade, answers_of, grading_of
from megatron_papo.evaluation.scores import MeanScore, SetScores, SuiteScores, suite_scores
from megatron_papo.reading import reading, shown
from megatron_papo.run.records import ImageShown

SCORE_HELP = """Grade files of predictions: PAPO-Eval's (JSON lines with prompt, predict, label), or predictions.jsonl
of stage 7.

Files that are several passes over the same prompts are joined: avg@k over all of them. A set is called after its file,
or its place in --suite, or NAME=FILE. Everything is read before anything is graded; what does not belong together
(other prompts, another checkpoint or protocol, the same samples twice) is refused with what differs."""
EXPORT_HELP = """Write an evaluation in the files of another program, e.g. for its viewer or as its baseline.

lmms-eval: DATE_results.json and DATE_samples_SET.jsonl as version 0.7.3 writes them, `score` is avg@k of a prompt."""
AS_IN_THE_FILE = {
    None: "as recorded",
    "mathruler": "by mathruler; of a label the newline at its end is no part",
    "published": "as the authors do: by mathruler, a label ends with a newline, a missing box is the answer None",
    "choice": "as multiple choice; without options in the file, as PAPO-Eval's, by the letter alone: a text is wrong",
}


def add_score_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `score`."""
    parser.formatter_class, parser.description = argparse.RawDescriptionHelpFormatter, SCORE_HELP
    files_help = (
        "a file, a directory of files, a run or RUN@ITERATION, or NAME=FILE,FILE,... for the passes over one set"
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help=files_help)
    suite_help = "configuration file with evaluation.benchmarks: names, groups, gradings and problems of the sets"
    parser.add_argument("--suite", type=Path, metavar="FILE", help=suite_help)
    grading_help = (
        "how to grade, all sets (default: the suite's, else mathruler; predictions of stage 7 as they are recorded)."
        " published: with the newline at the end of the label, as the authors do"
    )
    parser.add_argument("--grading", choices=get_args(Grading), help=grading_help)
    image_help = "of predictions of stage 7, those with these pictures (default: original)"
    parser.add_argument("--image", choices=get_args(ImageShown), default="original", help=image_help)
    passes_help = (
        "how many passes over its prompts each file of PAPO-Eval holds (default: as often as it repeats itself)"
    )
    parser.add_argument("--passes", type=_positive, metavar="K", help=passes_help)
    parser.add_argument("--workers", type=_positive, default=2, metavar="N", help="processes that grade (default: 2)")
    records_help = "also write a JSON line for every response: where it is, its label, its answer, its grade"
    parser.add_argument("--records", type=Path, metavar="FILE", help=records_help)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return number


def score_files(args: argparse.Namespace, suite: Mapping[str, BenchmarkConfig]) -> None:
    """Grade what the user names and print the scores.

    Args:
        args: of the subcommand.
        suite: sets by name; empty without --suite.
    """
    with redirect_stdout(sys.stderr if args.json else sys.stdout):
        sets = joined_sets(args.files, suite, args.image, args.passes)
        gradings = {one.name: grading_of(one, args.grading, suite) for one in sets}
        with _records_file(args.records) as record:
            answers = {
                one.name: answers_of(one, gradings[one.name], suite.get(one.name), args.workers, record) for one in sets
            }
        scores = suite_scores(answers, {one.name: _groups(one, suite) for one in sets})
        for one in sets:
            passes, files = sum(passes.count for passes in one.passes), len(one.files)
            words = f"{passes} of {files} files" if files > 1 else str(passes)
            if any(passes.is_guess for passes in one.passes):
                words += " (lines that repeat, without ids; if they are different pictures of one pass: --passes 1)"
            how = AS_IN_THE_FILE[gradings[one.name]]
            print(f"{shown(one.name)}: {len(one.prompts)} prompts, passes: {words}; graded {how}", flush=True)
    if args.json:
        print(json.dumps(scores.as_json(), indent=1, allow_nan=False))
    else:
        show(scores)


@contextmanager
def _records_file(path: Path | None) -> Iterator[Callable[[Grade], object] | None]:
    """Give what takes grades into a new file, which is there in the end as a whole, or not at all; None without one.

    Raises UserError for a file that is there already, or cannot be written.
    """
    if path is None:
        yield None
        return
    partial = path.with_name(path.name + ".partial")
    with reading(path, "choose another --records"):
        if path.exists():
            raise UserError(f"{shown(path)}: is there already: remove it, or choose another --records")
        stream = open(partial, "w", encoding="utf-8")
    try:
        with stream:
            yield lambda grade: stream.write(grade.model_dump_json() + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _groups(one: JoinedSet, suite: Mapping[str, BenchmarkConfig]) -> list[str]:
    """Return the groups of a set: the suite's, else those that its evaluation was told."""
    if one.name in suite:
        return suite[one.name].groups
    protocol = one.files[0].protocol
    return protocol.groups if protocol else []


def show(scores: SuiteScores) -> None:
    """Print the table of a suite, in percent."""
    table = Table()
    columns = (
        "set",
        "prompts",
        "k",
        "avg@k",
        "\u00b1",
        "pass@k",
        "maj@k",
        "format",
        "cut off",
        "timed out",
        "unparsed",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "set" else "right")
    for name, of_set in scores.sets.items():
        table.add_row(Text(shown(name)), *_cells(of_set))
    means = {**scores.groups, **({"all sets": scores.overall} if len(scores.sets) > 1 else {})}
    for name, mean in means.items():
        table.add_row(Text(shown(name)), "", "", *_mean_cells(mean), style="bold")
    console = Console()
    (console if console.is_terminal else Console(width=10_000)).print(table)
    print("in percent; \u00b1: standard error, clustered by problem; pass@k and maj@k at the k of the row")


def _cells(of_set: SetScores) -> list[str]:
    shares = (of_set.pass_at[of_set.samples_per_prompt], of_set.maj, of_set.format, of_set.cut_off, of_set.timed_out)
    numbers = [f"{of_set.prompts:,}", str(of_set.samples_per_prompt)]
    return [
        *numbers,
        _percent(of_set.avg),
        _percent(of_set.standard_error),
        *map(_percent, shares),
        _percent(of_set.unparsed),
    ]


def _mean_cells(mean: MeanScore) -> list[str]:
    return [_percent(mean.avg), _percent(mean.standard_error)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `export`."""
    parser.formatter_class, parser.description = argparse.RawDescriptionHelpFormatter, EXPORT_HELP
    evaluation_help = "a run, RUN@ITERATION, an output of tools.evaluate, or of stage 7"
    parser.add_argument("evaluation", metavar="EVALUATION", help=evaluation_help)
    parser.add_argument("--form", choices=["lmms-eval"], required=True, help="of which program")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    data_help = "prompts of a single set (default: where its manifest says they were)"
    parser.add_argument("--data", type=Path, metavar="DIR", help=data_help)


def export_evaluation(args: argparse.Namespace) -> None:
    """Write the files of an evaluation and say which."""
    for file in write_lmms_eval_files(read_evaluation(args.evaluation), args.output, args.data):
        print(shown(file, limit=0))

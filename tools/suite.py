"""The sets of a suite: what is on this machine, what is missing, what training and benchmarks have in common.

    .venv/bin/python -m tools.suite list    --suite configs/benchmarks/papo.yaml [--source DIR]
    .venv/bin/python -m tools.suite check   --suite configs/benchmarks/papo.yaml [--source DIR]
    .venv/bin/python -m tools.suite fetch   --suite configs/benchmarks/papo.yaml [--source DIR]
    .venv/bin/python -m tools.suite overlap --suite configs/benchmarks/papo.yaml [--source DIR] --train SOURCE
    .venv/bin/python -m tools.suite score   FILE ... [--suite configs/benchmarks/papo.yaml]
    .venv/bin/python -m tools.suite export  EVALUATION --form lmms-eval --output DIR

A suite is a configuration file with evaluation.benchmarks, or a part of one. Nothing runs and no model is needed; only
`fetch` uses a network. With --json one object is printed, {"sets": {NAME: {"records", "pictures", "missing", ...}}}.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, combinations
from pathlib import Path

from megatron_papo.config import BenchmarkConfig, Config, PromptSource
from megatron_papo.config_files import resolve_config
from megatron_papo.data.hub_files import download, is_offline, sizes_on_hub, there_already, wanted_files
from megatron_papo.data.overlap import Contents, Shared, contents_of, sentences, shared
from megatron_papo.data.rows import read_rows
from megatron_papo.data.set_files import has_known_names, is_hub_name
from megatron_papo.data.set_state import SetState, SuiteLook, on_this_machine
from megatron_papo.errors import UserError
from megatron_papo.reading import shown
from megatron_papo.run.command_line import run
from megatron_papo.run.console import progress_bar
from megatron_papo.run.room import require_room
from tools.prefetch import from_hub
from tools.suite_outputs import add_export_options, add_score_options, export_evaluation, score_files

DEFAULTS = Path(__file__).resolve().parents[1] / "configs" / "published.yaml"
"""What a suite that is a part of a configuration lacks."""


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    sys.exit(args.command(args))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=".venv/bin/python -m tools.suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="{list,check,fetch,overlap,score,export}")

    def add(name: str, command: Callable[[argparse.Namespace], int], told: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=told, description=f"{told[0].upper()}{told[1:]}.")
        added.set_defaults(command=command)
        return added

    add_suite_options(
        add("list", look, "tell where each set is, how many records and pictures are there, and what is missing")
    )
    add_suite_options(add("check", check, "the same, and decode every picture"))
    fetched = "download what is not there yet from the Hugging Face hub, to --source DIR or the libraries' cache"
    add_suite_options(add("fetch", fetch, fetched))
    compared = "count the pictures (by their pixels) and problems (by their text) that sets have in common"
    overlapping = add("overlap", overlap, compared)
    add_suite_options(overlapping)
    train_help = "training data: a .jsonl or .parquet file, a directory of them, or the name of a Hugging Face dataset"
    overlapping.add_argument("--train", required=True, metavar="SOURCE", help=train_help)
    overlapping.add_argument("--split", default="train", metavar="NAME", help="of the training data (default: train)")
    add_score_options(add("score", score, "grade files of predictions, of PAPO-Eval or of this pipeline"))
    add_export_options(add("export", export, "write an evaluation in the files of lmms-eval"))
    return parser.parse_args(arguments)


def add_suite_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a suite."""
    suite_help = "configuration file with evaluation.benchmarks, or a part of one"
    parser.add_argument("--suite", type=Path, required=True, metavar="FILE", help=suite_help)
    source_help = "directory with a local copy of all sets (default: where each set's source says)"
    parser.add_argument("--source", metavar="DIR", help=source_help)
    set_help = "override one value (may be repeated)"
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help=set_help
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def read_suite(suite: Path, overrides: Sequence[str] = (), source: str | None = None) -> Config:
    """Return the configuration that a suite is part of, the published one where it is a part alone. Raises UserError
    where it names no set. source: see --source."""
    moved = [] if source is None else [f"evaluation.source={json.dumps(source)}"]
    settings = ["model.path=unused", *overrides, *moved]
    config = resolve_config(suite, settings, below=DEFAULTS).config
    if not config.evaluation.benchmarks:
        raise UserError(f"{suite}: no evaluation.benchmarks in it: give a suite such as configs/benchmarks/papo.yaml")
    return config


def sets_of(config: Config) -> dict[str, BenchmarkConfig]:
    """Return the sets of a suite."""
    return {name: config.evaluation_sets[name] for name in config.evaluation.benchmarks}


def look(args: argparse.Namespace) -> int:
    """Say what is there of each set; return the exit status."""
    return say(args, read_suite(args.suite, args.overrides, args.source), opens_pictures=False)


def check(args: argparse.Namespace) -> int:
    """Do what `look` does, and decode every picture."""
    return say(args, read_suite(args.suite, args.overrides, args.source), opens_pictures=True)


def say(args: argparse.Namespace, config: Config, opens_pictures: bool) -> int:
    """Say what is there of each set; return 1 where something is missing, else 0."""
    looks = SuiteLook(config.data, opens_pictures)
    states = {}
    for name, source in sets_of(config).items():
        with progress_bar(source.count, name, "rows") as bar:
            bar.leave = False
            states[name] = looks.look_at(name, source, bar.update)
        if not args.json:
            tell(name, source, states[name])
    if not args.json:
        tell_of_all(args, states)
    if args.json:
        places = {name: {"source": source.source, "split": source.split} for name, source in sets_of(config).items()}
        print(json.dumps({"sets": {name: asdict(state) | places[name] for name, state in states.items()}}, indent=1))
    return int(any(state.missing for state in states.values()))


def tell(name: str, source: BenchmarkConfig, state: SetState) -> None:
    """Print what is there of a set, and what is not."""
    groups = f" ({', '.join(source.groups)})" if source.groups else ""
    found = f"{state.records} records of {state.problems} problems, {state.pictures} pictures"
    print(shown(f"{name}{groups}: {found}, split {source.split} of {source.source}", limit=0), flush=True)
    for line in state.missing if state.is_there else ():
        print(shown(f"    missing: {line}", limit=0), flush=True)


def tell_of_all(args: argparse.Namespace, states: Mapping[str, SetState]) -> None:
    """Print of sets that are not there at all why not, the same once for all that it is said of, and what to do."""
    names: dict[str, list[str]] = {}
    for name, state in states.items():
        for line in () if state.is_there else state.missing:
            names.setdefault(line, []).append(name)
    for line, of_sets in names.items():
        print(shown(f"missing: {line} ({', '.join(of_sets)})", limit=0), flush=True)


def fetch(args: argparse.Namespace) -> int:
    """Download the sets that are on the hub, and say what is there then; return the exit status."""
    config = read_suite(args.suite, args.overrides)
    if is_offline():
        raise UserError("HF_HUB_OFFLINE is set: unset it here, where there is a network")
    sets = {name: source for name, source in sets_of(config).items() if is_hub_name(source)}
    for name, source in sets.items():
        if not has_known_names(source):
            raise UserError(
                f"{name}: {source.source} is read by the datasets library: .venv/bin/python -m tools.prefetch --config"
                " FILE downloads it"
            )
    repositories = sorted({source.source for source in sets.values()})
    if args.source and len(repositories) > 1:
        raise UserError(
            f"--source {args.source}: the sets are from {len(repositories)} data sets ({', '.join(repositories)}),"
            " whose files have the same names: leave --source out, and they come into the cache"
        )
    for repository in repositories:
        fetch_from(repository, [source for source in sets.values() if source.source == repository], args)
    return look(args)


def fetch_from(repository: str, sources: Sequence[BenchmarkConfig], args: argparse.Namespace) -> None:
    """Download the files of some sets of one data set. Raises UserError where there is no room, or the hub lacks one.

    Args:
        repository: the data set.
        sources: the sets.
        args: say where to.
    """
    directory = None if args.source is None else Path(args.source)
    with from_hub(repository, "data set"):
        sizes = sizes_on_hub(repository)
    wanted = [wanted_files(source, sizes) for source in sources]
    missing = [line for files in wanted for line in files.missing]
    if missing:
        raise UserError(*missing)
    files = {name: size for each in wanted for name, size in each.sizes.items()}
    left = {name: size for name, size in files.items() if not there_already(repository, name, size, directory)}
    place = "the cache" if directory is None else str(directory)
    print(
        f"{repository}: {len(files)} files, {sum(files.values()) / 1e9:.2f} GB, to {place};"
        f" {sum(left.values()) / 1e9:.2f} GB of them to download",
        file=sys.stderr,
        flush=True,
    )
    if directory is not None:
        require_room(directory, sum(left.values()), "the sets of the suite")
    with from_hub(repository, "data set"):
        download(repository, files, directory)


def overlap(args: argparse.Namespace) -> int:
    """Count what the sets have in common with training data, and with each other; return 0."""
    config = read_suite(args.suite, args.overrides, args.source)

    def read(name: str, source: PromptSource) -> Contents:
        with progress_bar(source.count, f"overlap: {shown(name)}", "rows") as bar:
            return contents_of(read_rows(source, config.data, False), config.data, shown(name), bar.update)

    train = read(f"--train {args.train}", PromptSource(source=args.train, split=args.split))
    outside = {name: source for name, source in sets_of(config).items() if source.source != "synthetic"}
    sets = {name: read(name, on_this_machine(source)) for name, source in outside.items()}
    templates = [config.data.prompt_template, *(source.prompt_template or "{problem}" for source in outside.values())]
    instructions = {sentence for template in templates for sentence in sentences(_behind_the_problem(template))}
    instructions.update(chain(*(contents.common_end or () for contents in (train, *sets.values()))))
    train = train.without(instructions)
    sets = {name: contents.without(instructions) for name, contents in sets.items()}
    with_train = {name: shared(train, contents) for name, contents in sets.items()}
    between = {(first, second): shared(sets[first], sets[second]) for first, second in combinations(sets, 2)}
    if args.json:
        counts = {name: {"rows": sets[name].rows, "unreadable": sets[name].unreadable} for name in sets}
        answer = {
            "train": {"rows": train.rows, "pictures": len(train.pictures), "unreadable": train.unreadable},
            "sets": {name: counts[name] | asdict(with_train[name]) for name in sets},
            "between": [{"sets": pair, **asdict(found)} for pair, found in between.items()],
            "instructions": sorted(instructions),
        }
        print(json.dumps(answer, indent=1))
        return 0
    print(f"train: {train.rows} rows, {len(train.pictures)} pictures, {train.unreadable} unreadable")
    for name, found in with_train.items():
        print(
            f"{name}: {sets[name].rows} rows, {sets[name].unreadable} unreadable; in train as well: {in_words(found)}"
        )
    for (first, second), found in between.items():
        if found.pictures:
            print(f"{second}: in {first} as well: {in_words(found)}")
    if by_text := sum(found.problems > 0 and not found.pictures for found in between.values()):
        print(f"{by_text} pairs of sets have problem texts in common and no picture: --json lists them")
    if instructions:
        print("compared without these sentences at the end:", shown(" | ".join(sorted(instructions)), limit=0))
    return 0


def _behind_the_problem(template: str) -> str:
    return template.format(problem="\0").rpartition("\0")[2]


def in_words(found: Shared) -> str:
    """Return what two sets have in common, as a line says it."""
    return (
        f"{found.pictures} pictures (in {found.records} rows), {found.problems} problem texts, both together in"
        f" {found.records_with_both} rows"
    )


def score(args: argparse.Namespace) -> int:
    """Grade files of predictions; return the exit status."""
    score_files(args, {} if args.suite is None else sets_of(read_suite(args.suite)))
    return 0


def export(args: argparse.Namespace) -> int:
    """Write an evaluation in the files of another program; return the exit status."""
    export_evaluation(args)
    return 0


if __name__ == "__main__":
    run(main, interrupted="interrupted: nothing is half-written; the same command begins again")

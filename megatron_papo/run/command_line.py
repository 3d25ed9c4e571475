"""What every stage and tool has in common on the command line."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_papo.distributed import process_groups
from megatron_papo.errors import UserError


def stage_parser(description: str, *inputs: tuple[str, str], follows: bool = False) -> argparse.ArgumentParser:
    """A parser with --config, --set, --output and one path option per (name, help) of inputs.

    follows: it has --follow, too, which stands for the paths, so that none of them is required here
    (check_paths_given).
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="YAML configuration, e.g. configs/demo.yaml"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value (may be repeated)",
    )
    for name, text in inputs:
        parser.add_argument(f"--{name}", type=Path, required=not follows, metavar="PATH", help=text)
    output_help = "directory to make; complete or absent, never half-written"
    parser.add_argument("--output", type=Path, required=not follows, metavar="DIR", help=output_help)
    if follows:
        follow_help = "run directory: stay for all its iterations, in place of --iteration and the paths"
        parser.add_argument("--follow", type=Path, metavar="RUN", help=follow_help)
    return parser


def check_paths_given(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str], others: Sequence[str] = ()
) -> None:
    """Without --follow all of `names` must be given; with it neither they nor `others` (options that need not be)
    may."""
    given = [name for name in (*names, *others) if getattr(args, name) is not None]
    missing = [name for name in names if name not in given]
    if args.follow is None and missing:
        parser.error("the following arguments are required: " + ", ".join(f"--{name}" for name in missing))
    if args.follow is not None and given:
        parser.error(
            f"--follow {args.follow} stands for " + ", ".join(f"--{name}" for name in given) + ": leave them out"
        )


def run(main: Callable[[], None]) -> None:
    """Runs a command and leaves; a UserError becomes `error: ...` lines on stderr and exit status 2."""
    status = 0
    try:
        main()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    process_groups.leave(status)

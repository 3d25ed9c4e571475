"""What every stage and tool has in common on the command line."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_papo.errors import UserError
from megatron_papo.training import parallel


def stage_parser(description: str, *inputs: tuple[str, str]) -> argparse.ArgumentParser:
    """A parser with --config, --set, --output and one required path option per (name, help) of inputs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML configuration, e.g. configs/demo.yaml")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value (may be repeated)"
    )
    for name, text in inputs:
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="PATH", help=text)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make; complete or absent, never half-written")
    return parser


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
    parallel.leave(status)

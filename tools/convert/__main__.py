"""Convert, compare and describe checkpoints by hand, with the functions of stages 3 and 6 and without a configuration.

    .venv/bin/python -m tools.convert to-megatron --hf DIR --output DIR [--dtype D]
    .venv/bin/python -m tools.convert to-hf --megatron DIR --output DIR [--dtype D] [--shard-size 5GB]
    .venv/bin/python -m tools.convert verify A B [--logits]
    .venv/bin/python -m tools.convert inspect DIR
    .venv/bin/python -m tools.convert benchmark --geometry {tiny,3b,7b,32b,72b} [--directory D]

to-megatron and to-hf leave what stage 3 and stage 6 leave (manifest and proof included). verify compares two
checkpoints of either kind tensor by tensor, bit for bit, and exits with 1 if they differ. inspect prints one JSON
object. benchmark's last line is one, too.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run
from tools.convert.geometry import NAMES

DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse() -> argparse.Namespace:
    """Return the command line, parsed."""
    parser = argparse.ArgumentParser(
        prog=".venv/bin/python -m tools.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, source, text in (("to-megatron", "hf", "Hugging Face"), ("to-hf", "megatron", "Megatron")):
        command = commands.add_parser(name, help=f"from a {text} checkpoint")
        command.add_argument(
            f"--{source}", dest="source", type=Path, required=True, metavar="DIR", help=f"{text} checkpoint directory"
        )
        command.add_argument(
            "--output", type=Path, required=True, metavar="DIR", help="directory to make; complete or absent"
        )
        command.add_argument("--dtype", choices=DTYPES, help="convert every tensor to it (default: as they are)")
        if name == "to-hf":
            shards = (
                "cut into files of at most this size, under official names, e.g. 5GB (default: the files it came from)"
            )
            command.add_argument("--shard-size", metavar="SIZE", help=shards)
    command = commands.add_parser("verify", help="compare two checkpoints")
    for name in ("first", "second"):
        command.add_argument(name, type=Path, metavar="DIR", help="a checkpoint directory of either kind")
    logits = (
        "also compare logits on a seeded picture and prompt: Hugging Face by transformers, Megatron by this package;"
        " in float32"
    )
    command.add_argument("--logits", action="store_true", help=logits)
    command = commands.add_parser("inspect", help="what a checkpoint holds")
    command.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint directory of either kind")
    command = commands.add_parser("benchmark", help="both directions against a plain copy")
    command.add_argument("--geometry", choices=NAMES, required=True, help="of which published model, or tiny")
    command.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="where to work; needs twice the model (default: the temporary one)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.command == "verify":
        verify(arguments.first, arguments.second, arguments.logits)
    elif arguments.command == "inspect":
        from megatron_papo.checkpoint.inspect import describe

        print(json.dumps(describe(arguments.directory), indent=1))
    elif arguments.command == "benchmark":
        from tools.convert.benchmark import benchmark

        print(json.dumps(benchmark(arguments.geometry, arguments.directory)))
    else:
        convert(arguments)


def convert(arguments: argparse.Namespace) -> None:
    """Run to-megatron or to-hf."""
    from megatron_papo.checkpoint import conversion_output

    options = conversion_output.Options()
    if arguments.dtype:
        options["dtype"] = arguments.dtype
    if arguments.command == "to-megatron":
        conversion_output.to_megatron(arguments.source, arguments.output, options)
        return
    if arguments.shard_size:
        options["shard_bytes"] = parse_size(arguments.shard_size)
    conversion_output.to_hf(arguments.source, arguments.output, options)


def parse_size(text: str) -> int:
    """Return 5_000_000_000 for "5GB". Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise UserError(f"--shard-size {text}: expected a size such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def verify(first: Path, second: Path, with_logits: bool) -> None:
    """Print in what two checkpoints differ and exit with 1 if they do, else with 0."""
    from megatron_papo.checkpoint.conversion_output import byte_progress
    from megatron_papo.checkpoint.convert import open_checkpoint
    from megatron_papo.checkpoint.verify import differences

    a, b = open_checkpoint(first), open_checkpoint(second)
    with byte_progress("compare", a, passes=1) as progress:
        complaints = list(differences(a, b, progress))
    for line in complaints:
        print(line)
    result = f"{len(complaints)} tensors differ" if complaints else f"all {len(a.tensors)} tensors are equal"
    print(f"{first} and {second}: {result}")
    if with_logits:
        from megatron_papo.checkpoint.logits import compare_logits

        complaints += compare_logits(first, second)
    sys.exit(1 if complaints else 0)


if __name__ == "__main__":
    run(main)

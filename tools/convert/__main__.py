"""Convert and compare checkpoints by hand, with the functions of stages 3 and 6 and without a configuration.

    python -m tools.convert to-megatron --hf DIR --output DIR
    python -m tools.convert to-hf --megatron DIR --output DIR
    python -m tools.convert verify A B

to-megatron and to-hf leave what stage 3 and stage 6 leave (manifest and proof included); an unmanaged source is hashed as it is.
verify compares two checkpoints of either kind tensor by tensor, bit for bit, and exits with 1 if they differ.
"""

import argparse
import sys
from pathlib import Path

from megatron_papo.command_line import run
from megatron_papo.manifest import StageOutput, input_fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, source, text in (("to-megatron", "hf", "Hugging Face"), ("to-hf", "megatron", "Megatron")):
        command = commands.add_parser(name, help=f"from a {text} checkpoint")
        command.add_argument(f"--{source}", dest="source", type=Path, required=True, metavar="DIR", help=f"{text} checkpoint directory")
        command.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make; complete or absent")
    command = commands.add_parser("verify", help="compare two checkpoints")
    for name in ("first", "second"):
        command.add_argument(name, type=Path, metavar="DIR", help="a checkpoint directory of either kind")
    arguments = parser.parse_args()
    if arguments.command == "verify":
        verify(arguments.first, arguments.second)
    elif arguments.command == "to-megatron":
        to_megatron(arguments.source, arguments.output)
    else:
        to_hf(arguments.source, arguments.output)


def to_megatron(source: Path, output: Path) -> None:
    fingerprint = input_fingerprint(source, "give --hf the directory of a Qwen2.5-VL checkpoint")
    out = StageOutput("stage3_convert_to_megatron", output, None, sections=[], inputs={"hf": fingerprint})
    if out.done:
        out.announce_done()
        return
    from megatron_papo.checkpoint.convert import HFCheckpoint, hf_to_megatron
    from megatron_papo.checkpoint.progress import byte_progress

    checkpoint = HFCheckpoint(source)
    with out, byte_progress("convert to Megatron and verify", checkpoint) as progress:
        hf_to_megatron(checkpoint, out.partial, progress)
        out.counts["tensors"] = len(checkpoint.tensors)


def to_hf(source: Path, output: Path) -> None:
    fingerprint = input_fingerprint(source, "give --megatron the directory of a Megatron checkpoint")
    out = StageOutput("stage6_convert_to_hf", output, None, sections=[], inputs={"megatron": fingerprint})
    if out.done:
        out.announce_done()
        return
    from megatron_papo.checkpoint.convert import MegatronCheckpoint, megatron_to_hf
    from megatron_papo.checkpoint.progress import byte_progress

    checkpoint = MegatronCheckpoint(source)
    with out, byte_progress("convert to Hugging Face and verify", checkpoint) as progress:
        megatron_to_hf(checkpoint, out.partial, progress)
        out.counts["tensors"] = len(checkpoint.tensors)


def verify(first: Path, second: Path) -> None:
    from megatron_papo.checkpoint.convert import open_checkpoint
    from megatron_papo.checkpoint.progress import byte_progress
    from megatron_papo.checkpoint.verify import differences

    a, b = open_checkpoint(first), open_checkpoint(second)
    with byte_progress("compare", a, passes=1) as progress:
        found = list(differences(a, b, progress))
    for line in found:
        print(line)
    print(f"{first} and {second}: " + (f"{len(found)} tensors differ" if found else f"all {len(a.tensors)} tensors are equal"))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    run(main)

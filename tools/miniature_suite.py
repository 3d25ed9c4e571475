"""Make the nine sets of PAPO's tables in miniature: counting problems in the files of the authors' release.

    .venv/bin/python -m tools.miniature_suite --output DIR [--problems 8] [--seed 1]
    .venv/bin/python -m tools.suite check --suite DIR/miniature.yaml

Writes DIR with the tables and archives, and DIR/miniature.yaml, a suite that reads them: configs/benchmarks/papo.yaml
with what the demo's tiny model needs (docs/evaluation.md).
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path

from megatron_papo.config import SyntheticTaskConfig
from megatron_papo.errors import UserError
from megatron_papo.reading import read_text, reading
from megatron_papo.run.command_line import run
from megatron_papo.synthetic.miniature import write_miniature

HEAD = """# The nine sets of configs/benchmarks/papo.yaml in miniature, made by tools.miniature_suite and evaluated as
# those are, but for the length of responses. All are read from evaluation.source, whatever `source` each of them has.
"""
PAPO = Path(__file__).resolve().parents[1] / "configs" / "benchmarks" / "papo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    add("--problems", type=int, default=8, metavar="N", help="problems of each set (default: 8)")
    add("--seed", type=int, default=1, metavar="N", help="of all that is drawn (default: 1)")
    args = parser.parse_args()
    if args.problems < 1:
        raise UserError(f"--problems {args.problems}: give 1 or more")
    if args.output.exists():
        raise UserError(f"{args.output}: exists already: remove it or choose another directory")
    with reading(args.output, "choose another directory"):
        args.output.mkdir(parents=True)
        counts = write_miniature(args.output, SyntheticTaskConfig(), args.seed, args.problems)
        (args.output / "miniature.yaml").write_text(suite_of(args.output, counts))
    print(f"{args.output}: {', '.join(f'{name} {count}' for name, count in counts.items())} rows")


def suite_of(directory: Path, counts: Mapping[str, int]) -> str:
    """Return the suite file of a miniature: the published one, read from its directory.

    Args:
        directory: of the miniature.
        counts: rows of its sets.
    """
    text = read_text(PAPO, "check the repository out again")
    for name, count in counts.items():
        text = re.sub(rf"^(    {name}: +)# \d+ rows$", rf"\1# {count} rows", text, count=1, flags=re.MULTILINE)
    text = re.sub(r"\A(#.*\n)+", HEAD, text)
    source = json.dumps(str(directory.absolute()))
    ours = {"source": source, "max_response_tokens": "20"}
    for key, value in ours.items():
        text = re.sub(rf"^  {key}: .*$", f"  {key}: {value}", text, count=1, flags=re.MULTILINE)
    return (
        text + "\ndata:\n  max_prompt_tokens: 1024             # the tiny model takes 4096 tokens, responses included\n"
    )


if __name__ == "__main__":
    run(main)

"""Deletes the weights of a run's older Megatron checkpoints, as keep_checkpoints of the configuration says. run_all.sh
calls it after stage 6.

    python -m tools.keep_checkpoints --config FILE --iterations runs/NAME/iterations --newest 7

What is kept, and when nothing is deleted: megatron_papo/checkpoint/keep.py.
"""

import argparse
from pathlib import Path

from megatron_papo.checkpoint.keep import keep_newest
from megatron_papo.config_files import load_config
from megatron_papo.run.command_line import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument(
        "--iterations", type=Path, required=True, metavar="DIR", help="directory of the run's iterations"
    )
    parser.add_argument(
        "--newest", type=int, required=True, metavar="N", help="number of the iteration that has just been finished"
    )
    arguments = parser.parse_args()
    keep_newest(load_config(arguments.config, arguments.overrides), arguments.iterations, arguments.newest)


if __name__ == "__main__":
    run(main)

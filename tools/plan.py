"""Prints what run_all.sh must know of a configuration, as shell assignments.

    eval "$(python -m tools.plan --config configs/demo.yaml --set seed=2)"

BASE_MODEL is empty where stage 1 makes the model. Mistakes in the configuration are found here, before anything runs.
"""

import argparse
import shlex
from pathlib import Path

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.model.parallel_sizes import check_parallel_sizes
from megatron_papo.run.command_line import run

STAGES = range(1, 8)


def parse_stages(text: str) -> list[int]:
    """ "1,4-6" -> [1, 4, 5, 6]; "all" -> all seven."""
    if text == "all":
        return list(STAGES)
    chosen = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            raise UserError(f"--stages {text}: expected numbers from 1 to 7 such as 1,2,4-6, or all")
        chosen |= set(range(int(first), int(last or first) + 1))
    if not chosen or not chosen <= set(STAGES):
        raise UserError(f"--stages {text}: expected numbers from 1 to 7 such as 1,2,4-6, or all")
    return sorted(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--stages", default="all", help="e.g. 1,2,4-6 (default: all)")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    if config.model.path is not None and Path(config.model.path).is_dir():
        check_parallel_sizes(read_hf_config(Path(config.model.path)), config.parallel)
    for name, value in {
        "BASE_MODEL": config.model.path or "",
        "ITERATIONS": config.iterations,
        "SFT_PROCESSES": config.sft.processes if config.sft else 0,
        "TRAIN_PROCESSES": config.parallel.world_size,
        "ROLLBACK_ITERATIONS": config.hacking_guard.rollback_iterations,
        "STAGES": " ".join(map(str, parse_stages(args.stages))),
    }.items():
        print(f"{name}={shlex.quote(str(value))}")


if __name__ == "__main__":
    run(main)

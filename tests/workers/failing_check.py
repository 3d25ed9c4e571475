"""Run under torchrun: a check that fails on some ranks.

torchrun --nproc-per-node 2 failing_check.py RANK ...   (the ranks that fail)
"""

import sys
import time

from megatron_papo.distributed import collectives, process_groups
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run


def main() -> None:
    with collectives.first_process_speaks():
        if str(process_groups.rank()) in sys.argv[1:]:
            raise UserError("rollouts.jsonl: cannot be read", "is the disk mounted here?")
    time.sleep(60)  # a rank that passed waits for the others


if __name__ == "__main__":
    run(main)

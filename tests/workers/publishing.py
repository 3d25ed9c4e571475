"""One process of several that make an output, which the first one publishes.

    publishing.py OUTPUT HOW GIGABYTES

HOW: together, as the stages do it; alone, the first one publishes while the others leave; taken, another process has
put something into the output's place.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

from megatron_papo.distributed import collectives, process_groups
from megatron_papo.run.command_line import run
from megatron_papo.run.stage_output import StageOutput


def main() -> None:
    output, how, gigabytes = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    process_groups.connect()
    out = StageOutput("stage_of_test", output, {}, {})

    def work() -> None:
        """A file of zeros that takes no room, but as long to hash as another one."""
        if process_groups.is_main_rank():
            with open(out.partial / "weights", "wb") as stream:
                stream.truncate(int(gigabytes * 1e9))
        elif how == "taken":
            (output / "other").mkdir(parents=True)

    if how == "alone":
        with out if process_groups.is_main_rank() else nullcontext():
            collectives.barrier()
            work()
            collectives.barrier()
    else:
        with collectives.within_first_process(out):
            work()
    print(f"rank {process_groups.rank()} leaves, published: {(output / 'manifest.json').is_file()}", flush=True)
    process_groups.disconnect()


if __name__ == "__main__":
    run(main)

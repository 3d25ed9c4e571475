"""torchrun, but a stage that fails has said why: no post-mortem of forty lines after its one, and its own exit status.

    .venv/bin/python -m tools.torchrun --standalone --nproc-per-node 4 -m stages.stage5_train --run runs/demo ...

Takes torchrun's arguments and starts processes as it does. `--` before the program may be left out: torchrun itself
takes a stage's --run for its own --run-path without it.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

NOISY = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")
"""They repeat on several lines which process they end because another one has ended."""


def with_separator(arguments: Sequence[str]) -> list[str]:
    """Return torchrun's arguments with `--` before the module that -m names."""
    arguments = list(arguments)
    if "-m" in arguments and "--" not in arguments:
        arguments.insert(arguments.index("-m") + 1, "--")
    return arguments


def main() -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which then says so in five lines
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(with_separator(sys.argv[1:])))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(
                f"error: rank {rank} was ended by {name}" + " (out of memory?)" * (name == "SIGKILL"), file=sys.stderr
            )
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except SignalException as ended:
        sys.exit(128 + ended.sigval)


if __name__ == "__main__":
    main()

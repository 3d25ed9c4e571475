"""torchrun, but a stage that fails has said why: no post-mortem of forty lines after its one, and its own exit status.

    .venv/bin/python -m tools.torchrun --standalone --nproc-per-node 4 -m stages.stage5_train --run runs/demo ...

Takes torchrun's arguments and starts processes as it does. `--` before the program may be left out: torchrun itself
takes a stage's --run for its own --run-path without it. With --standalone, the processes meet on the loopback
interface, where torchrun listens on all; nothing is left in the temporary directory; and what another launcher has left
in the environment (PET_NNODES, RANK, ...) does not count, nor does PYTHONPATH.
"""

import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence

from megatron_papo.distributed.process_groups import LAUNCHED, LAUNCHER_PID, LOOPBACK, OF_TORCHRUN

NOISY = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")
"""They repeat on several lines which process they end because another one has ended."""


def with_separator(arguments: Sequence[str]) -> list[str]:
    """Return torchrun's arguments with `--` before the module that -m names."""
    arguments = list(arguments)
    if "-m" in arguments and "--" not in arguments:
        arguments.insert(arguments.index("-m") + 1, "--")
    return arguments


def make_environment(standalone: bool) -> None:
    """Leave in the environment what the processes are to get: for one machine, nothing of another launcher."""
    os.environ.pop("PYTHONPATH", None)
    if standalone:
        for name in list(os.environ):
            if name in LAUNCHED + OF_TORCHRUN or name.startswith(("TORCHELASTIC_", "PET_")):
                del os.environ[name]
        for name, value in LOOPBACK.items():
            os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which then says so in five lines


def for_one_machine(arguments: Namespace) -> Namespace:
    """Return torchrun's parsed arguments with what --standalone means here."""
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    from tools import loopback

    rendezvous_handler_registry.register(loopback.BACKEND, loopback.create)
    arguments.standalone = False
    arguments.nnodes, arguments.rdzv_id = "1:1", "one"
    arguments.rdzv_backend, arguments.rdzv_endpoint = loopback.BACKEND, f"{loopback.ADDRESS}:0"
    arguments.local_addr = loopback.ADDRESS
    return arguments


def main() -> None:
    make_environment(standalone="--standalone" in sys.argv)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        arguments = run.parse_args(with_separator(sys.argv[1:]))
        if arguments.standalone and arguments.nnodes not in ("1", "1:1"):
            print(
                f"error: --standalone is for one machine, --nnodes is {arguments.nnodes}: leave it out, and give"
                " --rdzv-backend c10d --rdzv-endpoint HOST:PORT, a port of one of the nodes",
                file=sys.stderr,
            )
            sys.exit(2)
        arguments.log_dir = arguments.log_dir or os.devnull  # else a directory in /tmp, for ever
        os.environ[LAUNCHER_PID] = str(os.getpid())
        run.run(for_one_machine(arguments) if arguments.standalone else arguments)
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

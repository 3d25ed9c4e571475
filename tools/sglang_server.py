"""Start, find and stop the SGLang servers of a run by hand; the stages do the same by themselves.

    .venv/bin/python -m tools.sglang_server start  --server DIR --config FILE --model HF_DIR [--set SECTION.KEY=VALUE]
    .venv/bin/python -m tools.sglang_server status --server DIR      exit status 0 if all are healthy, 1 if not
    .venv/bin/python -m tools.sglang_server stop   --server DIR

DIR holds server.json and server.log, for example runs/demo/server; FILE gives the section server and model.dtype. With
SERVER_LAUNCHER, a command that runs what follows it once on each node (srun --ntasks-per-node=1 ...), servers are
started on all of its nodes; then DIR, on a file system that all of them see, holds node_NAME/server.json and so on.
"""

import argparse
import sys
from pathlib import Path

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import choose_device, run
from megatron_papo.sglang.server import connect_or_start_all, status, stop_all, urls_of


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    start, *others = (actions.add_parser(name) for name in ("start", "status", "stop"))
    for action in (start, *others):
        action.add_argument("--server", type=Path, required=True, metavar="DIR", help="server directory")
    start.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML configuration")
    start.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    start.add_argument("--model", type=Path, required=True, metavar="HF_DIR", help="checkpoint to load first")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if urls_of(str(arguments.server)) is not None:
        raise UserError(f"--server {arguments.server}: servers of a directory are started and stopped here")
    if arguments.action == "start":
        config = load_config(arguments.config, arguments.overrides)
        choose_device(config)
        servers = connect_or_start_all(arguments.server, arguments.model, config.server, config.model.dtype)
        print(f"{arguments.server}: running at {', '.join(server.name for server in servers)}")
    elif arguments.action == "status":
        replicas = status(arguments.server)
        print("\n".join(line for _, line in replicas))
        sys.exit(0 if all(usable for usable, _ in replicas) else 1)
    else:
        stopped = stop_all(arguments.server)
        print(f"{arguments.server}: {f'stopped {stopped} server(s)' if stopped else 'no server was running'}")


if __name__ == "__main__":
    run(main)

"""Start, find and stop the SGLang servers of a run by hand; the stages do the same by themselves.

    python -m tools.sglang_server start  --server DIR --config FILE --model HF_DIR [--set SECTION.KEY=VALUE]
    python -m tools.sglang_server status --server DIR      exit status 0 if all are healthy, 1 if not
    python -m tools.sglang_server stop   --server DIR
    python -m tools.sglang_server sampling-defaults --model HF_DIR      JSON for --preferred-sampling-params of servers behind sglang-router

DIR holds server.json and server.log, for example runs/demo/server.
"""

import argparse
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

from megatron_papo.config_files import load_config
from megatron_papo.data.chat import forbidden_tokens
from megatron_papo.run.command_line import run
from megatron_papo.sglang import server as sglang_server
from megatron_papo.sglang.requests import logit_bias


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("start", "status", "stop"):
        action = actions.add_parser(name)
        action.add_argument("--server", type=Path, required=True, metavar="DIR", help="server directory")
        if name == "start":
            action.add_argument(
                "--config", type=Path, required=True, metavar="FILE", help="YAML configuration: server and model.dtype"
            )
            action.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
            action.add_argument(
                "--model", type=Path, required=True, metavar="HF_DIR", help="Hugging Face checkpoint to load first"
            )
    defaults = actions.add_parser("sampling-defaults")
    defaults.add_argument(
        "--model", type=Path, required=True, metavar="HF_DIR", help="Hugging Face checkpoint, for its vocabulary"
    )
    arguments = parser.parse_args()
    if arguments.action == "start":
        config = load_config(arguments.config, arguments.overrides)
        servers = sglang_server.connect_or_start_all(
            arguments.server, arguments.model, config.server, config.model.dtype
        )
        print(f"{arguments.server}: running at {', '.join(server.url for server in servers)}")
    elif arguments.action == "sampling-defaults":
        vocabulary = Tokenizer.from_file(str(arguments.model / "tokenizer.json")).get_vocab(with_added_tokens=True)
        print(json.dumps({"logit_bias": logit_bias(forbidden_tokens(arguments.model, vocabulary))}))
    elif arguments.action == "status":
        found = sglang_server.status(arguments.server)
        print("\n".join(line for _, line in found))
        sys.exit(0 if all(usable for usable, _ in found) else 1)
    else:
        stopped = sglang_server.stop_all(arguments.server)
        print(f"{arguments.server}: {f'stopped {stopped} server(s)' if stopped else 'no server was running'}")


if __name__ == "__main__":
    run(main)

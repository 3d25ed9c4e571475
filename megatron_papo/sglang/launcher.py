"""Start the SGLang server with its key from stdin.

    echo KEY | PYTHON_OF_SGLANG -P megatron_papo/sglang/launcher.py --model-path DIR [any flag of sglang.launch_server]

On a command line everybody on the machine could read it, and SGLang would write it into its log. This file runs in
SGLang's environment and imports nothing of megatron_papo.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any


class Key(str):
    """An API key that is not copied into what SGLang prints of its settings; a child process gets it as it is."""

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return "(not shown)"

    def __repr__(self) -> str:
        return "'(not shown)'"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, ("".join(self),)


def read_key() -> Key:
    """Return the first line of stdin, and leave nothing there for others.

    Whoever starts a server tells it its key once the server is on record: without one, nobody will ever ask for it.
    """
    key = Key(sys.stdin.readline().strip())
    if not key:
        sys.exit("no key on stdin: the process that wanted a server has ended")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return key


def serve(arguments: Sequence[str]) -> None:
    """Run SGLang's server until it ends, and end what it has started."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    try:
        server_args = prepare_server_args(list(arguments))
        server_args.api_key = read_key()
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    serve(sys.argv[1:])

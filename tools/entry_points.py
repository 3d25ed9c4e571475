"""The commands that an installation puts on the PATH (pyproject.toml, [project.scripts]).

Each is `python -m` of the module that it imports, with the same arguments, and works from any directory. The imports
stand inside the functions, so that `papo-convert --help` does not load what the others need.
"""

from megatron_papo.run.command_line import run


def convert() -> None:
    """Run `python -m tools.convert`."""
    from tools.convert.__main__ import main

    run(main)


def check_parity() -> None:
    """Run `python -m tools.check_parity`."""
    from tools.check_parity import main

    run(main)


def show_config() -> None:
    """Run `python -m tools.show_config`."""
    from tools.show_config import main

    run(main)


def status() -> None:
    """Run `python -m tools.status`."""
    from tools.status import main

    run(main)


def sglang_server() -> None:
    """Run `python -m tools.sglang_server`."""
    from tools.sglang_server import main

    run(main)

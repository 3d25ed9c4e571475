"""The documented name of tools.benchmark.layout."""

from megatron_papo.run.command_line import run
from tools.benchmark.layout import main

if __name__ == "__main__":
    run(main)

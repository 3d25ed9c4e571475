"""The documented name of tools.benchmark.host."""

from megatron_papo.run.command_line import run
from tools.benchmark.host import main

if __name__ == "__main__":
    run(main)

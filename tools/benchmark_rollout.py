"""The documented name of tools.benchmark.rollout."""

from megatron_papo.run.command_line import run
from tools.benchmark.rollout import main

if __name__ == "__main__":
    run(main)

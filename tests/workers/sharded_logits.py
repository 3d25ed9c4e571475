"""Run under torchrun: token_statistics over a vocabulary sharded over 2 and 4 ranks; each rank saves its values and
gradient.

torchrun --nproc-per-node 4 sharded_logits.py DIRECTORY   (the numbers: tests/model/test_log_probs.py)
"""

import sys
from pathlib import Path

import torch

from megatron_papo.distributed import process_groups
from megatron_papo.run.command_line import run
from tests.model.test_log_probs import example, ours, over_allowed_tokens, weights_of


def main() -> None:
    process_groups.connect()
    rank = process_groups.rank()
    for size in (2, 4):
        groups = [torch.distributed.new_group(list(range(start, start + size))) for start in range(0, 4, size)]
        group = groups[rank // size]
        for forbidden in (False, True):
            logits, positions, tokens = example(seed=7)
            if forbidden:
                logits[:, 12:18] = -torch.inf
                tokens = tokens % 12
            mine = logits.chunk(size, dim=1)[group.rank()].contiguous()
            found = ours(mine, positions, tokens, weights_of(positions), group)
            if rank < size:
                torch.save(found, Path(sys.argv[1]) / f"{size}_{forbidden}_{rank}.pt")
                allowed = over_allowed_tokens(mine, positions, tokens, group)
                torch.save(allowed, Path(sys.argv[1]) / f"allowed_{size}_{forbidden}_{rank}.pt")
    process_groups.disconnect()


if __name__ == "__main__":
    run(main)

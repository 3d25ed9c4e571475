"""A check that fails on some ranks is told once, and by the rank where it failed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def errors_where(*ranks):
    """-> the lines on stderr that begin with "error: ", with two processes of which these ranks fail."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    worker = str(ROOT / "tests/workers/failing_check.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*torchrun, worker, *map(str, ranks)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    "ranks, lines",
    [
        ([1], ["error: rank 1: rollouts.jsonl: cannot be read", "error: rank 1: is the disk mounted here?"]),
        ([0, 1], ["error: rollouts.jsonl: cannot be read", "error: is the disk mounted here?"]),
        ([0], ["error: rollouts.jsonl: cannot be read", "error: is the disk mounted here?"]),
    ],
    ids=["one rank alone", "all alike", "the first alone"],
)
def test_a_failed_check_is_told_once_and_by_the_rank_that_failed(ranks, lines):
    assert errors_where(*ranks) == lines

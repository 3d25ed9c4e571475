"""tools.benchmark_host, small: what it counts is what can be counted by hand, and it notices a thread that waits."""

import json

import pytest

from tests.helpers import run_module
from tests.workers.host_counts import SMALL
from tools.benchmark.host import GROUPS_OF_STEP, STEPS

LAYERS = 4 + 3
"""Of the tiny geometry's decoder and vision tower."""
SWEEPS = 2 + 2 / 3
"""Reference, masked pictures and, of two steps in three, the old policy."""


def test_counts_by_hand():
    """2 groups of 5 in one micro-batch; in the update forward, forward again (recompute) and backward."""
    result = run_module("tests.workers.host_counts", timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["counted"]["attention"] == pytest.approx((SWEEPS + 3) * LAYERS / 10)  # one call a layer
    assert found["counted"]["waits"] == 0 < found["counted"]["kernels"]
    assert found["one by one"] == [0, 1, 3]
    copies = 6  # token ids, positions, places, tokens and mask of the responses, pictures
    assert found["blocking"]["waits"] == pytest.approx(copies * (SWEEPS + 1) / 10)  # the control


def test_report():
    options = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = run_module("tools.benchmark_host", *options, "--repeat", 1, "--json", timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert found["pictures_prepared"] == found["pictures_distinct"] == 2 * STEPS * GROUPS_OF_STEP
    assert found["iteration_seconds_ratio"] == found["iteration_seconds_plain"] / found["iteration_seconds_group"]
    assert found["kernels_plain"] > found["kernels_group"]

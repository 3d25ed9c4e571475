"""tools.benchmark_host, small: what it counts is what can be counted by hand, and it notices a thread that waits."""

import json
from argparse import Namespace

import torch

from megatron_papo.config_files import load_config
from tests.helpers import run_module
from tools.benchmark import host

SMALL = dict(geometry="tiny", groups=2, prompt_tokens=60, response_tokens=10, picture_tokens=42, config=host.PRESET)
LAYERS = 4 + 3
"""Of the tiny geometry's decoder and vision tower."""


def test_counts_by_hand(monkeypatch):
    """2 groups of 5 in one micro-batch; reference, masked pictures and, of two steps in three, the old policy; then
    forward, forward again (recompute) and backward: one attention call a layer each."""
    found = host.counted(Namespace(**SMALL), load_config(host.PRESET))
    passes = 2 + 2 / 3 + 3
    assert abs(found["attention"] - passes * LAYERS / 10) < 1e-9
    assert found["waits"] == 0 < found["kernels"]

    from megatron_papo.training import collator

    monkeypatch.setattr(collator, "to_device", lambda tensor, device: tensor.to(device))  # the control: it waits
    blocking = host.counted(Namespace(**SMALL), load_config(host.PRESET))
    copies = 6  # token ids, positions, places, tokens and mask of the responses, pictures
    assert abs(blocking["waits"] - copies * (2 + 2 / 3 + 1) / 10) < 1e-9


def test_a_value_that_is_read_is_a_wait():
    from megatron_papo.plan.fake_device import DEVICE, FakeDevice

    ledger = host.HostLedger()
    with (
        FakeDevice(
            0, load_config(host.DEMO_CONFIG, [*host.ONE_PROCESS, "parallel.sequence_parallel=false"]).parallel, ledger
        ),
        host.Copies(ledger),
    ):
        there = torch.zeros(3).to(DEVICE, non_blocking=True)
        assert ledger.waits == 0
        int(there.sum().to(torch.int64))
        assert ledger.waits == 1
        torch.zeros(3).to(DEVICE)
        torch.tensor([1.0], device=DEVICE)
        assert ledger.waits == 3


def test_report():
    numbers = {name: value for name, value in SMALL.items() if name != "config"}
    options = [part for name, value in numbers.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = run_module("tools.benchmark_host", *options, "--repeat", 1, "--json", timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert found["pictures_prepared"] == found["pictures_distinct"] == 2 * host.STEPS * host.GROUPS_OF_STEP
    assert found["iteration_seconds_ratio"] == found["iteration_seconds_plain"] / found["iteration_seconds_group"]
    assert found["kernels_plain"] > found["kernels_group"]

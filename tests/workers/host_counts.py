"""What tools.benchmark_host counts, small, in a process of its own (a fake device and a real process group do not share
one): `host_counts.py` prints one JSON object."""

import json
from argparse import Namespace

import torch

from megatron_papo.config_files import load_config
from megatron_papo.plan.fake_device import DEVICE, FakeDevice
from megatron_papo.training import collator
from tools.benchmark import host

SMALL = dict(geometry="tiny", groups=2, prompt_tokens=60, response_tokens=10, picture_tokens=42)


def counted():
    return host.counted(Namespace(**SMALL, config=host.PRESET), load_config(host.PRESET))


def waits_one_by_one():
    """After an asynchronous copy, a value that is read, and a copy and a tensor of numbers that are no such copies."""
    ledger, found = host.HostLedger(), []
    parallel = load_config(host.DEMO_CONFIG, [*host.ONE_PROCESS, "parallel.sequence_parallel=false"]).parallel
    with FakeDevice(0, parallel, ledger), host.Copies(ledger):
        there = torch.zeros(3).to(DEVICE, non_blocking=True)
        found.append(ledger.waits)
        int(there.sum().to(torch.int64))
        found.append(ledger.waits)
        torch.zeros(3).to(DEVICE)
        torch.tensor([1.0], device=DEVICE)
        return [*found, ledger.waits]


def main():
    found = {"counted": counted(), "one by one": waits_one_by_one()}
    collator.to_device = lambda tensor, device: tensor.to(device)
    print(json.dumps(found | {"blocking": counted()}))


if __name__ == "__main__":
    main()

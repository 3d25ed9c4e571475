"""Every piece of cpu_backend is still needed by the pinned megatron-core: taken away, the operation that it is for
fails.

Tensor.cuda needs a pipeline of two stages and is tested in tests/model/test_parity.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CPU_BUILD = torch.version.cuda is None
NO_CUDA = "Torch not compiled with CUDA enabled" if CPU_BUILD else "Found no NVIDIA driver"
EXPECTED = {
    "current_device": NO_CUDA,
    "synchronize": NO_CUDA,
    "_get_cuda_rng_state": NO_CUDA,
    "_set_cuda_rng_state": "calls were queued for CUDA",
    "device argument": NO_CUDA,
    "type name": "AssertionError",
    "twice": "",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is not installed where there is a GPU")
def test_each_piece_is_needed_and_enough():
    script = ROOT / "tests" / "workers" / "cpu_backend_needs.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results.keys() == EXPECTED.keys()
    for name, message in EXPECTED.items():
        assert results[name]["with"] == "ok", name
        assert message in results[name]["without"] and results[name]["without"] != "ok", name


def test_nothing_is_installed_where_cuda_is_available(monkeypatch):
    from megatron_papo.distributed import cpu_backend

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.synchronize, torch.cuda.current_device, cpu_backend._mode
    cpu_backend.install()
    assert before == (torch.cuda.synchronize, torch.cuda.current_device, cpu_backend._mode)

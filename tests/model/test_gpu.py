"""The model on a CUDA device, in bfloat16, against transformers in float32 on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_papo.checkpoint.convert import HFCheckpoint, hf_to_megatron
from tests.helpers import ROOT
from tests.workers import random_model

BFLOAT16_NOISE = 0.03
"""Of the norm of the logits: seven layers of roundings of 2^-9 each. Measured with bfloat16 on a CPU: 0.013, and
0.17 for the control."""


def forward(directory: Path, dtype: str) -> None:
    """Write logits.pt and logits_wrong.pt of tests/workers/forward.py, on this machine's device."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    script = ROOT / "tests" / "workers" / "forward.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, script, directory, dtype], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_bfloat16_on_a_gpu_is_near_transformers(tmp_path):
    model, batch = random_model.make(tied=False), random_model.batch()
    random_model.save(model, tmp_path / "hf")
    (tmp_path / "megatron").mkdir()
    hf_to_megatron(HFCheckpoint(tmp_path / "hf"), tmp_path / "megatron")
    expected = random_model.reference(model, batch)
    torch.save({**batch, "position_ids": expected["position_ids"]}, tmp_path / "batch.pt")
    forward(tmp_path, "bfloat16")

    tokens = batch["attention_mask"].bool()

    def distance(name: str) -> float:
        difference = torch.load(tmp_path / name)[tokens] - expected["logits"][tokens]
        return float(difference.norm() / expected["logits"][tokens].norm())

    assert distance("logits.pt") < BFLOAT16_NOISE
    assert distance("logits_wrong.pt") > 3 * BFLOAT16_NOISE, "text positions for pictures must be noticed"

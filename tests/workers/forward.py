"""Runs under torchrun with one process: a forward pass on this machine's device, logits for the test to judge.

    python -m torch.distributed.run --standalone --nproc-per-node 1 tests/workers/forward.py DIRECTORY DTYPE

DIRECTORY holds batch.pt and megatron/, a checkpoint; logits.pt and logits_wrong.pt (text positions) are written there.
"""

import sys
from pathlib import Path

from megatron_papo.run import command_line


def main() -> None:
    """Write the logits of the batch, float32 on the CPU."""
    import torch

    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed import process_groups
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.model.qwen2_5_vl import build_model

    directory, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    process_groups.initialize(
        ParallelConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, data_parallel_size=1)
    )
    device = process_groups.device()
    hf = read_hf_config(directory / "megatron")
    model = build_model(hf, dtype=dtype, sequence_parallel=False, recompute="none").to(device).eval()
    megatron_files.load_weights(directory / "megatron", model)
    assert {(parameter.device, parameter.dtype) for parameter in model.parameters()} == {(device, dtype)}
    batch = torch.load(directory / "batch.pt")
    positions = batch["position_ids"]
    text_positions = torch.arange(positions.shape[-1]).expand_as(positions)
    for name, position_ids in (("logits", positions), ("logits_wrong", text_positions)):
        with torch.no_grad():
            pixels = batch["pixel_values"].to(device, dtype)
            logits = model(batch["input_ids"].to(device), position_ids.to(device), pixels, batch["grids"])
        torch.save(logits.float().cpu(), directory / f"{name}.pt")
    process_groups.shutdown()


if __name__ == "__main__":
    command_line.run(main)

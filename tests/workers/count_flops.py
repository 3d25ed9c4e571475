"""Run in one process: FLOPs of one optimizer step's update, or of a sweep, through our own model by torch's FLOP
counter.

python count_flops.py WORK   (WORK/cases.json: see tests/training/test_accounting.py; writes WORK/counted.json)

Attention runs as products of whole matrices, which the counter sees; the products that make rotary angles are left out.
"""

import json
import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_papo.config_files import load_config
from megatron_papo.distributed import process_groups
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.model.qwen2_5_vl import build_model
from megatron_papo.run.command_line import run
from megatron_papo.run.records import Rollout, read_jsonl
from megatron_papo.training.collator import Collator
from megatron_papo.training.forward_step import PassSettings, papo_step, sweep
from megatron_papo.training.loss_recipe import counts_of, denominators_of, loss_recipe
from megatron_papo.training.optimizer import build_optimizer
from megatron_papo.training.rows import make_rows

CACHED = ("old_log_probs", "ref_log_probs", "masked_image_log_probs", "masked_image_entropy")


def count(case: dict, work: Path, model, wrapped) -> int:
    config = load_config(work / "config.yaml", case["overrides"])
    rollouts = read_jsonl(work / "rollouts.jsonl", Rollout)
    rows = make_rows(rollouts, [1.0] * len(rollouts), work, config, model.hf, work / "rollouts.jsonl")
    collator = Collator(config, model.hf, work, with_pixels=True, device=process_groups.device(), dtype=torch.float32)
    objective, training = config.objective, config.training
    cached = {
        name: [torch.zeros(row.response_length) for row in rows]
        for name in CACHED[: 2 if objective.masked_rows_ride else 4]
    }
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if case["sweep"]:
            sweep(model, collator, rows, PassSettings(training.log_prob_micro_batch_size, 1.0), [case["sweep"]])
        else:
            settings = PassSettings(training.micro_batch_size, 1.0)
            denominators = denominators_of([counts_of(row) for row in rows], objective)
            papo_step(wrapped, collator, rows, cached, settings, loss_recipe(objective, 0), denominators)
    angles = [
        sum(flops.values())
        for name, flops in counter.get_flop_counts().items()
        if name.endswith("language_model.rotary_pos_emb")
    ]
    return counter.get_total_flops() - sum(angles[:1])


def main() -> None:
    work = Path(sys.argv[1])
    cases = json.loads((work / "cases.json").read_text())
    config = load_config(work / "config.yaml", cases[0]["overrides"])
    process_groups.initialize(config.parallel)
    model = build_model(read_hf_config(work / "model"), dtype=torch.float32, sequence_parallel=False, recompute="none")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    wrapped, _ = build_optimizer(model, config.optimizer, torch.float32)
    (work / "counted.json").write_text(json.dumps([count(case, work, model, wrapped) for case in cases]))
    process_groups.shutdown()


if __name__ == "__main__":
    run(main)

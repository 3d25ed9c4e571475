"""Two processes, many layouts: trains with SftEngine from one checkpoint and one data set, and writes losses and
weights of each.

run by: torchrun --nproc-per-node 2 tests/workers/sft_worker.py JOB.json
"""

import json
import sys
from pathlib import Path

from megatron_papo.config import DataConfig, ModelConfig, SftConfig
from megatron_papo.distributed import collectives, process_groups
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.run.command_line import run
from megatron_papo.run.records import Prompt, read_jsonl
from megatron_papo.sft.batches import batch_indices, collate, learning_rate
from megatron_papo.sft.engine import SftEngine


def train(job: dict, name: str, layout: dict) -> None:
    root, hf, output = Path(job["data"]), Path(layout.pop("hf", job["hf"])), Path(job["output"]) / name
    dtype = layout.pop("dtype", "float32")
    sft = SftConfig(**job["sft"], **layout, processes=2)
    data = DataConfig.model_validate(job["data_config"])
    prompts = read_jsonl(root / "sft.jsonl", Prompt)
    engine = SftEngine(hf, ModelConfig(path=None, dtype=dtype, recompute=job["recompute"].get(name, "none")), sft)
    image_token_id = read_hf_config(hf).image_token_id
    per_rank, history = sft.global_batch_size // 2, []
    for step in range(sft.steps):
        samples = [prompts[index] for index in batch_indices(len(prompts), step, sft.global_batch_size, job["seed"])]
        mine = samples[process_groups.rank() * per_rank :][:per_rank]
        micro = [mine[start : start + sft.micro_batch_size] for start in range(0, per_rank, sft.micro_batch_size)]
        batches = [collate(each, root, data, image_token_id) for each in micro]
        tokens = sum(len(sample.target_token_ids) for sample in samples)
        history.append(engine.step(batches, tokens, learning_rate(sft, step)))
    if process_groups.is_main_rank():
        output.mkdir()
        (output / "history.json").write_text(json.dumps(history))
    engine.save(output if process_groups.is_main_rank() else None)
    collectives.barrier()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    process_groups.connect()
    for name, layout in job["layouts"].items():
        train(job, name, layout)
    process_groups.disconnect()


run(main)

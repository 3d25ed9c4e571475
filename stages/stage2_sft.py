"""Stage 2: supervised cold start of the Hugging Face model with DeepSpeed ZeRO.

For each step: draw global_batch_size samples in seeded order; loss = -mean log p(target token | image, prompt, target
so far) over all target tokens of the batch; AdamW with linear warm-up and gradient clipping.

Reads:  --data (stage 1: sft.jsonl, images/), --hf (Hugging Face checkpoint to start from).
Writes: a Hugging Face checkpoint with the same file and tensor names, metrics.jsonl. Run by: torchrun --nproc-per-node
N -m -- stages.stage2_sft ..., or deepspeed --num_gpus N --module stages.stage2_sft ...,
        N = sft.processes.
"""

import json
import math
import time
from contextlib import nullcontext

from megatron_papo.checkpoint.model_files import model_fingerprint
from megatron_papo.config import SftConfig
from megatron_papo.data.chat import tokenizer_hash
from megatron_papo.distributed import collectives, process_groups
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import StageParser, Task, run
from megatron_papo.run.console import progress_bar
from megatron_papo.run.records import Prompt, read_jsonl
from megatron_papo.run.stage_output import StageOutput


def main() -> None:
    parser = StageParser("stage2_sft", __doc__ or "")
    local_rank_help = "given by the deepspeed launcher, which says the same in LOCAL_RANK"
    parser.parser.add_argument("--local_rank", type=int, help=local_rank_help)
    with collectives.first_process_speaks():
        _, tasks = parser.parse()
        if not tasks or tasks[0].config.sft is None:
            raise UserError("sft is null in this configuration: there is no cold start to do; go on with stage 3")
        task, sft = tasks[0], tasks[0].config.sft
        out = prepare(task, sft)
        if out.done:
            if process_groups.is_main_rank():
                out.announce_done()
            return
        prompts = read_samples(task)

    process_groups.connect()
    with collectives.within_first_process(out):
        train(task, sft, prompts, out)
    process_groups.disconnect()


def prepare(task: Task, sft: SftConfig) -> StageOutput:
    """Return the output, after all the checks that need no process group."""
    processes = sft.processes
    if process_groups.world_size() != processes:
        raise UserError(
            f"{process_groups.world_size()} processes were started, sft.processes is {processes}:"
            f" start with torchrun --nproc-per-node {processes} -m -- stages.stage2_sft ..."
        )
    return task.stage_output(task.inputs(model_fingerprint))


def read_samples(task: Task) -> list[Prompt]:
    """Return the rows to learn from, whose token ids must be those of the checkpoint's tokenizer."""
    data, hf = task.path("data"), task.path("hf")
    if tokenizer_hash(hf) != (data / "tokenizer.sha256").read_text().strip():
        raise UserError(
            f"{hf}: its tokenizer.json is not the one {data} was made with: prepare the data with this checkpoint"
        )
    prompts = read_jsonl(data / "sft.jsonl", Prompt)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.target_token_ids:
            raise UserError(f"{data / 'sft.jsonl'}:{number}: no target_token_ids: make the file again")
    return prompts


def train(task: Task, sft: SftConfig, prompts: list[Prompt], out: StageOutput) -> None:
    """The algorithm of the module's docstring."""
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.sft.batches import batch_indices, collate, learning_rate
    from megatron_papo.sft.engine import SftEngine

    config, hf, data = task.config, task.path("hf"), task.path("data")
    speaks = process_groups.is_main_rank()
    image_token_id = read_hf_config(hf).image_token_id
    engine = SftEngine(hf, config.model, sft)
    per_rank = sft.global_batch_size // sft.processes
    with (
        open(out.partial / "metrics.jsonl", "w", buffering=1) if speaks else nullcontext() as metrics,
        progress_bar(sft.steps, "stage 2: sft", "steps", speaks) as bar,
    ):
        for step in range(sft.steps):
            started = time.perf_counter()
            samples = [
                prompts[index] for index in batch_indices(len(prompts), step, sft.global_batch_size, config.seed)
            ]
            total_tokens = sum(len(sample.target_token_ids or []) for sample in samples)
            own = samples[process_groups.rank() * per_rank : (process_groups.rank() + 1) * per_rank]
            batches = [
                collate(own[start : start + sft.micro_batch_size], data, config.data, image_token_id)
                for start in range(0, per_rank, sft.micro_batch_size)
            ]
            rate = learning_rate(sft, step)
            loss, grad_norm = engine.step(batches, total_tokens, rate)
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise UserError(
                    f"step {step + 1}: loss {loss}, gradient norm {grad_norm}: lower sft.learning_rate or check the"
                    " data"
                )
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            if metrics is not None:
                row = {
                    "step": step + 1,
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "learning_rate": rate,
                    "tokens": total_tokens,
                }
                metrics.write(json.dumps(row | {"seconds": round(time.perf_counter() - started, 4)}) + "\n")
    out.hashes |= engine.save(out.partial if speaks else None)
    out.counts |= {"steps": sft.steps, "samples": sft.steps * sft.global_batch_size, "final_loss": loss}
    if speaks:
        print(f"stage 2: {sft.steps} steps, loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    run(main)

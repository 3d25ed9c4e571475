"""Stage 2: supervised cold start of the Hugging Face model with DeepSpeed ZeRO.

For each step: draw global_batch_size samples in seeded order; loss = -mean log p(target token | image, prompt, target
so far) over all target tokens of the batch; AdamW with linear warm-up and gradient clipping.

Reads:  --data (stage 1: sft.jsonl, images/), --hf (Hugging Face checkpoint to start from).
Writes: a Hugging Face checkpoint with the same file and tensor names, metrics.jsonl. Run by: torchrun --nproc-per-node
N -m stages.stage2_sft ..., or deepspeed --num_gpus N --module stages.stage2_sft ..., N = sft.processes.
"""

import json
import math
import time
from contextlib import nullcontext

from megatron_papo.config_files import load_config
from megatron_papo.data.chat import tokenizer_hash
from megatron_papo.distributed import collectives, process_groups
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run, stage_parser
from megatron_papo.run.records import Prompt, read_jsonl
from megatron_papo.run.stage_output import StageOutput, input_fingerprint, require_input

SECTIONS = ["seed", "sft", "data.min_pixels", "data.max_pixels", "model.dtype"]


def parse():
    parser = stage_parser(
        __doc__, ("data", "stage 1's output"), ("hf", "Hugging Face checkpoint directory to start from")
    )
    parser.add_argument(
        "--local_rank", type=int, help="given by the deepspeed launcher, which says the same in LOCAL_RANK"
    )
    return parser.parse_args()


def prepare(args):
    """Configuration and output, after all the checks that need no process group."""
    config = load_config(args.config, args.overrides)
    if config.sft is None:
        raise UserError(f"{args.config}: sft is null: there is no cold start to do; go on with stage 3")
    if process_groups.world_size() != config.sft.processes:
        raise UserError(
            f"{process_groups.world_size()} processes were started, sft.processes is {config.sft.processes}:"
            f" start with torchrun --nproc-per-node {config.sft.processes} -m stages.stage2_sft ..."
        )
    stage1 = f"python -m stages.stage1_prepare_data --config {args.config} --output {args.data}"
    inputs = {
        "data": require_input(args.data, ("stage1_prepare_data",), stage1),
        "hf": input_fingerprint(args.hf, "give a Hugging Face checkpoint directory"),
    }
    return config, StageOutput("stage2_sft", args.output, config, SECTIONS, inputs)


def read_samples(args) -> list[Prompt]:
    """The rows to learn from, whose token ids must be those of the checkpoint's tokenizer."""
    if tokenizer_hash(args.hf) != (args.data / "tokenizer.sha256").read_text().strip():
        raise UserError(
            f"{args.hf}: its tokenizer.json is not the one {args.data} was made with: prepare the data with this"
            " checkpoint"
        )
    prompts = read_jsonl(args.data / "sft.jsonl", Prompt)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.target_token_ids:
            raise UserError(f"{args.data / 'sft.jsonl'}:{number}: no target_token_ids: make the file again")
    return prompts


def main() -> None:
    args = parse()
    with collectives.first_process_speaks():
        config, out = prepare(args)
        if out.done:
            if process_groups.is_main_rank():
                out.announce_done()
            return
        prompts = read_samples(args)

    process_groups.connect()
    with out if process_groups.is_main_rank() else nullcontext():
        collectives.barrier()  # out.partial is there
        train(args, config, prompts, out)
        collectives.barrier()  # every rank is done
    process_groups.disconnect()


def train(args, config, prompts, out) -> None:
    from tqdm import tqdm

    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.sft.batches import batch_indices, collate, learning_rate
    from megatron_papo.sft.engine import SftEngine

    sft, speaks = config.sft, process_groups.is_main_rank()
    image_token_id = read_hf_config(args.hf).image_token_id
    engine = SftEngine(args.hf, config.model, sft)
    per_rank = sft.global_batch_size // sft.processes
    metrics = open(out.partial / "metrics.jsonl", "w", buffering=1) if speaks else nullcontext()
    with metrics, tqdm(total=sft.steps, desc="stage 2: sft", unit="step", disable=not speaks, mininterval=1.0) as bar:
        for step in range(sft.steps):
            started = time.perf_counter()
            samples = [
                prompts[index] for index in batch_indices(len(prompts), step, sft.global_batch_size, config.seed)
            ]
            total_tokens = sum(len(sample.target_token_ids) for sample in samples)
            mine = samples[process_groups.rank() * per_rank : (process_groups.rank() + 1) * per_rank]
            batches = [
                collate(mine[start : start + sft.micro_batch_size], args.data, config.data, image_token_id)
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
            if speaks:
                row = {
                    "step": step + 1,
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "learning_rate": rate,
                    "tokens": total_tokens,
                }
                metrics.write(json.dumps(row | {"seconds": round(time.perf_counter() - started, 4)}) + "\n")
    engine.save(out.partial if speaks else None)
    out.counts |= {"steps": sft.steps, "samples": sft.steps * sft.global_batch_size, "final_loss": loss}
    if speaks:
        print(f"stage 2: {sft.steps} steps, loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    run(main)

"""Stage 5: one iteration of PAPO on the rollouts of stage 4, with tensor, pipeline and data parallelism.

    1. reference log-probs: load the reference weights, one forward sweep        (not if kl_ref_coef is 0)
    2. load the policy; old log-probs and masked-image log-probs: one sweep each
    3. for every global_batch_size prompts: forward and backward, all-reduce, clip, AdamW      (rollouts are used once, in order)

reads   --megatron   weights, optimizer and step of the iteration before (or stage 3's output)
        --reference  stage 3's output, the frozen reference of KL_ref
        --rollouts   stage 4's output, --data stage 1's output (the images)
writes  --output     Megatron checkpoint with optimizer state, metrics.jsonl (one line per optimizer step), tensorboard/
run by  torchrun --nproc-per-node TP*PP*DP -m stages.stage5_train ...
"""

import json
import math
import time
from contextlib import nullcontext

from megatron_papo.command_line import run, stage_parser
from megatron_papo.config import load_config
from megatron_papo.errors import UserError
from megatron_papo.manifest import StageOutput, require_input
from megatron_papo.model.hf_config import HF_FILES, read_hf_config
from megatron_papo.records import Rollout, read_jsonl
from megatron_papo.training import collectives, parallel

SECTIONS = [
    "seed", "model.dtype", "model.recompute", "parallel", "objective", "masked_image", "optimizer", "training", "rollout",
    "data.min_pixels", "data.max_pixels",
]  # fmt: skip


def parse():
    parser = stage_parser(
        __doc__,
        ("megatron", "Megatron checkpoint to continue from (stage 3 or stage 5)"),
        ("reference", "Megatron checkpoint of the frozen reference (stage 3)"),
        ("rollouts", "stage 4's output of this iteration"),
        ("data", "stage 1's output"),
    )
    parser.add_argument("--iteration", type=int, required=True, help="number of this iteration, from 1")
    return parser.parse_args()


def prepare(args):
    """Configuration, model geometry and output, after all the checks that need no process group."""
    config = load_config(args.config, args.overrides)
    stage3 = f"python -m stages.stage3_convert_to_megatron --config {args.config} --hf HF_CHECKPOINT --output {args.reference}"
    stage4 = f"python -m stages.stage4_rollout --config {args.config} --iteration {args.iteration} ... --output {args.rollouts}"
    stage1 = f"python -m stages.stage1_prepare_data --config {args.config} --output {args.data}"
    inputs = {
        "megatron": require_input(args.megatron, ("stage3_convert_to_megatron", "stage5_train"), stage3),
        "rollouts": require_input(args.rollouts, ("stage4_rollout",), stage4),
        "data": require_input(args.data, ("stage1_prepare_data",), stage1),
    }
    if config.objective.uses_reference:
        inputs["reference"] = require_input(args.reference, ("stage3_convert_to_megatron",), stage3)
    out = StageOutput("stage5_train", args.output, config, SECTIONS, inputs, {"iteration": args.iteration})
    return config, out


def main() -> None:
    args = parse()
    with collectives.first_process_speaks():
        config, out = prepare(args)
        if out.done:
            if parallel.is_main_rank():
                out.announce_done()
            return
        from megatron_papo.checkpoint import megatron_files
        from megatron_papo.checkpoint.verify import require_proof

        hf = read_hf_config(args.megatron / HF_FILES)
        parallel.check_parallel_sizes(hf, config.parallel)
        if parallel.is_main_rank():
            require_proof(args.reference)
        rollouts = read_jsonl(args.rollouts / "rollouts.jsonl", Rollout)

    parallel.initialize(config.parallel)
    with out if parallel.is_main_rank() else nullcontext():
        collectives.barrier()  # out.partial is there
        train(args, config, hf, rollouts, out)
        collectives.barrier()  # every rank has written
    parallel.shutdown()


def train(args, config, hf, rollouts, out) -> None:
    import torch
    from tqdm import tqdm

    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.model.qwen2_5_vl import build_model
    from megatron_papo.objective.advantages import ADVANTAGES
    from megatron_papo.training.batching import Collator, group_rewards, make_rows
    from megatron_papo.training.forward_step import compute_log_probs, papo_step
    from megatron_papo.training.log_prob_difference import compare_with_server
    from megatron_papo.training.optimizer import build_optimizer, learning_rate, set_learning_rate

    objective, training, rollout = config.objective, config.training, config.rollout
    where = args.rollouts / "rollouts.jsonl"
    rewards = group_rewards(rollouts, rollout.group_size, where)
    advantages = ADVANTAGES[objective.advantage](rewards).flatten().tolist()
    rows = make_rows(rollouts, advantages, args.data, config, hf, where)
    rows_per_step = training.global_batch_size * rollout.group_size
    steps = [rows[start : start + rows_per_step] for start in range(0, len(rows), rows_per_step)]
    mine = [step[parallel.dp_group().rank() :: parallel.dp_group().size()] for step in steps]
    my_rows = [row for step in mine for row in step]

    dtype = getattr(torch, config.model.dtype)
    model = build_model(hf, dtype=dtype, sequence_parallel=config.parallel.sequence_parallel, recompute=config.model.recompute)
    collator = Collator(config, hf, args.data, with_pixels=parallel.is_first_stage(), device=parallel.device(), dtype=dtype)
    speaks = collectives.is_reporting_rank()
    sweeps = 1 + objective.uses_reference + objective.uses_masked_image
    bar = tqdm(total=(sweeps + 1) * len(my_rows), unit="rollout", disable=not speaks, mininterval=1.0)

    def sweep(name: str, masked: bool = False):
        bar.set_description(f"iteration {args.iteration}: {name}")
        return compute_log_probs(model, collator, my_rows, training.log_prob_micro_batch_size, rollout.temperature, bar.update, masked)

    cached = {}
    if objective.uses_reference:
        megatron_files.load_weights(args.reference, model)
        cached["ref_log_probs"] = sweep("reference")
    megatron_files.load_weights(args.megatron, model)
    cached["old_log_probs"] = sweep("old policy")
    if objective.uses_masked_image:
        cached["masked_image_log_probs"] = sweep("masked images", masked=True)
    difference = compare_with_server(my_rows, cached["old_log_probs"], training.max_rollout_log_prob_difference)

    model, optimizer = build_optimizer(model, config.optimizer, dtype)
    state = {"step": 0}
    if megatron_files.has_optimizer(args.megatron):
        state = megatron_files.load_optimizer(args.megatron, model.module, optimizer)

    with MetricsLog(out.partial, args.iteration) if speaks else nullcontext() as log:
        for number, (step, my_step) in enumerate(zip(steps, mine)):
            bar.set_description(f"iteration {args.iteration}: step {number + 1}/{len(steps)}")
            started = time.time()
            rate = learning_rate(state["step"], config.optimizer)
            set_learning_rate(optimizer, rate)
            model.zero_grad_buffer()
            optimizer.zero_grad()
            first = number * len(my_step)
            contributions = papo_step(
                model,
                collator,
                my_step,
                {name: values[first : first + len(my_step)] for name, values in cached.items()},
                training.micro_batch_size,
                rollout.temperature,
                objective,
                num_tokens=sum(row.response_length for row in step),
                num_sequences=len(step),
                progress=bar.update,
            )
            _, gradient_norm, _ = optimizer.step()
            metrics = collectives.sum_from_last_stage(contributions)
            check_finite(metrics["loss"], gradient_norm, state["step"] + 1)
            state["step"] += 1
            if speaks:
                update = {"gradient_norm": float(gradient_norm), "learning_rate": rate, "seconds": time.time() - started}
                log.write(state["step"], metrics | step_statistics(step) | difference | update)
    bar.close()

    megatron_files.save(out.partial, model.module, optimizer, state)
    if parallel.is_main_rank():
        megatron_files.copy_hf_files(args.megatron, out.partial)
        tokens = sum(row.response_length for row in rows)
        out.counts |= {"rollouts": len(rows), "steps": len(steps), "total_steps": state["step"], "response_tokens": tokens}


def step_statistics(step) -> dict[str, float]:
    """Of the rollouts of one optimizer step."""
    size = len(step)
    return {
        "reward": sum(row.rollout.rewards.overall for row in step) / size,
        "accuracy": sum(row.rollout.rewards.accuracy for row in step) / size,
        "format": sum(row.rollout.rewards.format for row in step) / size,
        "response_tokens": sum(row.response_length for row in step) / size,
        "cut_off": sum(row.rollout.finish_reason == "length" for row in step) / size,
    }


def check_finite(loss: float, gradient_norm: float, step: int) -> None:
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise UserError(
            f"optimizer step {step}: loss {loss}, gradient norm {gradient_norm}: nothing was saved;"
            " lower optimizer.learning_rate or objective.kl_prcp_coef"
        )


class MetricsLog:
    """metrics.jsonl and TensorBoard, one entry per optimizer step."""

    def __init__(self, directory, iteration: int):
        self.directory, self.iteration = directory, iteration

    def __enter__(self):
        from torch.utils.tensorboard import SummaryWriter

        self.lines = open(self.directory / "metrics.jsonl", "w")
        self.board = SummaryWriter(self.directory / "tensorboard")
        return self

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.write(json.dumps({"step": step, "iteration": self.iteration} | metrics) + "\n")
        self.lines.flush()
        for name, value in metrics.items():
            self.board.add_scalar(f"train/{name}", value, step)

    def __exit__(self, *_):
        self.lines.close()
        self.board.close()


if __name__ == "__main__":
    run(main)

"""Stage 5: one iteration of PAPO on the rollouts of stage 4, with tensor, pipeline and data parallelism.

    1. reference log-probs: load the reference weights, one forward sweep        (not if kl_ref_coef is 0: it is then not even loaded)
    2. load the policy; old log-probs and masked-image log-probs: one sweep each
    3. for every global_batch_size prompts: forward and backward, all-reduce, clip, AdamW      (rollouts are used once, in order)
       after each step the hacking guard looks at its metrics; it may lower kl_prcp_coef, go back to a checkpoint, or stop

reads   --megatron   weights, optimizer and step of the iteration before (or stage 3's output)
        --reference  stage 3's output, the frozen reference of KL_ref
        --rollouts   stage 4's output, --data stage 1's output (the images)
        --rollback   an earlier checkpoint that the guard may go back to (default: --megatron)
writes  --output     Megatron checkpoint with optimizer state, metrics.jsonl (one line per optimizer step), guard.jsonl, tensorboard/
run by  torchrun --nproc-per-node TP*PP*DP -m stages.stage5_train ...
"""

import math
import time
from contextlib import nullcontext
from pathlib import Path

from megatron_papo.command_line import run, stage_parser
from megatron_papo.config import load_config
from megatron_papo.errors import UserError
from megatron_papo.manifest import StageOutput, require_input
from megatron_papo.model.hf_config import HF_FILES, read_hf_config
from megatron_papo.objective.papo_loss import finish_metrics
from megatron_papo.records import Rollout, read_jsonl
from megatron_papo.training import collectives, parallel

SECTIONS = [
    "seed", "model.dtype", "model.recompute", "parallel", "objective", "hacking_guard", "masked_image", "optimizer", "training", "rollout",
    "data.min_pixels", "data.max_pixels",
]  # fmt: skip


def parse():
    parser = stage_parser(
        __doc__,
        ("megatron", "Megatron checkpoint to continue from (stage 3 or stage 5)"),
        ("rollouts", "stage 4's output of this iteration"),
        ("data", "stage 1's output"),
    )
    parser.add_argument("--reference", type=Path, metavar="PATH", help="Megatron checkpoint of the frozen reference (stage 3); needed with KL_ref")
    parser.add_argument("--rollback", type=Path, metavar="PATH", help="checkpoint for rollback_and_lower_gamma (default: --megatron)")
    parser.add_argument("--iteration", type=int, required=True, help="number of this iteration, from 1")
    return parser.parse_args()


def prepare(args):
    """Configuration and output, after all the checks that need no process group."""
    config = load_config(args.config, args.overrides)
    stage3 = f"python -m stages.stage3_convert_to_megatron --config {args.config} --hf HF_CHECKPOINT --output {args.reference or 'REFERENCE'}"
    stage4 = f"python -m stages.stage4_rollout --config {args.config} --iteration {args.iteration} ... --output {args.rollouts}"
    stage1 = f"python -m stages.stage1_prepare_data --config {args.config} --output {args.data}"
    checkpoints = ("stage3_convert_to_megatron", "stage5_train")
    inputs = {
        "megatron": require_input(args.megatron, checkpoints, stage3),
        "rollouts": require_input(args.rollouts, ("stage4_rollout",), stage4),
        "data": require_input(args.data, ("stage1_prepare_data",), stage1),
    }
    if config.objective.uses_reference:
        if args.reference is None:
            raise UserError(f"--reference: needed, because objective.kl_ref_coef is {config.objective.kl_ref_coef}: make it with: {stage3}")
        inputs["reference"] = require_input(args.reference, ("stage3_convert_to_megatron",), stage3)
    if config.hacking_guard.action == "rollback_and_lower_gamma":
        inputs["rollback"] = require_input(args.rollback or args.megatron, checkpoints, stage3)
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
        from megatron_papo.checkpoint.verify import require_proof

        hf = read_hf_config(args.megatron / HF_FILES)
        parallel.check_parallel_sizes(hf, config.parallel)
        if parallel.is_main_rank() and config.objective.uses_reference:
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
    from megatron_papo.training.batching import Collator, make_rows, rollout_advantages
    from megatron_papo.training.forward_step import StepTotals, compute_log_probs, loss_settings, papo_step
    from megatron_papo.training.guard import Guard
    from megatron_papo.training.metrics_log import MetricsLog
    from megatron_papo.training.optimizer import build_optimizer, learning_rate, set_learning_rate
    from megatron_papo.training.rollout_checks import compare_with_server, measure_sampling_bias

    objective, training, rollout = config.objective, config.training, config.rollout
    where = args.rollouts / "rollouts.jsonl"
    rows = make_rows(rollouts, rollout_advantages(rollouts, rollout.group_size, objective.advantage, where), args.data, config, hf, where)
    rows_per_step = training.global_batch_size * rollout.group_size
    steps = [rows[start : start + rows_per_step] for start in range(0, len(rows), rows_per_step)]
    mine = [step[parallel.dp_group().rank() :: parallel.dp_group().size()] for step in steps]
    my_rows = [row for step in mine for row in step]

    dtype = getattr(torch, config.model.dtype)
    collator = Collator(config, hf, args.data, with_pixels=parallel.is_first_stage(), device=parallel.device(), dtype=dtype)
    speaks = collectives.is_reporting_rank()
    cached_twins = objective.uses_masked_image and objective.masked_branch == "cached"
    stepwise_twins = objective.uses_masked_image and not cached_twins and not objective.masked_rows_ride
    passes = 2 + objective.uses_reference + cached_twins + stepwise_twins
    bar = tqdm(total=passes * len(my_rows), unit="rollout", disable=not speaks, mininterval=1.0)

    def new_model():
        return build_model(hf, dtype=dtype, sequence_parallel=config.parallel.sequence_parallel, recompute=config.model.recompute)

    def sweep(model, rows, pictures="original"):
        return compute_log_probs(model, collator, rows, training.log_prob_micro_batch_size, rollout.temperature, bar.update, pictures)

    def masked_branch(model, rows):
        """papo_loss's tensors of the masked-image branch, without gradient."""
        masked = sweep(model, rows, "masked")
        return {"masked_image_log_probs": masked["log_probs"], "masked_image_entropy": masked["entropy"]}

    # 1, 2: what does not change while this iteration trains
    model, cached = new_model(), {}
    if objective.uses_reference:
        bar.set_description(f"iteration {args.iteration}: reference")
        megatron_files.load_weights(args.reference, model)
        cached["ref_log_probs"] = sweep(model, my_rows)["log_probs"]
    megatron_files.load_weights(args.megatron, model)
    bar.set_description(f"iteration {args.iteration}: old policy")
    old = sweep(model, my_rows)
    cached["old_log_probs"] = old["log_probs"]
    if cached_twins:
        bar.set_description(f"iteration {args.iteration}: masked images")
        cached |= masked_branch(model, my_rows)
    if objective.importance_sampling_cap is not None and parallel.is_last_stage():
        cached["rollout_log_probs"] = [torch.tensor(row.rollout.rollout_log_probs, device=parallel.device()) for row in my_rows]
    checks = compare_with_server(my_rows, old["log_probs"], training.max_rollout_log_prob_difference)
    checks |= measure_sampling_bias(old, rollout.top_p)

    def start_from(checkpoint, model):
        """-> (the model in its data-parallel wrapper, optimizer, state) as the checkpoint holds them; model: with its weights."""
        wrapped, optimizer = build_optimizer(model, config.optimizer, dtype)
        state = {"step": 0}
        if megatron_files.has_optimizer(checkpoint):
            state = megatron_files.load_optimizer(checkpoint, model, optimizer)
        return wrapped, optimizer, state

    # 3: the optimizer steps, once, or again with a lower gamma from where the guard has gone back to
    model, optimizer, state = start_from(args.megatron, model)
    guard = Guard(config.hacking_guard, objective, state.get("guard"))
    with MetricsLog(out.partial, args.iteration) if speaks else nullcontext() as log:
        number, attempt = 0, 1
        while number < len(steps):
            step, my_step, first = steps[number], mine[number], number * len(mine[number])
            bar.set_description(f"iteration {args.iteration}: step {number + 1}/{len(steps)}")
            started = time.time()
            settings = loss_settings(objective, state["step"], guard.kl_prcp_scale)
            here = {name: values[first : first + len(my_step)] for name, values in cached.items()}
            if stepwise_twins:
                here |= masked_branch(model, my_step)
            rate = learning_rate(state["step"], config.optimizer)
            set_learning_rate(optimizer, rate)
            model.zero_grad_buffer()
            optimizer.zero_grad()
            contributions = papo_step(
                model, collator, my_step, here, training.micro_batch_size, rollout.temperature, objective,
                totals=StepTotals.of(step), settings=settings, progress=bar.update,
            )  # fmt: skip
            _, gradient_norm, _ = optimizer.step()
            metrics = finish_metrics(collectives.sum_from_last_stage(contributions))
            check_finite(metrics["loss"], gradient_norm, state["step"] + 1)
            state["step"] += 1
            number += 1

            decision = guard.observe(metrics, state["step"], attempt)
            if speaks:
                update = {"gradient_norm": float(gradient_norm), "learning_rate": rate, "seconds": time.time() - started, "attempt": attempt}
                used = {"kl_prcp_coef": settings["kl_prcp_coef"], "guard_signs": len(guard.signs)}
                log.write(state["step"], metrics | step_statistics(step) | checks | update | used)
                if decision is not None:
                    log.write_decision(decision)
                    bar.write(decision.message)
            if decision is not None and decision.action == "stop":
                raise UserError(f"{decision.message}: nothing of this iteration was saved")
            if decision is not None and decision.action == "rollback":
                back = args.rollback or args.megatron
                del model, optimizer  # before the new ones take their memory
                model = new_model()
                megatron_files.load_weights(back, model)
                model, optimizer, state = start_from(back, model)
                guard.went_back(state.get("guard"))
                if back != args.megatron:  # not the policy that made these rollouts: leave them
                    break
                number, attempt = 0, attempt + 1
                bar.total += (1 + stepwise_twins) * len(my_rows)
    bar.close()

    state["guard"] = guard.state.as_dict()
    megatron_files.save(out.partial, model.module, optimizer, state)
    if parallel.is_main_rank():
        megatron_files.copy_hf_files(args.megatron, out.partial)
        tokens = sum(row.response_length for row in rows)
        out.counts |= {"rollouts": len(rows), "steps": len(steps), "total_steps": state["step"], "response_tokens": tokens}
        out.counts |= {"guard_interventions": guard.state.interventions, "attempts": attempt}


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


if __name__ == "__main__":
    run(main)

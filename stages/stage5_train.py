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
from megatron_papo.records import Rollout, read_jsonl
from megatron_papo.training import collectives, parallel
from megatron_papo.training.metrics_log import MetricsLog

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
    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.training.batching import make_rows, rollout_advantages

    where, objective = args.rollouts / "rollouts.jsonl", config.objective
    advantages = rollout_advantages(rollouts, config.rollout.group_size, objective.advantage, where)
    rows = make_rows(rollouts, advantages, args.data, config, hf, where)
    rows_per_step = config.training.global_batch_size * config.rollout.group_size
    steps = [rows[start : start + rows_per_step] for start in range(0, len(rows), rows_per_step)]

    iteration = Iteration(args, config, hf, steps)
    model, cached, checks = first_sweeps(iteration)
    with MetricsLog(out.partial, args.iteration) if iteration.speaks else nullcontext() as log:
        model, optimizer, state, attempts = optimizer_steps(iteration, model, cached, checks, log)
    iteration.bar.close()

    megatron_files.save(out.partial, model.module, optimizer, state)
    if parallel.is_main_rank():
        megatron_files.copy_hf_files(args.megatron, out.partial)
        tokens = sum(row.response_length for row in rows)
        out.counts |= {"rollouts": len(rows), "steps": len(steps), "total_steps": state["step"], "response_tokens": tokens}
        out.counts |= {"attempts": attempts, "guard_interventions": state["guard"]["interventions"]}


class Iteration:
    """What the parts of the stage share: the rollouts of each optimizer step, this rank's among them, and how to sweep over them."""

    def __init__(self, args, config, hf, steps):
        import torch
        from tqdm import tqdm

        from megatron_papo.training.batching import Collator, split_over_ranks

        self.args, self.config, self.hf, self.steps = args, config, hf, steps
        ranks = parallel.dp_group()
        self.mine = [split_over_ranks(step, config.training.layout, ranks.size())[ranks.rank()] for step in steps]
        self.my_rows = [row for step in self.mine for row in step]
        self.dtype = getattr(torch, config.model.dtype)
        self.collator = Collator(
            config, hf, args.data, with_pixels=parallel.is_first_stage(), device=parallel.device(), dtype=self.dtype
        )
        objective = config.objective
        self.masked_branch_is_cached = objective.uses_masked_image and objective.masked_branch == "cached"
        self.masked_branch_is_swept = objective.uses_masked_image and not self.masked_branch_is_cached and not objective.masked_rows_ride
        passes = 1 + objective.uses_reference + self.masked_branch_is_cached + self.passes_of_steps
        self.speaks = collectives.is_reporting_rank()
        self.bar = tqdm(total=passes * len(self.my_rows), unit="rollout", disable=not self.speaks, mininterval=1.0)

    @property
    def passes_of_steps(self) -> int:
        """Over the rollouts, that the optimizer steps make."""
        return 1 + self.masked_branch_is_swept

    def show(self, what: str) -> None:
        self.bar.set_description(f"iteration {self.args.iteration}: {what}")

    def load_model(self, checkpoint, model=None):
        """The policy network with a checkpoint's weights: a new one, or the one given."""
        from megatron_papo.checkpoint import megatron_files
        from megatron_papo.model.qwen2_5_vl import build_model

        if model is None:
            settings = dict(sequence_parallel=self.config.parallel.sequence_parallel, recompute=self.config.model.recompute)
            model = build_model(self.hf, dtype=self.dtype, **settings)
        megatron_files.load_weights(checkpoint, model)
        return model

    def load_optimizer(self, checkpoint, model):
        """-> (the model in its data-parallel wrapper, optimizer, state) as the checkpoint holds them; model: with its weights."""
        from megatron_papo.checkpoint import megatron_files
        from megatron_papo.training.optimizer import build_optimizer

        wrapped, optimizer = build_optimizer(model, self.config.optimizer, self.dtype)
        resumes = megatron_files.has_optimizer(checkpoint)
        return wrapped, optimizer, megatron_files.load_optimizer(checkpoint, model, optimizer) if resumes else {"step": 0}

    def sweep(self, model, rows, pictures="original") -> dict[str, list]:
        """log_probs and entropy of this rank's rows, without gradient."""
        from megatron_papo.training.forward_step import compute_log_probs

        size = self.config.training.log_prob_micro_batch_size
        return compute_log_probs(model, self.collator, rows, size, self.config.rollout.temperature, self.bar.update, pictures)

    def masked_branch(self, model, rows) -> dict[str, list]:
        """The loss's tensors of the masked-image branch, without gradient."""
        masked = self.sweep(model, rows, "masked")
        return {"masked_image_log_probs": masked["log_probs"], "masked_image_entropy": masked["entropy"]}


def first_sweeps(iteration: Iteration):
    """1 and 2. -> the policy as the iteration finds it, what stays fixed while it trains, and what that says about the rollouts."""
    import torch

    from megatron_papo.training.rollout_checks import compare_with_server, measure_sampling_bias, parity_gate

    args, objective, rows = iteration.args, iteration.config.objective, iteration.my_rows
    model, cached = None, {}
    if objective.uses_reference:
        iteration.show("reference")
        model = iteration.load_model(args.reference)
        cached["ref_log_probs"] = iteration.sweep(model, rows)["log_probs"]
    model = iteration.load_model(args.megatron, model)
    iteration.show("old policy")
    old = iteration.sweep(model, rows)
    cached["old_log_probs"] = old["log_probs"]
    if iteration.masked_branch_is_cached:
        iteration.show("masked images")
        cached |= iteration.masked_branch(model, rows)
    if objective.importance_sampling_cap is not None and parallel.is_last_stage():
        cached["rollout_log_probs"] = [torch.tensor(row.rollout.rollout_log_probs, device=parallel.device()) for row in rows]
    checks = compare_with_server(rows, old["log_probs"], limit=None)
    limit = iteration.config.training.max_rollout_log_prob_difference
    checks |= parity_gate(model, iteration.sweep, rows, args.megatron / HF_FILES, limit)
    return model, cached, checks | measure_sampling_bias(old, iteration.config.rollout.top_p)


def optimizer_steps(iteration: Iteration, model, cached: dict, checks: dict, log):
    """3. The steps, once, or again with a lower gamma from where the guard has gone back to. -> model, optimizer, state, attempts."""
    from megatron_papo.objective.papo_loss import finish_metrics
    from megatron_papo.training.forward_step import StepTotals, loss_settings, papo_step
    from megatron_papo.training.guard import Guard
    from megatron_papo.training.optimizer import learning_rate, set_learning_rate

    args, config, bar = iteration.args, iteration.config, iteration.bar
    model, optimizer, state = iteration.load_optimizer(args.megatron, model)
    guard = Guard(config.hacking_guard, config.objective, state.get("guard"))
    number, attempt = 0, 1
    while number < len(iteration.steps):
        step, my_step, first = iteration.steps[number], iteration.mine[number], sum(map(len, iteration.mine[:number]))
        iteration.show(f"step {number + 1}/{len(iteration.steps)}")
        started = time.time()
        settings = loss_settings(config.objective, state["step"], guard.kl_prcp_scale)
        here = {name: values[first : first + len(my_step)] for name, values in cached.items()}
        if iteration.masked_branch_is_swept:
            here |= iteration.masked_branch(model, my_step)
        rate = learning_rate(state["step"], config.optimizer)
        set_learning_rate(optimizer, rate)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        contributions = papo_step(
            model, iteration.collator, my_step, here, config.training.micro_batch_size, config.rollout.temperature, config.objective,
            totals=StepTotals.of(step), settings=settings, progress=bar.update,
        )  # fmt: skip
        _, gradient_norm, _ = optimizer.step()
        metrics = finish_metrics(collectives.sum_from_last_stage(contributions))
        check_finite(metrics["loss"], gradient_norm, state["step"] + 1)
        state["step"] += 1
        number += 1

        decision = guard.observe(metrics, state["step"], attempt)
        if iteration.speaks:
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
            model, optimizer, state = iteration.load_optimizer(back, iteration.load_model(back))
            guard.went_back()
            if back != args.megatron:  # another policy made these rollouts: leave them
                break
            number, attempt = 0, attempt + 1
            bar.total += iteration.passes_of_steps * len(iteration.my_rows)
    return model, optimizer, state | {"guard": guard.state.as_dict()}, attempt


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

"""Stage 5: one iteration of PAPO on the rollouts of stage 4, with tensor, pipeline and data parallelism.

    1. load the policy (and the reference, into host memory)
    2. reference log-probs: one forward sweep                                    (not if kl_ref_coef is 0: it is then not even loaded)
    3. old log-probs and masked-image log-probs: one sweep                       (no old ones where the iteration is one step: the ratio is 1)
    4. for every global_batch_size prompts: forward and backward, all-reduce, clip, AdamW      (rollouts are used once, in order)
       after each step the hacking guard looks at its metrics; it may lower kl_prcp_coef, go back to a checkpoint, or
       stop

reads   --megatron   weights, optimizer and step of the iteration before (or stage 3's output)
        --reference  stage 3's output, the frozen reference of KL_ref
        --rollouts   stage 4's output, --data stage 1's output (the images)
        --rollback   an earlier checkpoint that the guard may go back to (default: --megatron)
writes  --output     Megatron checkpoint with optimizer state, metrics.jsonl (one line per optimizer step), guard.jsonl, tensorboard/
run by  torchrun --nproc-per-node TP*PP*DP -m stages.stage5_train ...

With --follow runs/NAME it stays for all iterations of the run (run_all.sh --resident): it waits for each iteration's
rollouts, trains with what it holds in memory, and writes both the Megatron checkpoint and stage 6's export of it.
"""

import argparse
import math
import time
from contextlib import nullcontext
from pathlib import Path

from megatron_papo.config_files import load_config
from megatron_papo.distributed import collectives, process_groups
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HF_FILES, read_hf_config
from megatron_papo.model.parallel_sizes import check_parallel_sizes
from megatron_papo.run.command_line import check_paths_given, run, stage_parser
from megatron_papo.run.records import Rollout, read_jsonl
from megatron_papo.run.run_directory import Follower, RunDirectory
from megatron_papo.run.stage_output import StageOutput, require_input
from megatron_papo.training.metrics_log import MetricsLog

SECTIONS = [
    "seed",
    "model.dtype",
    "model.recompute",
    "parallel",
    "objective",
    "hacking_guard",
    "masked_image",
    "optimizer",
    "training",
    "rollout",
    "data.min_pixels",
    "data.max_pixels",
]
PATHS = ("megatron", "rollouts", "data", "iteration", "output")


def parse():
    parser = stage_parser(
        __doc__,
        ("megatron", "Megatron checkpoint to continue from (stage 3 or stage 5)"),
        ("rollouts", "stage 4's output of this iteration"),
        ("data", "stage 1's output"),
        follows=True,
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="PATH",
        help="Megatron checkpoint of the frozen reference (stage 3); needed with KL_ref",
    )
    parser.add_argument(
        "--rollback", type=Path, metavar="PATH", help="checkpoint for rollback_and_lower_gamma (default: --megatron)"
    )
    parser.add_argument("--iteration", type=int, metavar="N", help="number of this iteration, from 1")
    args = parser.parse_args()
    check_paths_given(parser, args, PATHS, others=("reference", "rollback"))
    return args


def main() -> None:
    args = parse()
    if args.follow is not None:
        follow(args)
        return
    with collectives.first_process_speaks():
        config = load_config(args.config, args.overrides)
        out = prepare(args, config)
        if out.done:
            if process_groups.is_main_rank():
                out.announce_done()
            return
        hf = check_model(args.megatron, config)
        rollouts = read_rollouts(args, config)
    from megatron_papo.training.policy import Policy

    process_groups.initialize(config.parallel)
    iterate(args, config, Policy(config, hf), rollouts, out)
    process_groups.shutdown()


def follow(args) -> None:
    """All iterations of a run, as stage 4 makes their rollouts: one process, the same outputs."""
    with collectives.first_process_speaks():
        config = load_config(args.config, args.overrides)
        run = RunDirectory(args.follow, config)
        require_input(run.trained(0), ("stage3_convert_to_megatron",), "python -m stages.stage3_convert_to_megatron")
        hf = check_model(run.trained(0), config)
    from megatron_papo.training.policy import Policy

    process_groups.initialize(config.parallel)
    policy, speaks, trusted = Policy(config, hf), process_groups.is_main_rank(), ()
    with Follower(args.follow, "stage5_train", "stage4_rollout", speaks) as follower:
        for number in range(1, config.iterations + 1):
            follower.wait_for(run.rollouts(number))
            started = time.time()
            here = argparse.Namespace(
                config=args.config,
                iteration=number,
                data=run.data,
                rollouts=run.rollouts(number),
                megatron=run.trained(number - 1),
                reference=run.reference,
                rollback=run.rollback(number),
                output=run.trained(number),
            )
            with collectives.first_process_speaks():
                out = prepare(here, config, trusted if policy.at == here.megatron else ())
                if not out.done:
                    rollouts = read_rollouts(here, config)
            if out.done:
                if speaks:
                    out.announce_done()
            else:
                out.started = started
                iterate(here, config, policy, rollouts, out)
                trusted = (
                    "data",
                    "reference",
                    "megatron",
                )  # read and verified once, or just written and still in memory
                if config.server.shares_gpus:  # before the export is published, which is what sampling waits for
                    policy.forget()
            if speaks:
                export(run, number)
            follower.wait_for(run.exported(number))  # no collective: an export may take longer than those wait
    process_groups.shutdown()


def export(run: RunDirectory, number: int) -> None:
    """Stage 6 in this process, and the deletion of checkpoints that keep_checkpoints does not keep."""
    from megatron_papo.checkpoint.conversion_output import to_hf
    from megatron_papo.checkpoint.keep import keep_newest

    to_hf(run.trained(number), run.exported(number), {}, started=time.time())
    keep_newest(run.config, run.iterations, number)


def prepare(args, config, trusted: tuple[str, ...] = ()) -> StageOutput:
    """The output, after all the checks that need no process group. trusted: inputs whose files need not be verified
    again."""
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
            raise UserError(
                f"--reference: needed, because objective.kl_ref_coef is {config.objective.kl_ref_coef}: make it with:"
                f" {stage3}"
            )
        inputs["reference"] = require_input(args.reference, ("stage3_convert_to_megatron",), stage3)
    if config.hacking_guard.action == "rollback_and_lower_gamma":
        inputs["rollback"] = require_input(args.rollback or args.megatron, checkpoints, stage3)
    inputs |= {name: str(inputs[name]) for name in trusted if name in inputs}
    out = StageOutput("stage5_train", args.output, config, SECTIONS, inputs, {"iteration": args.iteration})
    if process_groups.is_main_rank() and config.objective.uses_reference and not out.done:
        from megatron_papo.checkpoint.verify import require_proof

        require_proof(args.reference)
    return out


def check_model(checkpoint: Path, config):
    """The HFConfig of a checkpoint's model. Raises UserError where the parallel section cannot cut it."""
    hf = read_hf_config(checkpoint / HF_FILES)
    check_parallel_sizes(hf, config.parallel)
    return hf


def read_rollouts(args, config) -> list[Rollout]:
    """Raises UserError for rollouts that older weights made than rollout.max_staleness allows."""
    where = args.rollouts / "rollouts.jsonl"
    rollouts = read_jsonl(where, Rollout)
    oldest, allowed = max(rollout.staleness for rollout in rollouts), config.rollout.max_staleness
    if oldest > allowed:
        raise UserError(
            f"{where}: rollouts by weights {oldest} iteration(s) old, rollout.max_staleness is {allowed}: sample them"
            " again, or raise it"
        )
    return rollouts


def iterate(args, config, policy, rollouts, out) -> None:
    """One iteration, from rollouts to a published checkpoint. policy: what it holds of --megatron already is used as it
    is."""
    with out if process_groups.is_main_rank() else nullcontext():
        collectives.barrier()  # out.partial is there
        train(args, config, policy, rollouts, out)
        collectives.barrier()  # every rank has written


def train(args, config, policy, rollouts, out) -> None:
    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.training.batching import make_rows, rollout_advantages

    where, objective = args.rollouts / "rollouts.jsonl", config.objective
    advantages = rollout_advantages(rollouts, config.rollout.group_size, objective.advantage, where)
    rows = make_rows(rollouts, advantages, args.data, config, policy.hf, where)
    rows_per_step = config.training.global_batch_size * config.rollout.group_size
    steps = [rows[start : start + rows_per_step] for start in range(0, len(rows), rows_per_step)]

    if objective.uses_reference:
        policy.load_reference(args.reference)
    if policy.at != args.megatron:
        policy.load(args.megatron)
    iteration = Iteration(args, config, policy, steps)
    started = time.time()
    cached, checks = first_sweeps(iteration)
    checks |= iteration.account_sweeps(time.time() - started)
    with MetricsLog(out.partial, args.iteration) if iteration.speaks else nullcontext() as log:
        attempts = optimizer_steps(iteration, cached, checks, log)
    iteration.bar.close()

    policy.save(out.partial, args.output)
    if process_groups.is_main_rank():
        megatron_files.copy_hf_files(args.megatron, out.partial)
        tokens = sum(row.response_length for row in rows)
        out.counts |= {
            "rollouts": len(rows),
            "steps": len(steps),
            "total_steps": policy.state["step"],
            "response_tokens": tokens,
        }
        out.counts |= {"attempts": attempts, "guard_interventions": policy.state["guard"]["interventions"]}


class Iteration:
    """What the parts of the stage share: the rollouts of each optimizer step, this rank's among them, and how to sweep
    over them."""

    def __init__(self, args, config, policy, steps):
        from tqdm import tqdm

        from megatron_papo.training import accounting
        from megatron_papo.training.batching import Collator, split_over_ranks

        self.args, self.config, self.policy, self.steps = args, config, policy, steps
        ranks = process_groups.dp_group()
        self.mine = [split_over_ranks(step, config.training.layout, ranks.size())[ranks.rank()] for step in steps]
        self.my_rows = [row for step in self.mine for row in step]
        self.collator = Collator(
            config,
            policy.hf,
            args.data,
            with_pixels=process_groups.is_first_stage(),
            device=process_groups.device(),
            dtype=policy.dtype,
        )
        objective = config.objective
        self.masked_branch_is_swept = (
            objective.uses_masked_image and objective.masked_branch != "cached" and not objective.masked_rows_ride
        )
        self.first_kinds = (
            ["original"] if len(steps) > 1 else []
        )  # with one step the update itself says what the old policy was
        if objective.uses_masked_image and objective.masked_branch == "cached":
            self.first_kinds.append("masked")
        passes = objective.uses_reference + len(self.first_kinds) + self.passes_of_steps
        accounting.peak_memory()  # counts from here
        self.speaks = collectives.is_reporting_rank()
        self.bar = tqdm(total=passes * len(self.my_rows), unit="rollout", disable=not self.speaks, mininterval=1.0)

    @property
    def passes_of_steps(self) -> int:
        """Over the rollouts, that the optimizer steps make."""
        return 1 + self.masked_branch_is_swept

    def show(self, what: str) -> None:
        self.bar.set_description(f"iteration {self.args.iteration}: {what}")

    def sweep(self, model, rows, kinds=("original",)) -> dict[str, dict[str, list]]:
        """{kind of pictures: log_probs and entropy} of this rank's rows, without gradient."""
        from megatron_papo.training.forward_step import sweep

        size = self.config.training.log_prob_micro_batch_size
        return sweep(model, self.collator, rows, size, self.config.rollout.temperature, self.bar.update, kinds)

    def account_sweeps(self, seconds: float) -> dict[str, float]:
        """What the first sweeps computed in so many seconds, each metric with sweep_ in front. Collective over all
        ranks."""
        from megatron_papo.training import accounting

        passes = accounting.sweeps(
            ["original"] * self.config.objective.uses_reference + self.first_kinds, self.config.training
        )
        return (
            {f"sweep_{name}": value for name, value in self._account(self.steps, passes, seconds).items()}
            if passes
            else {}
        )

    def account_step(self, step, seconds: float) -> dict[str, float]:
        """The same of one optimizer step: the update, and the sweep before it if there is one."""
        from megatron_papo.training import accounting

        passes = accounting.sweeps(["masked"] * self.masked_branch_is_swept, self.config.training)
        return self._account([step], [*passes, accounting.update(self.config.objective, self.config.training)], seconds)

    def _account(self, steps, passes, seconds: float) -> dict[str, float]:
        from megatron_papo.training import accounting

        peak = accounting.peak_memory()
        if not self.speaks:
            return peak
        return (
            accounting.step_accounting(steps, self.config, self.policy.hf, passes, seconds, accounting.device_name())
            | peak
        )


def masked_branch(swept: dict[str, dict[str, list]]) -> dict[str, list]:
    """The loss's tensors of the masked-image branch, from a sweep with masked pictures."""
    return {"masked_image_log_probs": swept["masked"]["log_probs"], "masked_image_entropy": swept["masked"]["entropy"]}


def first_sweeps(iteration: Iteration):
    """2 and 3. -> what stays fixed while the policy trains, and what that says about the rollouts."""
    import torch

    from megatron_papo.training.rollout_checks import parity_gate

    args, config, policy, rows = iteration.args, iteration.config, iteration.policy, iteration.my_rows
    cached, checks = {}, {}
    if config.objective.uses_reference:
        iteration.show("reference")
        with policy.as_reference() as model:
            cached["ref_log_probs"] = iteration.sweep(model, rows)["original"]["log_probs"]
    iteration.show("old policy")
    swept = iteration.sweep(policy.model, rows, iteration.first_kinds)
    if "original" in swept:
        cached["old_log_probs"] = swept["original"]["log_probs"]
        checks |= check_old_policy(iteration, rows, swept["original"])
    if "masked" in swept:
        cached |= masked_branch(swept)
    if config.objective.importance_sampling_cap is not None and process_groups.is_last_stage():
        cached["rollout_log_probs"] = [
            torch.tensor(row.rollout.rollout_log_probs, device=process_groups.device()) for row in rows
        ]
    if all(row.rollout.staleness == 0 for row in iteration.steps[0]):  # older weights have other log-probs
        limit = config.training.max_rollout_log_prob_difference
        original = lambda model, some: iteration.sweep(model, some)["original"]
        checks |= parity_gate(policy.model, original, rows, args.megatron / HF_FILES, limit)
    return cached, checks


def check_old_policy(iteration: Iteration, rows, old: dict[str, list]) -> dict[str, float]:
    """What the old policy's log-probs say about the server's and about the sampling."""
    from megatron_papo.training.rollout_checks import compare_with_server, measure_sampling_bias

    return compare_with_server(rows, old["log_probs"], limit=None) | measure_sampling_bias(
        old, iteration.config.rollout.top_p
    )


def optimizer_steps(iteration: Iteration, cached: dict, checks: dict, log) -> int:
    """4. The steps, once, or again with a lower gamma from where the guard has gone back to. -> how often they were
    tried."""
    from megatron_papo.objective.papo_loss import finish_metrics
    from megatron_papo.training.forward_step import StepTotals, loss_settings, papo_step
    from megatron_papo.training.guard import Guard
    from megatron_papo.training.optimizer import learning_rate, set_learning_rate

    args, config, policy, bar = iteration.args, iteration.config, iteration.policy, iteration.bar
    guard = Guard(config.hacking_guard, config.objective, policy.state.get("guard"))
    number, attempt = 0, 1
    while number < len(iteration.steps):
        step, my_step, first = iteration.steps[number], iteration.mine[number], sum(map(len, iteration.mine[:number]))
        iteration.show(f"step {number + 1}/{len(iteration.steps)}")
        started = time.time()
        settings = loss_settings(config.objective, policy.state["step"], guard.kl_prcp_scale)
        here = {name: values[first : first + len(my_step)] for name, values in cached.items()}
        if iteration.masked_branch_is_swept:
            here |= masked_branch(iteration.sweep(policy.model, my_step, ["masked"]))
        rate = learning_rate(policy.state["step"], config.optimizer)
        set_learning_rate(policy.optimizer, rate)
        policy.model.zero_grad_buffer()
        policy.optimizer.zero_grad()
        seen = {"log_probs": [], "entropy": []}
        contributions = papo_step(
            policy.model,
            iteration.collator,
            my_step,
            here,
            config.training.micro_batch_size,
            config.rollout.temperature,
            config.objective,
            totals=StepTotals.of(step),
            settings=settings,
            progress=bar.update,
            seen=seen,
        )
        _, gradient_norm, _ = policy.optimizer.step()
        metrics = finish_metrics(collectives.sum_from_last_stage(contributions))
        check_finite(metrics["loss"], gradient_norm, policy.state["step"] + 1)
        if "old_log_probs" not in cached:  # the one step of the iteration: what the update saw was the old policy
            checks = checks | check_old_policy(iteration, my_step, seen)
        policy.state["step"] += 1
        number += 1

        seconds = time.time() - started
        metrics |= iteration.account_step(step, seconds)
        decision = guard.observe(metrics, policy.state["step"], attempt)
        if iteration.speaks:
            update = {
                "gradient_norm": float(gradient_norm),
                "learning_rate": rate,
                "seconds": seconds,
                "attempt": attempt,
            }
            used = {"kl_prcp_coef": settings["kl_prcp_coef"], "guard_signs": len(guard.signs)}
            log.write(policy.state["step"], metrics | step_statistics(step) | checks | update | used)
            if decision is not None:
                log.write_decision(decision)
                bar.write(decision.message)
        if decision is not None and decision.action == "stop":
            raise UserError(f"{decision.message}: nothing of this iteration was saved")
        if decision is not None and decision.action == "rollback":
            back = args.rollback or args.megatron
            policy.load(back)
            guard.went_back()
            if back != args.megatron:  # another policy made these rollouts: leave them
                break
            number, attempt = 0, attempt + 1
            bar.total += iteration.passes_of_steps * len(iteration.my_rows)
    policy.state = policy.state | {"guard": guard.state.as_dict()}
    return attempt


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

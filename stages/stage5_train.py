"""Stage 5: one iteration of PAPO on the rollouts of stage 4, with tensor, pipeline and data parallelism.

    1. load the policy (and the reference, into host memory)
    2. reference log-probs: one forward sweep                 (not if kl_ref_coef is 0: it is then not even loaded)
    3. old log-probs and masked-image log-probs: one sweep    (no old ones where the iteration is one step: ratio 1)
    4. for every global_batch_size prompts: forward and backward, all-reduce, clip, AdamW
       (rollouts are used once, in order)
       after each step the hacking guard looks at its metrics; it may lower kl_prcp_coef, go back to a checkpoint, or
       stop

reads   --megatron   weights, optimizer and step of the iteration before (or stage 3's output)
        --reference  stage 3's output, the frozen reference of KL_ref
        --rollouts   stage 4's output, --data stage 1's output (the images)
        --rollback   an earlier checkpoint that the guard may go back to (default: --megatron)
writes  --output     Megatron checkpoint with optimizer state, metrics.jsonl (one line per optimizer step), guard.jsonl,
                     tensorboard/
run by  torchrun --nproc-per-node TP*PP*DP -m stages.stage5_train ...

With --follow runs/NAME it stays for all iterations of the run (run_all.sh --resident): it waits for each iteration's
rollouts, trains with what it holds in memory, and writes both the Megatron checkpoint and stage 6's export of it.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from megatron_papo.config import Config
from megatron_papo.config_files import load_config
from megatron_papo.distributed import collectives, process_groups
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HF_FILES, HFConfig, read_hf_config
from megatron_papo.model.parallel_sizes import check_parallel_sizes
from megatron_papo.run.command_line import check_paths_given, run, stage_parser
from megatron_papo.run.records import Rollout, read_jsonl
from megatron_papo.run.run_directory import Follower, RunDirectory
from megatron_papo.run.stage_output import StageOutput, require_input
from megatron_papo.training.guard import Guard
from megatron_papo.training.inputs import TrainInputs
from megatron_papo.training.metrics_log import MetricsLog

if TYPE_CHECKING:  # torch and megatron take seconds to import: wrong configurations are told before
    from megatron_papo.training.forward_step import PerRollout, Seen
    from megatron_papo.training.passes import Passes
    from megatron_papo.training.policy import Policy
    from megatron_papo.training.rows import TrainingRollout

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
        inputs = TrainInputs(
            args.iteration, args.data, args.rollouts, args.megatron, args.reference, args.rollback, args.output
        )
        out = prepare(inputs, config, args.config)
        if out.done:
            if process_groups.is_main_rank():
                out.announce_done()
            return
        hf = check_model(inputs.megatron, config)
        rollouts = read_rollouts(inputs, config)
    from megatron_papo.training.policy import Policy

    process_groups.initialize(config.parallel)
    iterate(inputs, config, Policy(config, hf), rollouts, out)
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
            inputs = TrainInputs(
                iteration=number,
                data=run.data,
                rollouts=run.rollouts(number),
                megatron=run.trained(number - 1),
                reference=run.reference,
                rollback=run.rollback(number),
                output=run.trained(number),
            )
            with collectives.first_process_speaks():
                out = prepare(inputs, config, args.config, trusted if policy.at == inputs.megatron else ())
                if not out.done:
                    rollouts = read_rollouts(inputs, config)
            if out.done:
                if speaks:
                    out.announce_done()
            else:
                out.started = started
                iterate(inputs, config, policy, rollouts, out)
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


def prepare(inputs: TrainInputs, config: Config, config_file: Path, trusted: tuple[str, ...] = ()) -> StageOutput:
    """The output, after all the checks that need no process group. trusted: inputs whose files need not be verified
    again."""
    reference = inputs.reference or "REFERENCE"
    stage3 = (
        f"python -m stages.stage3_convert_to_megatron --config {config_file} --hf HF_CHECKPOINT --output {reference}"
    )
    stage4 = (
        f"python -m stages.stage4_rollout --config {config_file} --iteration {inputs.iteration} ..."
        f" --output {inputs.rollouts}"
    )
    stage1 = f"python -m stages.stage1_prepare_data --config {config_file} --output {inputs.data}"
    checkpoints = ("stage3_convert_to_megatron", "stage5_train")
    read = {
        "megatron": require_input(inputs.megatron, checkpoints, stage3),
        "rollouts": require_input(inputs.rollouts, ("stage4_rollout",), stage4),
        "data": require_input(inputs.data, ("stage1_prepare_data",), stage1),
    }
    if config.objective.uses_reference:
        if inputs.reference is None:
            raise UserError(
                f"--reference: needed, because objective.kl_ref_coef is {config.objective.kl_ref_coef}: make it with:"
                f" {stage3}"
            )
        read["reference"] = require_input(inputs.reference, ("stage3_convert_to_megatron",), stage3)
    if config.hacking_guard.action == "rollback_and_lower_gamma":
        read["rollback"] = require_input(inputs.rollback_checkpoint, checkpoints, stage3)
    read |= {name: str(read[name]) for name in trusted if name in read}
    out = StageOutput("stage5_train", inputs.output, config, SECTIONS, read, {"iteration": inputs.iteration})
    if process_groups.is_main_rank() and config.objective.uses_reference and not out.done:
        from megatron_papo.checkpoint.verify import require_proof

        require_proof(inputs.reference)
    return out


def check_model(checkpoint: Path, config: Config) -> HFConfig:
    """The HFConfig of a checkpoint's model. Raises UserError where the parallel section cannot cut it."""
    hf = read_hf_config(checkpoint / HF_FILES)
    check_parallel_sizes(hf, config.parallel)
    return hf


def read_rollouts(inputs: TrainInputs, config: Config) -> list[Rollout]:
    """Raises UserError for rollouts that older weights made than rollout.max_staleness allows."""
    where = inputs.rollouts_file
    rollouts = read_jsonl(where, Rollout)
    oldest, allowed = max(rollout.staleness for rollout in rollouts), config.rollout.max_staleness
    if oldest > allowed:
        raise UserError(
            f"{where}: rollouts by weights {oldest} iteration(s) old, rollout.max_staleness is {allowed}: sample them"
            " again, or raise it"
        )
    return rollouts


def iterate(inputs: TrainInputs, config: Config, policy: "Policy", rollouts: list[Rollout], out: StageOutput) -> None:
    """One iteration, from rollouts to a published checkpoint. policy: what it holds of inputs.megatron already is used
    as it is."""
    with out if process_groups.is_main_rank() else nullcontext():
        collectives.barrier()  # out.partial is there
        train(inputs, config, policy, rollouts, out)
        collectives.barrier()  # every rank has written


def train(inputs: TrainInputs, config: Config, policy: "Policy", rollouts: list[Rollout], out: StageOutput) -> None:
    """The algorithm of the module's docstring, and the checkpoint that it ends in."""
    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.training.accounting import peak_memory
    from megatron_papo.training.collator import Collator
    from megatron_papo.training.passes import Passes, PassPlan, split_into_steps
    from megatron_papo.training.rows import make_rows, rollout_advantages

    group_size, estimator = config.rollout.group_size, config.objective.advantage
    advantages = rollout_advantages(rollouts, group_size, estimator, inputs.rollouts_file)
    rows = make_rows(rollouts, advantages, inputs.data, config, policy.hf, inputs.rollouts_file)
    data_parallel = process_groups.dp_group()
    steps = split_into_steps(rows, config, data_parallel.rank(), data_parallel.size())

    if inputs.reference is not None and config.objective.uses_reference:  # 1.
        policy.load_reference(inputs.reference)
    if policy.at != inputs.megatron:
        policy.load(inputs.megatron)

    speaks, plan = collectives.is_reporting_rank(), PassPlan.of(config.objective, len(steps))
    collator = Collator(
        config,
        policy.hf,
        inputs.data,
        with_pixels=process_groups.is_first_stage(),
        device=process_groups.device(),
        dtype=policy.dtype,
    )
    peak_memory()  # counts from here
    rollouts_to_pass = plan.count * sum(len(step.own) for step in steps)
    with (
        tqdm(total=rollouts_to_pass, unit="rollout", disable=not speaks, mininterval=1.0) as bar,
        MetricsLog(out.partial, inputs.iteration) if speaks else nullcontext() as log,
    ):
        passes = Passes(config, policy.hf, steps, plan, collator, bar.update)
        constants, checks = sweep_rollouts(inputs, policy, passes, bar)
        attempts = optimizer_steps(inputs, policy, passes, constants, checks, log, bar)

    policy.save(out.partial, inputs.output)
    if process_groups.is_main_rank():
        megatron_files.copy_hf_files(inputs.megatron, out.partial)
        out.counts |= {
            "rollouts": len(rows),
            "steps": len(steps),
            "total_steps": policy.state["step"],
            "response_tokens": sum(row.response_length for row in rows),
            "attempts": attempts,
            "guard_interventions": policy.state["guard"]["interventions"],
        }


def sweep_rollouts(
    inputs: TrainInputs, policy: "Policy", passes: "Passes", bar: tqdm
) -> tuple["PerRollout", dict[str, float]]:
    """2 and 3. -> what stays constant in the loss while the policy trains, and what that says about the rollouts."""
    from megatron_papo.training.rollout_checks import compare_with_server, parity_sample, read_vocabulary

    started = time.time()
    checks: dict[str, float] = {}
    bar.set_description(f"iteration {inputs.iteration}: reference")
    constants = passes.sweep_reference(policy)
    bar.set_description(f"iteration {inputs.iteration}: old policy")
    vocabulary = read_vocabulary(inputs.megatron / HF_FILES)
    # The server's log-probs can be compared only where it had these weights.
    fresh = all(row.rollout.staleness == 0 for row in passes.steps[0].all)
    forbidden = vocabulary.forbidden if fresh else ()
    constants_of_policy, old = passes.sweep_policy(policy.model, forbidden)
    if old is not None:
        checks |= check_old_policy(passes, passes.rows, old, bar)
    if fresh:
        compared, seen = passes.rows, old
        if seen is None:
            compared = parity_sample(passes.rows)
            seen = passes.sweep(policy.model, compared, ["original"], forbidden)["original"]
        log_probs = seen.allowed_log_probs if forbidden else seen.log_probs
        limit = passes.config.training.max_rollout_log_prob_difference
        checks |= compare_with_server(compared, log_probs, limit, vocabulary.decode, "parity")
    return constants | constants_of_policy, checks | passes.account_sweeps(time.time() - started)


def check_old_policy(passes: "Passes", rows: list["TrainingRollout"], old: "Seen", bar: tqdm) -> dict[str, float]:
    """What the old policy says about the server's log-probs and about the sampling; a bias that top_p makes is said
    aloud."""
    from megatron_papo.training.rollout_checks import compare_with_server, sampling_bias, sampling_bias_message

    bias = sampling_bias(old)
    message = sampling_bias_message(bias, passes.config.rollout.top_p)
    if message is not None and collectives.is_reporting_rank():
        bar.write(message)
    return compare_with_server(rows, old.log_probs) | bias


def optimizer_steps(
    inputs: TrainInputs,
    policy: "Policy",
    passes: "Passes",
    constants: "PerRollout",
    checks: dict[str, float],
    log: MetricsLog | None,
    bar: tqdm,
) -> int:
    """4. The steps, once, or again with a lower gamma from where the guard has gone back to. -> how often they were
    tried."""
    from megatron_papo.training.loss_recipe import loss_recipe
    from megatron_papo.training.optimizer import learning_rate
    from megatron_papo.training.passes import step_statistics

    config, steps = passes.config, passes.steps
    guard = Guard(config.hacking_guard, config.objective, policy.state.get("guard"))
    number, attempt = 0, 1
    while number < len(steps):
        bar.set_description(f"iteration {inputs.iteration}: step {number + 1}/{len(steps)}")
        started, step = time.time(), steps[number]
        recipe = loss_recipe(config.objective, policy.state["step"], guard.kl_prcp_scale)
        rate = learning_rate(policy.state["step"], config.optimizer)
        update = passes.update(policy, step, constants, recipe, rate)
        if "old_log_probs" not in constants:  # the one step of the iteration: what the update saw was the old policy
            checks = checks | check_old_policy(passes, step.own, update.seen, bar)
        policy.state["step"] += 1
        number += 1

        seconds = time.time() - started
        metrics = update.metrics | passes.account_step(step, seconds)
        decision = guard.observe(metrics, policy.state["step"], attempt)
        if log is not None:
            of_step = {"gradient_norm": update.gradient_norm, "learning_rate": rate, "seconds": seconds}
            used = {"kl_prcp_coef": recipe.coefficients.kl_prcp, "guard_signs": len(guard.signs), "attempt": attempt}
            log.write(policy.state["step"], metrics | step_statistics(step.all) | checks | of_step | used)
            if decision is not None:
                log.write_decision(decision)
                bar.write(decision.message)
        if decision is not None and decision.action == "stop":
            raise UserError(f"{decision.message}: nothing of this iteration was saved")
        if decision is not None and decision.action == "rollback":
            policy.load(inputs.rollback_checkpoint)
            guard.went_back()
            if inputs.rollback_checkpoint != inputs.megatron:  # another policy made these rollouts: leave them
                break
            number, attempt = 0, attempt + 1
            bar.total += passes.plan.count_of_steps * len(passes.rows)
    policy.state = policy.state | {"guard": guard.state.as_dict()}
    return attempt


if __name__ == "__main__":
    run(main)

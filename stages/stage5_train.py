"""Stage 5: one iteration of PAPO on the rollouts of stage 4, with tensor, pipeline and data parallelism.

    1. load the policy (and the reference, into host memory)
    2. reference log-probs: one forward sweep                 (not if kl_ref_coef is 0: it is then not even loaded)
    3. old log-probs and masked-image log-probs: one sweep    (no old ones of the first step: there the ratio is 1)
    4. for every global_batch_size prompts: forward and backward, all-reduce, clip, AdamW
       (rollouts are used once, in order)
       after each step the hacking guard looks at its metrics; it may lower kl_prcp_coef, go back to a checkpoint, or
       stop

reads   --megatron   weights, optimizer and step of the iteration before (or stage 3's output)
        --reference  stage 3's output, the frozen reference of KL_ref
        --rollouts   stage 4's output, --data stage 1's output (the images)
        --rollback   an earlier checkpoint that the guard may go back to, where it may
writes  --output     Megatron checkpoint with optimizer state, metrics.jsonl (one line per optimizer step), guard.jsonl
run by  torchrun --nproc-per-node TP*PP*DP -m -- stages.stage5_train ...

With --iterations A-B it stays for all of these iterations of a run (run_all.sh --resident): it waits for each one's
rollouts, trains with what it holds in memory, and writes both the Megatron checkpoint and stage 6's export of it. Where
checkpoint_every is above 1, the checkpoints in between hold weights alone, until they are exported; a run that goes on
from there repeats the iterations since the last whole one, from their rollouts. With export_directory those in between
write no weights to the disk; with save_while_sampling whole ones are written while stage 4 samples.

`touch runs/NAME/stage5_train.end` asks it to end: it ends the optimizer step in progress, saves what it has beside the
output, in OUTPUT.interim, and leaves with status 75. The same command goes on from there.
"""

import math
import shutil
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from megatron_papo.checkpoint.keep import WEIGHTS_ALONE, holds_weights_alone, note_pruned, tidy
from megatron_papo.checkpoint.proof import require_proof
from megatron_papo.config import Config
from megatron_papo.config_notes import bytes_of_checkpoint
from megatron_papo.distributed import collectives, process_groups
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HF_FILES, HFConfig, read_hf_config
from megatron_papo.model.parallel_sizes import check_parallel_sizes
from megatron_papo.run.command_line import StageParser, Task, run
from megatron_papo.run.console import progress_bar
from megatron_papo.run.end_request import EndedEarly, EndRequest
from megatron_papo.run.follow import Follower
from megatron_papo.run.manifest import require_weights
from megatron_papo.run.records import Rollout
from megatron_papo.run.room import require_room
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stage_output import PRUNED, StageOutput, read_manifest, verify_files
from megatron_papo.run.state import is_done_with
from megatron_papo.training.guard import Guard
from megatron_papo.training.inputs import TrainInputs, read_rollouts
from megatron_papo.training.metrics_log import MetricsLog

if TYPE_CHECKING:  # torch and megatron take seconds to import: wrong configurations are told before
    from megatron_papo.checkpoint.megatron_files import Save
    from megatron_papo.training.forward_step import PerRollout, Seen
    from megatron_papo.training.interim import Interim, Progress
    from megatron_papo.training.passes import Passes
    from megatron_papo.training.policy import Policy


def main() -> None:
    with collectives.first_process_speaks():
        args, tasks = StageParser("stage5_train", __doc__ or "").parse()
        task, stays = tasks[0], args.iterations is not None
        out = None if stays else prepare(task)
        if out is not None and out.done:
            if process_groups.is_main_rank():
                out.announce_done()
            return
        task.input("megatron")
        hf = check_model(task.path("megatron"), task.config)
        rollouts = None if out is None else read_rollouts(TrainInputs.of(task), task.config)
    from megatron_papo.training.policy import Policy

    process_groups.initialize(task.config.parallel)
    policy = Policy(task.config, hf)
    try:
        if out is None or rollouts is None:
            follow(tasks, policy)
        else:
            end_if_asked(task, policy)
            iterate(task, policy, rollouts, out, is_whole=True).publish()
    except EndedEarly:
        collectives.barrier()  # the first rank has saved and cleaned up: a launcher ends it once another one has left
        raise
    process_groups.shutdown()


def follow(tasks: list[Task], policy: "Policy") -> None:
    """Train all these iterations as stage 4 makes their rollouts: one process, the same outputs."""
    run, speaks = tasks[0].run, process_groups.is_main_rank()
    assert run is not None
    trusted: tuple[str, ...] = ()
    unpublished: Trained | None = None
    with Follower(run.root, "stage5_train", "stage4_rollout", speaks) as follower:
        for task in tasks:
            try:
                follower.wait_for(run.rollouts(task.iteration), EndRequest(run))
            finally:  # before the policy changes, and where sampling has failed
                if unpublished is not None:
                    unpublished.publish()
                    unpublished = None
            end_if_asked(task, policy)
            started = time.time()
            with collectives.first_process_speaks():
                out = prepare(task, trusted if policy.at == task.path("megatron") else (), started)
                rollouts = [] if out.done else read_rollouts(TrainInputs.of(task), task.config)
            if not out.done:
                is_whole = run.is_checkpoint(task.iteration)
                trained = iterate(task, policy, rollouts, out, is_whole, run.in_memory(task.iteration))
                if is_whole and run.config.save_while_sampling:
                    unpublished = trained
                else:
                    trained.publish()
                # read and verified once, or just written and still in memory
                trusted = ("data", "reference", "megatron")
                if run.config.server.shares_gpus:  # before the export is published, which is what sampling waits for
                    policy.forget()
            elif speaks:
                out.announce_done()
            if any(collectives.gather(is_done_with(run, task.iteration))):
                continue
            source = weights_to_export(task, policy)
            if speaks:
                export(run, task.iteration, source)
            if unpublished is not None:
                unpublished.begin()
            follower.wait_for(run.exported(task.iteration))  # no collective: an export may take longer than those wait
        if unpublished is not None:
            unpublished.publish()


def weights_to_export(task: Task, policy: "Policy") -> Path:
    """Return a Megatron checkpoint with the weights of the task's iteration: its output, or one beside the export that
    is to be made, where the output holds none (export_directory) or is not written yet (save_while_sampling). All ranks
    call it together."""
    from megatron_papo.checkpoint import megatron_files

    run, trained = task.run, task.output
    assert run is not None
    place = run.weights_to_export(task.iteration)
    is_published = read_manifest(trained) is not None
    is_made = not (trained / PRUNED).exists() or read_manifest(run.exported(task.iteration)) is not None
    if all(collectives.gather(is_published and is_made)):
        return trained
    catch_up(earlier_task(task, task.iteration + 1), policy)  # nothing to do for one who has just trained it
    if policy.at != trained:  # a whole checkpoint whose weights are gone is not made again
        require_weights(trained)
        raise RuntimeError(f"{trained}: the policy is at {policy.at}")
    if process_groups.is_main_rank():
        shutil.rmtree(place, ignore_errors=True)
    collectives.barrier()  # before the others look whether something is there
    inputs = {name: replace(made_from, verify=False) for name, made_from in task.inputs().items()}
    out = replace(task, output=place).stage_output(inputs, time.time())
    with collectives.within_first_process(out):
        if not all(collectives.gather(out.partial.is_dir())):
            with collectives.first_process_speaks():
                key = "export_directory" if run.in_memory(task.iteration) else "run"
                raise UserError(f"{key} {place.parent}: not all ranks see the same files there: choose another place")
        out.hashes |= policy.save(out.partial, trained, with_optimizer=False)
        if process_groups.is_main_rank():
            megatron_files.copy_hf_files(task.path("megatron"), out.partial)
            out.counts[WEIGHTS_ALONE] = True
    return place


def export(run: RunDirectory, number: int, source: Path) -> None:
    """Do stage 6's work in this process, and delete what the cadence does not keep.

    Args:
        run: The run.
        number: The iteration.
        source: Its weights; deleted afterwards where it is not the iteration's checkpoint.
    """
    from megatron_papo.checkpoint.conversion_output import to_hf

    to_hf(source, run.exported(number), {}, started=time.time())
    if source != run.trained(number):
        shutil.rmtree(source, ignore_errors=True)
    if read_manifest(run.trained(number)) is not None:
        tidy(run, number)


def prepare(task: Task, trusted: tuple[str, ...] = (), started: float | None = None) -> StageOutput:
    """Return the output, after all the checks that need no process group.

    Args:
        task: The turn.
        trusted: Inputs whose files need not be verified again.
        started: time.time() when it could begin; None: with this process.
    """
    inputs = task.inputs()
    unread = ("megatron",) if (task.path("megatron") / PRUNED).exists() else ()  # catch_up makes its weights again
    inputs |= {name: replace(inputs[name], verify=False) for name in (*trusted, *unread) if name in inputs}
    out = task.stage_output(inputs, started)
    if process_groups.is_main_rank() and not out.done:
        if "reference" in task.paths:
            require_proof(task.path("reference"))
        require_room_to_save(task)
    return out


def require_room_to_save(task: Task) -> None:
    """Raise UserError where the checkpoint will not fit that the iteration ends with: before it trains, not after."""
    from megatron_papo.checkpoint.name_map import pieces

    model = pieces(read_hf_config(task.path("megatron") / HF_FILES))
    parameters = sum(math.prod(piece.megatron_shape) for piece in model)
    require_room(task.output, bytes_of_checkpoint(task.config, parameters), "weights and optimizer of this iteration")


def check_model(checkpoint: Path, config: Config) -> HFConfig:
    """Return the HFConfig of a checkpoint's model. Raises UserError where the parallel section cannot cut it."""
    hf = read_hf_config(checkpoint / HF_FILES)
    check_parallel_sizes(hf, config.parallel)
    return hf


def end_if_asked(task: Task, policy: "Policy") -> None:
    """Raise EndedEarly where somebody wants training to end, before the task has begun.

    Where the checkpoint that the task starts from holds weights alone and the policy still has its optimizer, that is
    saved first.
    """
    request, start = EndRequest(task.run), task.path("megatron")
    if not request.is_agreed():
        return
    if policy.at == start and holds_weights_alone(start):
        interim_of_trained(task, task.iteration - 1).save(policy, None)
    request.answer(f"stage 5: iteration {task.iteration}: ended before it began")


def interim_of_trained(task: Task, number: int) -> "Interim":
    """Return the interim checkpoint of an earlier iteration of the task's run."""
    from megatron_papo.training.interim import Interim

    earlier = earlier_task(task, number)
    with collectives.first_process_speaks():
        return Interim(earlier, earlier.inputs())


def earlier_task(task: Task, number: int) -> Task:
    """Return the same stage's task of an earlier iteration of the run."""
    assert task.run is not None
    return Task.in_run(task.run, task.stage, replace(task.turn, iteration=number))


def catch_up(task: Task, policy: "Policy") -> None:
    """Bring the policy to the checkpoint that the task starts from, where that does not hold the optimizer: from what
    was saved whole since, by repeating iterations.

    Raises UserError where there are no rollouts to repeat.
    """
    start = task.path("megatron")
    if policy.at == start or not holds_weights_alone(start):
        return
    run = task.run
    if run is None or start != run.trained(task.iteration - 1):
        raise UserError(f"{start}: holds no optimizer state (checkpoint_every): give a checkpoint that does")
    whole = task.iteration - 1
    while holds_weights_alone(run.trained(whole)):
        interim = interim_of_trained(task, whole)
        if interim.is_whole:
            interim.load_whole(policy)
            policy.at = run.trained(whole)
            break
        whole -= 1
    for number in range(whole + 1, task.iteration):
        inputs = TrainInputs.of(earlier_task(task, number))
        if process_groups.is_main_rank():
            print(
                f"stage 5: iteration {number} again, from its rollouts: its checkpoint holds weights alone", flush=True
            )
        with collectives.first_process_speaks():
            verify_files(inputs.rollouts)
            rollouts = read_rollouts(inputs, task.config)
        train(inputs, policy, rollouts, None)
        policy.at = run.trained(number)
        end_if_asked(earlier_task(task, number + 1), policy)


def iterate(
    task: Task,
    policy: "Policy",
    rollouts: list[Rollout],
    out: StageOutput,
    is_whole: bool,
    memory: Path | None = None,
) -> "Trained":
    """Do one iteration, from rollouts to a checkpoint that is to be published, or from where it was asked to end.

    Args:
        task: The turn.
        policy: What it holds of the task's checkpoint already is used as it is.
        rollouts: Of the iteration.
        out: The output, not open yet.
        is_whole: Write the optimizer, too.
        memory: Where the iteration is exported to in memory: then no weights are written. None: they are.
    """
    from megatron_papo.training.interim import Interim

    inputs = TrainInputs.of(task)
    with ExitStack() as stack:
        stack.enter_context(collectives.within_first_process(out))
        with collectives.first_process_speaks():
            interim = Interim(task, out.inputs)
        if memory is not None and process_groups.is_main_rank():
            shutil.rmtree(memory, ignore_errors=True)  # of an earlier attempt; nothing waits there before this is done
        progress = interim.load(policy) if interim.is_between_steps else None
        if progress is None:
            catch_up(task, policy)
        counts = train(inputs, policy, rollouts, out.partial, interim, progress)
        out.counts |= counts if is_whole else counts | {WEIGHTS_ALONE: True}
        save = policy.prepare_save(out.partial, inputs.output, is_whole) if memory is None else None
        policy.at = inputs.output
        return Trained(task, out, save, stack.pop_all())
    raise AssertionError("no output suppresses an exception")


@dataclass
class Trained:
    """An iteration that is trained; its checkpoint is not published yet. All ranks call the methods together."""

    task: Task
    out: StageOutput
    save: "Save | None"
    """Of its weights, and optimizer; None: only what its export needs is written, in memory."""
    leaving: ExitStack
    """Closing it publishes."""
    begun: float | None = None

    def begin(self) -> None:
        """Write from a thread. The policy must not change before publish()."""
        self.begun = time.time()
        if self.save is not None:
            self.save.begin()

    def publish(self) -> None:
        """Publish the checkpoint, once it is written."""
        from megatron_papo.checkpoint import megatron_files

        if self.begun is not None:  # what has passed since is not the iteration's time
            self.out.started += time.time() - self.begun
        run, is_main = self.task.run, process_groups.is_main_rank()
        with self.leaving:
            if self.save is not None:
                self.out.hashes |= self.save.finish()
            if is_main:
                if self.save is None and run is not None:
                    note_pruned(self.out.partial, "checkpoint_every", run.config.checkpoint_every)
                megatron_files.copy_hf_files(self.task.path("megatron"), self.out.partial)
        if is_main and run is not None:
            from megatron_papo.run.curves import collect

            collect(run)
            if self.begun is not None:  # it is exported already
                tidy(run, self.task.iteration)


def train(
    inputs: TrainInputs,
    policy: "Policy",
    rollouts: list[Rollout],
    directory: Path | None,
    interim: "Interim | None" = None,
    progress: "Progress | None" = None,
) -> dict[str, int | float]:
    """The algorithm of the module's docstring; afterwards the policy is the trained one. Returns what was done.

    Args:
        inputs: Paths of the iteration.
        policy: Is brought to the end of the iteration.
        rollouts: Of the iteration.
        directory: Of metrics.jsonl and guard.jsonl; None: they have been written before.
        interim: Where the iteration may end early; None: it is done in one go.
        progress: How far it was, where it ended early; None: it begins, and the policy is loaded where it does not hold
            the iteration's checkpoint.
    """
    from megatron_papo.training.accounting import peak_memory
    from megatron_papo.training.collator import Collator
    from megatron_papo.training.interim import Place, Progress
    from megatron_papo.training.passes import Passes, PassPlan, split_into_steps
    from megatron_papo.training.rows import make_rows, rollout_advantages

    config = policy.config
    group_size, estimator = config.rollout.group_size, config.objective.advantage
    advantages = rollout_advantages(rollouts, group_size, estimator, inputs.rollouts_file)
    rows = make_rows(rollouts, advantages, inputs.data, config, policy.hf, inputs.rollouts_file)
    data_parallel = process_groups.dp_group()
    steps = split_into_steps(rows, config, data_parallel.rank(), data_parallel.size())

    if progress is None:  # 1.
        if inputs.reference is not None and config.objective.uses_reference:
            policy.load_reference(inputs.reference)
        if policy.at != inputs.megatron:
            policy.load(inputs.megatron)

    speaks, plan = collectives.is_reporting_rank(), PassPlan.of(config.objective)
    collator = Collator(
        config,
        policy.hf,
        inputs.data,
        with_pixels=process_groups.is_first_stage(),
        device=process_groups.device(),
        dtype=policy.dtype,
        encoded=policy.encoded_pictures,
    )
    peak_memory()  # counts from here
    at_start = sum(plan.count_at_start(number) * len(step.own) for number, step in enumerate(steps))
    left = steps if progress is None else steps[progress.place.steps :]
    rollouts_to_pass = (at_start if progress is None else 0) + plan.count_of_steps * sum(len(step.own) for step in left)
    with (
        progress_bar(rollouts_to_pass, f"iteration {inputs.iteration}", "rollouts", speaks) as bar,
        MetricsLog(directory, inputs.iteration) if speaks and directory is not None else nullcontext() as log,
    ):
        passes = Passes(config, policy.hf, steps, plan, collator, bar.update)
        if progress is None:
            constants, checks = sweep_rollouts(inputs, policy, passes, bar)
            progress = Progress(constants, Place(checks=checks))
        attempts = optimizer_steps(inputs, policy, passes, progress, interim, log, bar)
    return {
        "rollouts": len(rows),
        "steps": len(steps),
        "total_steps": policy.state["step"],
        "response_tokens": sum(row.response_length for row in rows),
        "attempts": attempts,
        "guard_interventions": policy.state["guard"]["interventions"],
    }


def sweep_rollouts(
    inputs: TrainInputs, policy: "Policy", passes: "Passes", bar: tqdm
) -> tuple[list["PerRollout"], dict[str, float]]:
    """2 and 3. -> what stays constant in the loss of each step while the policy trains, and what that says about the
    rollouts."""
    from megatron_papo.training.rollout_checks import compare_with_server, parity_sample, read_vocabulary

    started = time.time()
    checks: dict[str, float] = {}
    bar.set_description(f"iteration {inputs.iteration}: reference")
    of_reference = passes.sweep_reference(policy)
    bar.set_description(f"iteration {inputs.iteration}: old policy")
    vocabulary = read_vocabulary(inputs.megatron / HF_FILES)
    # The server's log-probs can be compared only where it had these weights.
    fresh = all(row.rollout.staleness == 0 for row in passes.steps[0].all)
    forbidden = vocabulary.forbidden if fresh else ()
    of_policy, seen = passes.sweep_policy(policy.model, forbidden)
    if fresh:
        compared = passes.later_rows
        if seen is None:
            compared = parity_sample(passes.rows)
            seen = passes.sweep(policy.model, compared, ["original"], forbidden)["original"]
        log_probs = seen.allowed_log_probs if forbidden else seen.log_probs
        limit = passes.config.training.max_rollout_log_prob_difference
        checks |= compare_with_server(compared, log_probs, limit, vocabulary.decode, "parity")
    constants = [one | other for one, other in zip(of_reference, of_policy, strict=True)]
    return constants, checks | passes.account_sweeps(time.time() - started)


def check_old_policy(
    passes: "Passes", of_first_step: "Seen", constants: list["PerRollout"], bar: tqdm
) -> dict[str, float]:
    """What the old policy says about the server's log-probs and about the sampling, once the first step has said its
    part; a bias that top_p makes is said aloud."""
    from megatron_papo.training.forward_step import Seen
    from megatron_papo.training.rollout_checks import compare_with_server, sampling_bias, sampling_bias_message

    old = Seen([*of_first_step.log_probs], [*of_first_step.entropy])
    for of_step in constants[1:]:
        old.log_probs.extend(of_step["old_log_probs"])
        old.entropy.extend(of_step["old_entropy"])
    bias = sampling_bias(old)
    message = sampling_bias_message(bias, passes.config.rollout.top_p)
    if message is not None and collectives.is_reporting_rank():
        bar.write(message)
    return compare_with_server(passes.rows, old.log_probs) | bias


def optimizer_steps(
    inputs: TrainInputs,
    policy: "Policy",
    passes: "Passes",
    progress: "Progress",
    interim: "Interim | None",
    log: MetricsLog | None,
    bar: tqdm,
) -> int:
    """4. The steps, once, or again with a lower gamma from where the guard has gone back to. -> how often they were
    tried.

    Raises EndedEarly, with what is done saved, where somebody wants training to end.
    """
    from megatron_papo.training.interim import Place, Progress
    from megatron_papo.training.loss_recipe import loss_recipe
    from megatron_papo.training.optimizer import learning_rate
    from megatron_papo.training.passes import step_statistics

    config, steps = passes.config, passes.steps
    guard = Guard(config.hacking_guard, config.objective, policy.state.get("guard"))
    constants, checks = progress.constants, progress.place.checks
    number, attempt = progress.place.steps, progress.place.attempt
    while number < len(steps):
        if interim is not None and interim.is_asked_for():
            policy.state = policy.state | {"guard": guard.state.as_dict()}
            interim.save(policy, Progress(constants, Place(steps=number, attempt=attempt, checks=checks)))
            interim.request.answer(f"stage 5: iteration {inputs.iteration}: ended after step {number} of {len(steps)}")
        bar.set_description(f"iteration {inputs.iteration}: step {number + 1}/{len(steps)}")
        started, step = time.time(), steps[number]
        recipe = loss_recipe(config.objective, policy.state["step"], guard.kl_prcp_scale)
        rate = learning_rate(policy.state["step"], config.optimizer)
        update = passes.update(policy, step, constants[number], recipe, rate)
        if number == 0:  # what it saw was the old policy
            checks = checks | check_old_policy(passes, update.seen, constants, bar)
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

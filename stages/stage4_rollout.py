"""Stage 4: sample group_size responses to each prompt of an iteration's batch, and grade them.

The batch is the iteration's slice of the seeded data order. With rollout.dynamic_sampling (DAPO) rounds of prompts are
sampled until it is full of groups that are neither all right nor all wrong, and the next iteration starts where the
last round ended. With rollout.over_sampling more prompts are drawn, and what still runs when enough groups are complete
is cancelled. The SGLang servers (a directory: found or started there; or URLs) get the weights of --hf; every response
has its own seed; vision tokens are forbidden; prompt lengths as the server counts them must equal ours. Token ids and
log-probs are the server's. A server that fails is started again and its requests are sent again. Finished samples are
kept beside the output until it is published: a stage that is run again asks only for what is missing. Grading:
mathruler, in processes with a time limit; then the soft overlong punishment, if any.

Reads:  data/prompts.jsonl and images/ (stage 1), a Hugging Face checkpoint (stage 2 or 6, or downloaded); with dynamic
        sampling the manifest of the iteration before.
Writes: rollouts.jsonl, one records.Rollout per line, ordered by group and sample: the kept groups, numbered in the
order drawn.

With --iterations A-B (run_all.sh --resident) it stays, and samples each iteration as soon as the weights for it have
been exported; with rollout.max_staleness 1 these are one iteration old, so that sampling and training go on at the same
time. Where evaluate_every asks for it, it evaluates weights before it loads the next ones.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace

from megatron_papo.checkpoint.model_files import model_fingerprint, require_one_model
from megatron_papo.checkpoint.proof import require_proof_if_converted
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import StageParser, Task, add_server_option, run, server_of
from megatron_papo.run.follow import Follower
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stage_output import Input, StageOutput, read_manifest, samples_of
from megatron_papo.run.stages import STAGES, Turn
from megatron_papo.run.state import is_done_with
from megatron_papo.sglang.sample_store import remove_store, require_store


def main() -> None:
    parser = StageParser("stage4_rollout", __doc__ or "")
    add_server_option(parser)
    args, tasks = parser.parse()
    if getattr(args, "iterations", None) is None or tasks[0].run is None:
        for task in tasks:
            iterate(task, server_of(args, task))
    else:
        follow(tasks, tasks[0].run, server_of(args, tasks[0]))


def follow(tasks: list[Task], run: RunDirectory, server: str) -> None:
    """Sample all these iterations, each when the weights for it are there, and evaluate those weights where that is
    due."""
    trusted: tuple[str, ...] = ()
    shares_gpus = run.config.server.shares_gpus
    with Follower(run.root, "stage4_rollout", "stage5_train") as follower:
        for task in tasks:
            sampled_by = run.sampled_by(task.iteration)
            if sampled_by > 0 and is_done_with(run, sampled_by):  # and these rollouts are there
                continue
            if sampled_by > 0:
                follower.wait_for(run.trained(sampled_by) if run.in_memory(sampled_by) else run.exported(sampled_by))
                follower.wait_for(run.exported(sampled_by))
            if shares_gpus:  # training takes the GPUs as soon as the rollouts are published
                evaluate_where_due(run, sampled_by, server)
            if iterate(task, server, trusted, time.time()):
                trusted = ("data",)
            if not shares_gpus:  # while these rollouts are trained on
                evaluate_where_due(run, sampled_by, server)


def evaluate_where_due(run: RunDirectory, number: int, server: str) -> None:
    """Do stage 7's work on the weights of iteration `number`, which the servers hold."""
    from megatron_papo.evaluation.evaluate import evaluate

    if number in run.evaluated_iterations() and number > 0:
        for name in run.evaluated_sets(number):
            if read_manifest(run.evaluated(number, name)) is not None:
                continue
            evaluate(Task.in_run(run, STAGES["stage7_evaluate"], Turn(number, name)), server, time.time())


def iterate(task: Task, server: str, trusted: tuple[str, ...] = (), started: float | None = None) -> bool:
    """Sample one iteration; return whether there was anything to do.

    Args:
        task: The turn.
        server: Directory of the servers, or URLs.
        trusted: Inputs whose files this process has verified already.
        started: time.time() when it could begin; None: with this process.
    """
    inputs = task.inputs(model_fingerprint)
    first_position = (task.iteration - 1) * task.config.rollout.drawn_prompts
    if "previous" in inputs:
        first_position = end_of_previous(task, inputs["data"])
    inputs |= {name: replace(inputs[name], verify=False) for name in trusted}
    out = task.stage_output(inputs, started)
    if out.done:
        out.announce_done()
        remove_store(samples_of(task.output))
        return False
    require_proof_if_converted(task.path("hf"))
    require_one_model(task.path("hf"))
    require_store(samples_of(task.output))
    with out:
        roll_out(task, server, first_position, inputs["hf"].fingerprint, out)
    remove_store(samples_of(task.output))
    return True


def end_of_previous(task: Task, data: Input) -> int:
    """Return the position in the data order where the iteration before stopped.

    Raises UserError if its output is of another iteration, seed or data.
    """
    previous = task.path("previous")
    manifest = read_manifest(previous)
    if manifest is None:
        raise UserError(f"--previous {previous}: no output of stage 4: give the output of {task.hint('previous')}")
    recipe = manifest.recipe
    for what, stored, expected in (
        ("iteration", recipe.arguments.get("iteration"), task.iteration - 1),
        ("seed", recipe.config.get("seed"), task.config.seed),
        ("data", recipe.inputs.get("data"), data.fingerprint),
    ):
        if stored != expected:
            hint = task.hint("previous")
            raise UserError(
                f"--previous {previous}: its {what} is {stored}, expected {expected}: give the output of {hint}"
            )
    position = manifest.counts.get("next_position")
    if not isinstance(position, int) or position < 0:
        raise UserError(f"--previous {previous}: does not say where it stopped: remove it and make it again")
    return position


def roll_out(task: Task, server: str, first_position: int, fingerprint: str, out: StageOutput) -> None:
    """The algorithm of the module's docstring. first_position: in the data order; fingerprint: of the weights."""
    from megatron_papo.data.response_tokens import response_tokens
    from megatron_papo.pictures.preprocess import PictureSettings
    from megatron_papo.rollout.counts import batch_counts, in_words
    from megatron_papo.rollout.data_order import prompts_at
    from megatron_papo.rollout.dynamic_sampling import fill_batch, one_round
    from megatron_papo.rollout.groups import (
        Group,
        complete_groups,
        punish_overlong,
        requests_of_round,
        rollout_records,
    )
    from megatron_papo.rollout.pictures import Pictures, probe_of
    from megatron_papo.rollout.sample_and_grade import (
        Sampler,
        load_weights,
        matching_tokenizer,
        open_client,
        sample_and_grade,
    )
    from megatron_papo.run.records import Prompt, read_jsonl, write_jsonl
    from megatron_papo.sglang.requests import Sampling
    from megatron_papo.sglang.sample_store import SampleStore
    from megatron_papo.sglang.server import release_memory

    config, data, hf, iteration = task.config, task.path("data"), task.path("hf"), task.iteration
    staleness = 0 if task.run is None else iteration - 1 - task.run.sampled_by(iteration)
    settings, dynamic, size = config.rollout, config.rollout.dynamic_sampling, config.rollout.group_size
    prompts = read_jsonl(data / "prompts.jsonl", Prompt)
    tokenizer = matching_tokenizer(hf, data)
    tokens = response_tokens(hf, tokenizer.get_vocab(with_added_tokens=True))
    sampling = Sampling(settings.temperature, settings.top_p, -1, settings.max_response_tokens, tokens)
    pictures = Pictures(data, PictureSettings.of(config.data), config.masked_image, kept=2 * settings.concurrency)
    client = open_client(
        server, hf, config.server, config.model.dtype,
        concurrency=settings.concurrency, timeout_seconds=settings.request_timeout_seconds,
    )  # fmt: skip
    version = load_weights(client, hf, fingerprint, probe_of(prompts, pictures))
    store = SampleStore(samples_of(task.output), config.model.dtype)
    sampler = Sampler(client, version, sampling, tokenizer, config.reward, store)
    count = settings.drawn_prompts if dynamic is None else settings.prompts_per_round
    wanted = settings.rollout_batch_size if settings.over_sampling else None

    def rounds() -> Iterator[list[Group]]:
        """Without end; each is sampled when it is asked for. Groups that were not finished are left out."""
        for number in itertools.count():
            places = prompts_at(len(prompts), first_position + number * count, count, config.seed)
            drawn = [(epoch, prompts[index]) for epoch, index in places]
            requests = requests_of_round(drawn, pictures, iteration=iteration, seed=config.seed, group_size=size)
            title = f"rollouts {iteration}" if dynamic is None else f"rollouts {iteration} round {number + 1}"
            graded = sample_and_grade(sampler, requests, title, wanted)
            groups = complete_groups(drawn, requests, graded, size)
            yield [punish_overlong(group, settings.max_response_tokens, config.reward) for group in groups]

    started = time.monotonic()
    with store:
        if dynamic is None:
            batch = one_round(next(rounds()))
        else:
            batch = fill_batch(rounds(), settings.rollout_batch_size, dynamic)
    seconds = time.monotonic() - started
    if config.server.shares_gpus:  # before the output is published, which is what training waits for
        release_memory(client.servers)

    records = rollout_records(batch.kept, sampling, seed=config.seed, iteration=iteration, staleness=staleness)
    write_jsonl(out.partial / "rollouts.jsonl", records)
    drawn_prompts = batch.rounds * count
    counts = batch_counts(batch, drawn_prompts, client.traffic, seconds)
    out.counts |= counts | {"next_position": first_position + drawn_prompts}
    print(f"iteration {iteration}: {in_words(counts)}", flush=True)


if __name__ == "__main__":
    run(main)

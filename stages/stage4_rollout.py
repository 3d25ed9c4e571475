"""Stage 4: sample group_size responses to each prompt of an iteration's batch, and grade them.

The batch is the iteration's slice of the seeded data order. With rollout.dynamic_sampling (DAPO) rounds of prompts are
sampled until it is full of groups that are neither all right nor all wrong, and the next iteration starts where the
last round ended. With rollout.over_sampling more prompts are drawn, and what still runs when enough groups are complete
is cancelled. The SGLang servers (a directory: found or started there; or URLs) get the weights of --hf; every response
has its own seed; vision tokens are forbidden; prompt lengths as the server counts them must equal ours. Token ids and
log-probs are the server's. A server that fails is started again and its requests are sent again. Grading: mathruler, in
processes with a time limit; then the soft overlong punishment, if any.

Reads:  data/prompts.jsonl and images/ (stage 1), a Hugging Face checkpoint (stage 2 or 6, or downloaded); with dynamic
        sampling the manifest of the iteration before.
Writes: rollouts.jsonl, one records.Rollout per line, ordered by group and sample: the kept groups, numbered in the
order drawn.

With --follow runs/NAME it stays for all iterations of the run (run_all.sh --resident), and samples each as soon as the
weights for it have been exported; with rollout.max_staleness 1 these are one iteration old, so that sampling and
training go on at the same time.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_papo.checkpoint.proof import require_proof_if_converted
from megatron_papo.config import Config
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import check_paths_given, run, stage_parser
from megatron_papo.run.run_directory import Follower, RunDirectory
from megatron_papo.run.stage_output import Fingerprint, StageOutput, input_fingerprint, read_manifest, require_input

SECTIONS = ["seed", "rollout", "reward", "masked_image", "data.min_pixels", "data.max_pixels", "model.dtype"]
PATHS = ("data", "hf", "server", "iteration", "output")


def main() -> None:
    paths = ("data", "output of stage 1"), ("hf", "Hugging Face checkpoint: the policy")
    parser = stage_parser(__doc__, *paths, follows=True)
    server_help = (
        "directory of the run's server, or http://... of a running one (default with --follow: server/ of the run)"
    )
    parser.add_argument("--server", metavar="DIR|URL", help=server_help)
    parser.add_argument("--iteration", type=int, metavar="N", help="number of the iteration, from 1")
    previous_help = (
        "this stage's output of iteration N - 1: where the prompts start; read only with dynamic sampling, from"
        " iteration 2 on"
    )
    parser.add_argument("--previous", type=Path, metavar="DIR", help=previous_help)
    arguments = parser.parse_args()
    needed = PATHS if arguments.follow is None else [name for name in PATHS if name != "server"]
    check_paths_given(parser, arguments, needed, others=("previous",))
    config = load_config(arguments.config, arguments.overrides)
    if arguments.follow is not None:
        follow(config, RunDirectory(arguments.follow, config), arguments.server)
    elif arguments.iteration < 1:
        raise UserError(f"--iteration {arguments.iteration}: iterations count from 1")
    else:
        iterate(config, arguments)


def follow(config: Config, run: RunDirectory, server: str | None) -> None:
    """All iterations of a run, each when the weights that sample it are there: one process, the same outputs."""
    trusted = ()
    with Follower(run.root, "stage4_rollout", "stage5_train") as follower:
        for number in range(1, config.iterations + 1):
            sampled_by = run.sampled_by(number)
            if sampled_by > 0:
                follower.wait_for(run.exported(sampled_by))
            made = iterate(
                config,
                argparse.Namespace(
                    iteration=number, data=run.data, hf=run.exported(sampled_by), server=server or str(run.server),
                    previous=run.rollouts(number - 1) if number > 1 else None, output=run.rollouts(number),
                ),
                staleness=number - 1 - sampled_by, trusted=trusted, started=time.time(),
            )  # fmt: skip
            if made:
                trusted = ("data",)


def iterate(
    config: Config, arguments, staleness: int = 0, trusted: tuple[str, ...] = (), started: float | None = None
) -> bool:
    """One iteration. -> whether there was anything to do.

    staleness: of the weights, for the records. trusted: inputs whose files need not be verified again. started: when it
    could begin; None: when the process did.
    """
    inputs = {
        "data": require_input(arguments.data, ("stage1_prepare_data",), "python -m stages.stage1_prepare_data"),
        "hf": input_fingerprint(arguments.hf, "give --hf the output of stage 2 or 6, or a downloaded checkpoint"),
    }
    first_position = (arguments.iteration - 1) * config.rollout.drawn_prompts
    if config.rollout.dynamic_sampling is not None and arguments.iteration > 1:
        inputs["previous"], first_position = end_of_previous(
            arguments.previous, arguments.iteration - 1, config.seed, inputs["data"]
        )
    inputs |= {name: str(inputs[name]) for name in trusted}
    out = StageOutput("stage4_rollout", arguments.output, config, SECTIONS, inputs, {"iteration": arguments.iteration})
    out.started = started or out.started
    if out.done:
        out.announce_done()
        return False
    require_proof_if_converted(arguments.hf)
    with out:
        roll_out(
            config,
            arguments.data,
            arguments.hf,
            arguments.server,
            arguments.iteration,
            first_position,
            inputs["hf"],
            staleness,
            out,
        )
    return True


def end_of_previous(previous: Path | None, iteration: int, seed: int, data: str) -> tuple[Fingerprint, int]:
    """Fingerprint of the output of `iteration`, and the position in the data order where it stopped.

    Raises UserError if it is missing, or of another iteration, seed or data.
    """
    hint = f"python -m stages.stage4_rollout --iteration {iteration}"
    if previous is None:
        raise UserError(
            "--previous: missing: with rollout.dynamic_sampling the prompts start where the iteration before stopped:"
            " give the output of " + hint
        )
    fingerprint = require_input(previous, ("stage4_rollout",), hint)
    manifest = read_manifest(previous)
    recipe = manifest["recipe"]
    for what, found, expected in (
        ("iteration", recipe["arguments"]["iteration"], iteration),
        ("seed", recipe["config"]["seed"], seed),
        ("data", recipe["inputs"]["data"], data),
    ):
        if found != expected:
            raise UserError(
                f"--previous {previous}: its {what} is {found}, expected {expected}: give the output of {hint}"
            )
    if "next_position" not in manifest["counts"]:
        raise UserError(
            f"--previous {previous}: made by an older version, does not say where it stopped: remove it and run {hint}"
        )
    return fingerprint, manifest["counts"]["next_position"]


def roll_out(
    config: Config,
    data: Path,
    hf: Path,
    where: str,
    iteration: int,
    first_position: int,
    fingerprint: str,
    staleness: int,
    out: StageOutput,
) -> None:
    from megatron_papo.data.chat import forbidden_tokens
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
    from megatron_papo.sglang.server import release_memory

    settings, dynamic, size = config.rollout, config.rollout.dynamic_sampling, config.rollout.group_size
    prompts = read_jsonl(data / "prompts.jsonl", Prompt)
    tokenizer = matching_tokenizer(hf, data)
    forbidden = forbidden_tokens(hf, tokenizer.get_vocab(with_added_tokens=True))
    sampling = Sampling(settings.temperature, settings.top_p, -1, settings.max_response_tokens, forbidden)
    limits = config.data.min_pixels, config.data.max_pixels
    pictures = Pictures(data, limits, config.masked_image, kept=2 * settings.concurrency)
    client = open_client(
        where, hf, config.server, config.model.dtype,
        concurrency=settings.concurrency, timeout_seconds=settings.request_timeout_seconds,
    )  # fmt: skip
    version = load_weights(client, hf, fingerprint, probe_of(prompts, pictures))
    sampler = Sampler(client, version, sampling, tokenizer, config.reward)
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
    batch = one_round(next(rounds())) if dynamic is None else fill_batch(rounds(), settings.rollout_batch_size, dynamic)
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

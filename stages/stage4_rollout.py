"""Stage 4: sample group_size responses to each prompt of an iteration's batch, and grade them.

The batch is the iteration's slice of the seeded data order. The SGLang server (a directory: found or started there; or a URL) gets the
weights of --hf; every response has its own seed; vision tokens are forbidden; prompt lengths as the server counts them must equal ours.
Token ids and log-probs are the server's. Grading: mathruler, in processes with a time limit.

Reads:  data/prompts.jsonl and images/ (stage 1), a Hugging Face checkpoint (stage 2 or 6, or downloaded).
Writes: rollouts.jsonl, one records.Rollout per line, ordered by group and sample.
"""

import time
from pathlib import Path

from megatron_papo.command_line import run, stage_parser
from megatron_papo.config import Config, load_config
from megatron_papo.errors import UserError
from megatron_papo.manifest import StageOutput, input_fingerprint, require_input

SECTIONS = ["seed", "rollout", "reward", "masked_image", "data.min_pixels", "data.max_pixels", "model.dtype"]


def main() -> None:
    parser = stage_parser(__doc__, ("data", "output of stage 1"), ("hf", "Hugging Face checkpoint: the policy"))
    parser.add_argument("--server", required=True, metavar="DIR|URL", help="directory of the run's server, or http://... of a running one")
    parser.add_argument("--iteration", type=int, required=True, metavar="N", help="number of the iteration, from 1")
    arguments = parser.parse_args()
    if arguments.iteration < 1:
        raise UserError(f"--iteration {arguments.iteration}: iterations count from 1")
    config = load_config(arguments.config, arguments.overrides)
    inputs = {
        "data": require_input(arguments.data, ("stage1_prepare_data",), "python -m stages.stage1_prepare_data"),
        "hf": input_fingerprint(arguments.hf, "give --hf the output of stage 2 or 6, or a downloaded checkpoint"),
    }
    out = StageOutput("stage4_rollout", arguments.output, config, SECTIONS, inputs, {"iteration": arguments.iteration})
    if out.done:
        out.announce_done()
        return
    with out:
        roll_out(config, arguments.data, arguments.hf, arguments.server, arguments.iteration, inputs["hf"], out)


def roll_out(config: Config, data: Path, hf: Path, where: str, iteration: int, fingerprint: str, out: StageOutput) -> None:
    from megatron_papo.records import Prompt, read_jsonl, write_jsonl
    from megatron_papo.rollout.data_order import prompts_of_iteration
    from megatron_papo.rollout.sample_and_grade import Job, client_with_weights, matching_tokenizer, picture_loader
    from megatron_papo.rollout.sample_and_grade import sample_and_grade, summary
    from megatron_papo.rollout.sglang_client import Sampling, forbidden_tokens
    from megatron_papo.seeds import derive_seed

    settings = config.rollout
    prompts = read_jsonl(data / "prompts.jsonl", Prompt)
    tokenizer = matching_tokenizer(hf, data)
    forbidden = forbidden_tokens(hf, tokenizer.get_vocab(with_added_tokens=True))
    sampling = Sampling(settings.temperature, settings.top_p, -1, settings.max_response_tokens, forbidden)
    drawn = prompts_of_iteration(len(prompts), settings.rollout_batch_size, iteration, config.seed)
    jobs = [
        Job(prompts[index], sample, derive_seed(config.seed, "sampling", iteration, epoch, prompts[index].id, sample))
        for epoch, index in drawn
        for sample in range(settings.group_size)
    ]
    pictures = picture_loader(data, config, config.data.max_pixels, kept=2 * settings.concurrency)
    client, version = client_with_weights(where, hf, fingerprint, config)
    started = time.monotonic()
    graded = sample_and_grade(client, version, jobs, pictures, sampling, tokenizer, config, f"rollouts {iteration}")
    seconds = time.monotonic() - started

    records = (_record(config, iteration, number, drawn, jobs[number], graded[number]) for number in range(len(jobs)))
    write_jsonl(out.partial / "rollouts.jsonl", records)
    totals = summary(graded)
    tokens = sum(len(one.sample.token_ids) for one in graded)
    out.counts |= {"prompts": len(drawn), **totals, "response_tokens": tokens, "tokens_per_second": round(tokens / seconds, 1)}
    print(
        f"iteration {iteration}: {len(jobs)} responses to {len(drawn)} prompts, accuracy {totals['accuracy']:.3f},"
        f" format {totals['format']:.3f}, cut off {totals['cut_off_share']:.3f}, {tokens / seconds:.0f} tokens/s",
        flush=True,
    )


def _record(config: Config, iteration: int, number: int, drawn: list[tuple[int, int]], job, result):
    """The Rollout of the number-th response; drawn: (epoch, index) of each group."""
    from megatron_papo.records import Rollout
    from megatron_papo.seeds import derive_seed

    group = number // config.rollout.group_size
    epoch = drawn[group][0]
    return Rollout(
        prompt_id=job.prompt.id,
        iteration=iteration,
        epoch=epoch,
        group=group,
        sample=job.sample,
        answer=job.prompt.answer,
        prompt_token_ids=job.prompt.token_ids,
        prompt_num_tokens=job.prompt.num_tokens,
        images=job.prompt.images,
        response_token_ids=result.sample.token_ids,
        rollout_log_probs=result.sample.log_probs,
        text=result.text,
        finish_reason=result.sample.finish_reason,
        rewards=result.rewards,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        sampling_seed=job.seed,
        masked_image_seed=derive_seed(config.seed, "masked_image", job.prompt.id, epoch),
        weight_version=result.sample.weight_version,
    )


if __name__ == "__main__":
    run(main)

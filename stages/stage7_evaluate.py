"""Stage 7: avg@k of a checkpoint on benchmark prompts.

Sample evaluation.samples_per_prompt responses to each prompt with the evaluation section's sampling, grade them as in
training, and average over samples, then over prompts. With evaluation.masked_images every prompt is answered a second
time with its pictures masked: what is left of the accuracy was not seen in the picture.

Reads:  data/evaluation.jsonl (or --prompts) and images/ (stage 1), a Hugging Face checkpoint.
Writes: predictions.jsonl, one records.Prediction per line; metrics.json.
"""

import json
from pathlib import Path

from megatron_papo.checkpoint.proof import require_proof_if_converted
from megatron_papo.config import Config
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run, stage_parser
from megatron_papo.run.stage_output import StageOutput, input_fingerprint, require_input

SECTIONS = ["seed", "evaluation", "reward", "masked_image", "data.min_pixels", "data.max_pixels", "model.dtype"]


def main() -> None:
    parser = stage_parser(__doc__, ("data", "output of stage 1"), ("hf", "Hugging Face checkpoint to evaluate"))
    parser.add_argument(
        "--server",
        required=True,
        metavar="DIR|URL",
        help="directory of the run's server, or http://... of a running one",
    )
    parser.add_argument(
        "--prompts", default="evaluation.jsonl", metavar="FILE", help="prompts inside --data (default evaluation.jsonl)"
    )
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    inputs = {
        "data": require_input(arguments.data, ("stage1_prepare_data",), "python -m stages.stage1_prepare_data"),
        "hf": input_fingerprint(arguments.hf, "give --hf the output of stage 2 or 6, or a downloaded checkpoint"),
    }
    if not (arguments.data / arguments.prompts).resolve().is_relative_to(arguments.data.resolve()):
        raise UserError(
            f"--prompts {arguments.prompts}: outside {arguments.data}: name a file that stage 1 wrote there"
        )
    out = StageOutput("stage7_evaluate", arguments.output, config, SECTIONS, inputs, {"prompts": arguments.prompts})
    if out.done:
        out.announce_done()
        return
    require_proof_if_converted(arguments.hf)
    with out:
        evaluate(config, arguments.data, arguments.prompts, arguments.hf, arguments.server, inputs["hf"], out)


def evaluate(config: Config, data: Path, name: str, hf: Path, where: str, fingerprint: str, out: StageOutput) -> None:
    from megatron_papo.data.chat import forbidden_tokens
    from megatron_papo.evaluation.predictions import evaluation_metrics, evaluation_requests, prediction, with_length
    from megatron_papo.rollout.pictures import Pictures, probe_of
    from megatron_papo.rollout.sample_and_grade import (
        Sampler,
        load_weights,
        matching_tokenizer,
        open_client,
        sample_and_grade_all,
    )
    from megatron_papo.run.records import Prompt, read_jsonl, write_jsonl
    from megatron_papo.sglang.requests import Sampling
    from megatron_papo.sglang.server import release_memory

    settings = config.evaluation
    limits = config.data.min_pixels, settings.max_pixels or config.data.max_pixels
    prompts = read_jsonl(data / name, Prompt)
    if limits[1] != config.data.max_pixels:
        prompts = [with_length(prompt, data, limits) for prompt in prompts]
    tokenizer = matching_tokenizer(hf, data)
    forbidden = forbidden_tokens(hf, tokenizer.get_vocab(with_added_tokens=True))
    sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.max_response_tokens, forbidden)
    pictures = Pictures(data, limits, config.masked_image, kept=2 * config.rollout.concurrency)
    requests = [
        request
        for masked in ([False, True] if settings.masked_images else [False])
        for request in evaluation_requests(
            prompts, pictures, seed=config.seed, samples_per_prompt=settings.samples_per_prompt, masked=masked
        )
    ]
    client = open_client(
        where, hf, config.server, config.model.dtype,
        concurrency=config.rollout.concurrency, timeout_seconds=config.rollout.request_timeout_seconds,
    )  # fmt: skip
    version = load_weights(client, hf, fingerprint, probe_of(prompts, pictures))
    sampler = Sampler(client, version, sampling, tokenizer, config.reward)
    responses = sample_and_grade_all(sampler, requests, "evaluation")
    if config.server.shares_gpus:
        release_memory(client.servers)
    write_jsonl(out.partial / "predictions.jsonl", map(prediction, requests, responses))
    metrics = evaluation_metrics(requests, responses, len(prompts), settings.samples_per_prompt)
    (out.partial / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    out.counts |= metrics
    on_masked = f", on masked images {metrics['accuracy_masked']:.4f}" if settings.masked_images else ""
    print(
        f"{hf}: avg@{settings.samples_per_prompt} on {len(prompts)} prompts: {metrics['accuracy']:.4f}{on_masked}",
        flush=True,
    )


if __name__ == "__main__":
    run(main)

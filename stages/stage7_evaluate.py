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
    from megatron_papo.rollout.sample_and_grade import (
        Job,
        client_with_weights,
        matching_tokenizer,
        picture_loader,
        probe_of,
        sample_and_grade,
    )
    from megatron_papo.run.records import Prompt, read_jsonl, write_jsonl
    from megatron_papo.seeds import derive_seed
    from megatron_papo.sglang.requests import Sampling
    from megatron_papo.sglang.server import release_memory

    settings = config.evaluation
    max_pixels = settings.max_pixels or config.data.max_pixels
    prompts = read_jsonl(data / name, Prompt)
    if max_pixels != config.data.max_pixels:
        prompts = [_with_length(prompt, data, config.data.min_pixels, max_pixels) for prompt in prompts]
    tokenizer = matching_tokenizer(hf, data)
    forbidden = forbidden_tokens(hf, tokenizer.get_vocab(with_added_tokens=True))
    sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.max_response_tokens, forbidden)

    def jobs_of(masked: bool) -> list[Job]:
        return [
            Job(
                prompt,
                sample,
                derive_seed(config.seed, "evaluation", prompt.id, sample),
                derive_seed(config.seed, "evaluation_mask", prompt.id) if masked else None,
                group=number + masked * len(prompts),
            )
            for number, prompt in enumerate(prompts)
            for sample in range(settings.samples_per_prompt)
        ]

    jobs = jobs_of(masked=False) + (jobs_of(masked=True) if settings.masked_images else [])
    pictures = picture_loader(data, config, max_pixels, kept=2 * config.rollout.concurrency)
    client, version = client_with_weights(where, hf, fingerprint, config, probe_of(prompts, pictures))
    graded = sample_and_grade(client, version, jobs, pictures, sampling, tokenizer, config, "evaluation")
    if config.server.shares_gpus:
        release_memory(client.servers)
    write_jsonl(out.partial / "predictions.jsonl", (_prediction(job, result) for job, result in zip(jobs, graded)))
    metrics = _metrics(jobs, graded, len(prompts), settings.samples_per_prompt)
    (out.partial / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    out.counts |= metrics
    masked = f", on masked images {metrics['accuracy_masked']:.4f}" if settings.masked_images else ""
    print(
        f"{hf}: avg@{settings.samples_per_prompt} on {len(prompts)} prompts: {metrics['accuracy']:.4f}{masked}",
        flush=True,
    )


def _with_length(prompt, data: Path, min_pixels: int, max_pixels: int):
    """The prompt with num_tokens for other pixel limits than those it was made with."""
    from megatron_papo.pictures.preprocess import grid_of, load_images, num_image_tokens

    pictures = load_images(data, prompt.images, min_pixels, max_pixels)
    image_tokens = sum(num_image_tokens(grid_of(picture)) for picture in pictures)
    return prompt.model_copy(update={"num_tokens": len(prompt.token_ids) - len(pictures) + image_tokens})


def _prediction(job, result):
    from megatron_papo.run.records import Prediction

    return Prediction(
        prompt_id=job.prompt.id,
        sample=job.sample,
        image="original" if job.masked_image_seed is None else "masked",
        answer=job.prompt.answer,
        text=result.text,
        response_token_ids=result.sample.token_ids,
        finish_reason=result.sample.finish_reason,
        rewards=result.rewards,
        sampling_seed=job.seed,
        masked_image_seed=job.masked_image_seed,
    )


def _metrics(jobs, graded, num_prompts: int, samples_per_prompt: int) -> dict[str, float | int]:
    """Of the original images; the same with the suffix _masked of the masked ones, if there are any."""
    from megatron_papo.evaluation.accuracy import average_at_k
    from megatron_papo.rollout.sample_and_grade import summary

    metrics = {"prompts": num_prompts, "samples_per_prompt": samples_per_prompt}
    for suffix, masked in (("", False), ("_masked", True)):
        chosen = [(job, one) for job, one in zip(jobs, graded) if (job.masked_image_seed is not None) == masked]
        if not chosen:
            continue
        part = summary([one for _, one in chosen])
        part["accuracy"] = average_at_k((job.prompt.id, one.rewards.accuracy) for job, one in chosen)
        metrics |= {key + suffix: value for key, value in part.items()}
    return metrics


if __name__ == "__main__":
    run(main)

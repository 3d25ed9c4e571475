"""What stage 7 asks and records: requests for benchmark prompts, predictions, metrics."""

from collections.abc import Sequence
from pathlib import Path

from megatron_papo.evaluation.accuracy import average_at_k
from megatron_papo.pictures.preprocess import PictureSettings, grid_of_file, num_image_tokens
from megatron_papo.rollout.counts import Counts, summary
from megatron_papo.rollout.groups import Graded
from megatron_papo.rollout.pictures import Pictures
from megatron_papo.run.records import Prediction, Prompt
from megatron_papo.seeds import derive_seed
from megatron_papo.sglang.requests import Request


def with_length(prompt: Prompt, data: Path, settings: PictureSettings) -> Prompt:
    """Return the prompt with num_tokens for other picture settings than those it was made with.

    Args:
        prompt: as stage 1 made it.
        data: the directory that its pictures' paths start from.
        settings: how pictures are opened and resized.
    """
    image_tokens = sum(num_image_tokens(grid_of_file(data, name, settings)) for name in prompt.images)
    return prompt.model_copy(update={"num_tokens": len(prompt.token_ids) - len(prompt.images) + image_tokens})


def evaluation_requests(
    prompts: Sequence[Prompt], pictures: Pictures, *, seed: int, samples_per_prompt: int, masked: bool
) -> list[Request]:
    """Return samples_per_prompt requests for each prompt, prompt by prompt.

    Args:
        prompts: of the benchmark.
        pictures: gives a prompt's pictures.
        seed: of the run. A response's seed follows from it and from prompt and sample, masked or not.
        samples_per_prompt: responses per prompt.
        masked: whether the pictures are masked.
    """
    requests = []
    for number, prompt in enumerate(prompts):
        mask = derive_seed(seed, "evaluation_mask", prompt.id) if masked else None
        images, group = pictures.of(prompt, mask), (number, masked)
        for sample in range(samples_per_prompt):
            sampling_seed = derive_seed(seed, "evaluation", prompt.id, sample)
            requests.append(Request(prompt, sampling_seed, images, group, sample, mask))
    return requests


def prediction(request: Request, response: Graded) -> Prediction:
    """Return the record of one response."""
    return Prediction(
        prompt_id=request.prompt.id,
        sample=request.sample,
        image="original" if request.masked_image_seed is None else "masked",
        answer=request.prompt.answer,
        text=response.text,
        response_token_ids=response.sample.token_ids,
        finish_reason=response.sample.finish_reason,
        rewards=response.rewards,
        sampling_seed=request.seed,
        masked_image_seed=request.masked_image_seed,
    )


def evaluation_metrics(
    requests: Sequence[Request], responses: Sequence[Graded], num_prompts: int, samples_per_prompt: int
) -> Counts:
    """Return the metrics of the original pictures; those of masked ones, if there are any, with the suffix _masked."""
    metrics: Counts = {"prompts": num_prompts, "samples_per_prompt": samples_per_prompt}
    for suffix, masked in (("", False), ("_masked", True)):
        chosen = [
            (request, response)
            for request, response in zip(requests, responses, strict=True)
            if (request.masked_image_seed is not None) == masked
        ]
        if not chosen:
            continue
        part = summary([response for _, response in chosen])
        part["accuracy"] = average_at_k((request.prompt.id, response.rewards.accuracy) for request, response in chosen)
        metrics |= {key + suffix: value for key, value in part.items()}
    return metrics

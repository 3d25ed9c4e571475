"""What stage 7 asks and records: requests for benchmark prompts, predictions, metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_papo.config import EvaluationConfig
from megatron_papo.evaluation.accuracy import average_at_k
from megatron_papo.pictures.preprocess import PictureSettings, grid_of_file, num_image_tokens
from megatron_papo.rollout.counts import Counts, summary
from megatron_papo.rollout.groups import Graded
from megatron_papo.rollout.pictures import Pictures
from megatron_papo.run.records import ImageShown, Prediction, Prompt
from megatron_papo.seeds import derive_seed
from megatron_papo.sglang.requests import Request

SUFFIXES: dict[ImageShown, str] = {"original": "", "masked": "_masked", "none": "_none"}
"""What was shown of a prompt's pictures -> what the names of its metrics end with."""


def images_shown(settings: EvaluationConfig) -> list[ImageShown]:
    """Return what every prompt is answered with."""
    wanted: dict[ImageShown, bool] = {
        "original": True,
        "masked": settings.masked_images,
        "none": settings.without_images,
    }
    return [image for image, is_wanted in wanted.items() if is_wanted]


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
    prompts: Sequence[Prompt], pictures: Pictures, *, seed: int, samples_per_prompt: int, image: ImageShown
) -> list[Request]:
    """Return samples_per_prompt requests for each prompt, prompt by prompt.

    Args:
        prompts: of the benchmark.
        pictures: gives a prompt's pictures.
        seed: of the run. A response's seed follows from it and from prompt and sample, whatever is shown.
        samples_per_prompt: responses per prompt.
        image: what is shown of the prompts' pictures.
    """
    requests = []
    for number, prompt in enumerate(prompts):
        mask = derive_seed(seed, "evaluation_mask", prompt.id) if image == "masked" else None
        asked = prompt.without_images() if image == "none" else prompt
        images, group = pictures.of(asked, mask), (number, image)
        for sample in range(samples_per_prompt):
            sampling_seed = derive_seed(seed, "evaluation", prompt.id, sample)
            requests.append(Request(asked, sampling_seed, images, group, sample, mask))
    return requests


def prediction(request: Request, response: Graded, image: ImageShown) -> Prediction:
    """Return the record of one response. image: what it was given of the prompt's pictures."""
    return Prediction(
        prompt_id=request.prompt.id,
        problem_id=request.prompt.problem_id,
        sample=request.sample,
        image=image,
        answer=request.prompt.answer,
        options=request.prompt.options,
        text=response.text,
        response_token_ids=response.sample.token_ids,
        finish_reason=response.sample.finish_reason,
        rewards=response.rewards,
        sampling_seed=request.seed,
        masked_image_seed=request.masked_image_seed,
    )


def evaluation_metrics(answers: Mapping[ImageShown, Sequence[tuple[Request, Graded]]]) -> Counts:
    """Return the metrics of the original pictures, and with a suffix those of masked ones and of none.

    answers: What was shown -> requests and responses, samples_per_prompt to each prompt.
    """
    originals = answers["original"]
    prompts = len({request.prompt.id for request, _ in originals})
    metrics: Counts = {"prompts": prompts, "samples_per_prompt": len(originals) // prompts}
    for image, pairs in answers.items():
        part = summary([response for _, response in pairs])
        part["accuracy"] = average_at_k((request.prompt.id, response.rewards.accuracy) for request, response in pairs)
        metrics |= {key + SUFFIXES[image]: value for key, value in part.items()}
    return metrics

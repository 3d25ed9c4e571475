"""What decides the responses of an evaluation and their grades, in one object: what a report states, and what two
evaluations must agree in before they are compared."""

import hashlib
import json
from collections.abc import Sequence

from megatron_papo.config import BenchmarkConfig
from megatron_papo.data.chat import RenderSettings
from megatron_papo.evaluation.chosen_on import is_chosen_on
from megatron_papo.pictures.preprocess import PictureSettings
from megatron_papo.run.command_line import Task
from megatron_papo.run.records import Prompt, Protocol

SAMPLING = ("temperature", "top_p", "top_k", "max_response_tokens")


def protocol_of(task: Task, name: str, of_set: BenchmarkConfig, checkpoint: str, prompts: Sequence[Prompt]) -> Protocol:
    """Return protocol.json of a turn of stage 7.

    Args:
        task: The turn.
        name: Of the evaluation set.
        of_set: The set.
        checkpoint: Fingerprint of the checkpoint.
        prompts: Of the set.
    """
    config, settings = task.config, task.config.evaluation
    protocol = {
        "dtype": config.model.dtype,
        **{key: getattr(settings, key) for key in SAMPLING},
        **vars(RenderSettings.of_set(config.data, of_set)),
        **vars(PictureSettings.of_evaluation(config.data, settings, of_set)),
        "grading": of_set.grading,
        "time_limit_seconds": config.reward.time_limit_seconds,
    }
    if settings.masked_images:
        protocol["masked_image"] = dict(settings.masking(config.masked_image))
    return Protocol(
        set=name,
        groups=of_set.groups,
        group_sets={
            group: [other for other, entry in config.evaluation_sets.items() if group in entry.groups]
            for group in of_set.groups
        },
        problems_of=of_set.problems_of or name,
        checkpoint=checkpoint,
        hf=str(task.path("hf")),
        data=content_of(prompts),
        protocol=protocol,
        chosen_on=is_chosen_on(task, name, prompts),
    )


def content_of(prompts: Sequence[Prompt]) -> str:
    """Return a hash, in hex, of what a set asks: the same for every tokenizer."""
    total = hashlib.sha256()
    for prompt in prompts:
        asked = [prompt.id, prompt.problem_id, prompt.problem, prompt.answer, prompt.options, prompt.images]
        total.update(json.dumps(asked).encode() + b"\n")
    return total.hexdigest()

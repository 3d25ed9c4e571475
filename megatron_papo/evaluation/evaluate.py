"""avg@k of a checkpoint on an evaluation set: what stage 7 does, and a resident stage 4 between two samplings."""

import copy
import json
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from megatron_papo.checkpoint.model_files import model_fingerprint, require_one_model
from megatron_papo.checkpoint.proof import require_proof_if_converted
from megatron_papo.config import BenchmarkConfig
from megatron_papo.data.response_tokens import response_tokens
from megatron_papo.errors import UserError
from megatron_papo.evaluation.predictions import (
    SUFFIXES,
    evaluation_metrics,
    evaluation_requests,
    images_shown,
    prediction,
    with_length,
)
from megatron_papo.evaluation.protocol import protocol_of
from megatron_papo.pictures.preprocess import PictureSettings
from megatron_papo.rollout.pictures import Pictures, probe_of
from megatron_papo.rollout.rewards import reward_of
from megatron_papo.rollout.sample_and_grade import (
    Sampler,
    load_weights,
    matching_tokenizer,
    open_client,
    sample_and_grade_all,
)
from megatron_papo.run.command_line import Task
from megatron_papo.run.records import Prompt, read_jsonl, write_jsonl
from megatron_papo.run.stage_output import StageOutput, read_manifest, samples_of
from megatron_papo.sglang.requests import Sampling
from megatron_papo.sglang.sample_store import SampleStore, require_store
from megatron_papo.sglang.server import release_memory


def evaluate_all(tasks: Sequence[Task], server: Callable[[Task], str]) -> None:
    """Make the outputs of these turns of stage 7, one after the other, and say how long the rest will take.

    Args:
        tasks: Turns of one run, or one that is in none.
        server: Gives the directory of the servers, or URLs, that a turn is to use.
    """
    wanted = [responses_wanted(task) for task in tasks]
    started, seconds, answered = None, 0.0, 0
    for number, task in enumerate(tasks):
        taken = evaluate(task, server(task), started)
        seconds, answered = seconds + taken, answered + (wanted[number] if taken else 0)
        started = time.time()  # of the next output: this one's time is its own
        left = sum(wanted[number + 1 :])
        if not left:
            continue
        others = seconds / answered * left if answered else 0.0
        words = f"{others:.0f} s" if others < 90 else f"{others / 60:.0f} minutes"
        about = f", about {words} for the others" if answered else ""
        print(
            f"evaluation: {number + 1} of {len(tasks)} sets, {sum(wanted) - left:,} of {sum(wanted):,}"
            f" responses{about}",
            flush=True,
        )


def responses_wanted(task: Task) -> int:
    """Return how many responses a turn asks for; 0 where its prompts are not there yet."""
    manifest = read_manifest(task.path("data"))
    prompts = 0 if manifest is None else manifest.counts.get(set_of(task)[0], 0)
    settings = task.config.evaluation
    return int(prompts) * settings.samples_per_prompt * len(images_shown(settings))


def evaluate(task: Task, server: str, started: float | None = None) -> float:
    """Make the output of one turn of stage 7, where it is not there yet; return the seconds that the responses took, 0
    where there was nothing to do.

    The store of its samples stays beside it: of an evaluation that is made again with more samples per prompt, or after
    other changes that leave these samples as they are, only the others are asked for.

    Args:
        task: A turn of stage 7.
        server: Directory of the servers, or URLs.
        started: time.time() when the work could begin; None: with this process.
    """
    inputs = task.inputs(model_fingerprint)
    out = task.stage_output(inputs, started, replaces=has_its_responses)
    if out.done:
        out.announce_done()
        return 0.0
    require_proof_if_converted(task.path("hf"))
    require_one_model(task.path("hf"))
    require_store(samples_of(task.output))
    if task.output.exists():
        print(f"{task.output}: made again: the responses that are there are kept, others asked for", flush=True)
    with out:
        return answer(task, server, inputs["hf"].fingerprint, out)


def has_its_responses(made: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Say of two recipes whether the second asks for all responses of the first, and at most for more: the store has
    them, and only grades, groups and averages are made anew."""
    made, wanted = copy.deepcopy(made), copy.deepcopy(wanted)
    more = [recipe["config"].get("evaluation", {}) for recipe in (made, wanted)]
    if any(before > after for before, after in zip(*(_extent(section) for section in more), strict=True)):
        return False
    for recipe in (made, wanted):
        recipe["config"].pop("reward", None)
        evaluation = recipe["config"].get("evaluation", {})
        for key in ("samples_per_prompt", "masked_images", "without_images"):
            evaluation.pop(key, None)
        for entry in evaluation.get("benchmarks", {}).values():
            for key in ("grading", "groups"):
                entry.pop(key, None)
    return made == wanted


def _extent(evaluation: dict[str, Any]) -> list[int]:
    """Return how much an evaluation asks for."""
    return [int(evaluation.get(key, 0)) for key in ("samples_per_prompt", "masked_images", "without_images")]


def answer(task: Task, server: str, fingerprint: str, out: StageOutput) -> float:
    """Sample, grade and average; write predictions.jsonl, metrics.json and protocol.json; return the seconds of
    sampling.

    Args:
        task: A turn of stage 7.
        server: Directory of the servers, or URLs.
        fingerprint: Of the checkpoint, by which the servers' weights are known.
        out: The output, open.
    """
    config, data, hf, settings = task.config, task.path("data"), task.path("hf"), task.config.evaluation
    name, of_set = set_of(task)
    picture_settings = PictureSettings.of_evaluation(config.data, settings, of_set)
    prompts = read_jsonl(data / "prompts.jsonl", Prompt)
    if task.run is None:  # in a run stage 1 was given the same settings
        prompts = [with_length(prompt, data, picture_settings) for prompt in prompts]
    tokenizer = matching_tokenizer(hf, data)
    tokens = response_tokens(hf, tokenizer.get_vocab(with_added_tokens=True))
    sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.max_response_tokens, tokens)
    masking = settings.masking(config.masked_image)
    pictures = Pictures(data, picture_settings, masking, kept=2 * config.rollout.concurrency)
    requests = {
        image: evaluation_requests(
            prompts, pictures, seed=config.seed, samples_per_prompt=settings.samples_per_prompt, image=image
        )
        for image in images_shown(settings)
    }
    client = open_client(
        server,
        hf,
        config.server,
        config.model.dtype,
        concurrency=config.rollout.concurrency,
        timeout_seconds=config.rollout.request_timeout_seconds,
    )
    version = load_weights(client, hf, fingerprint, probe_of(prompts, pictures))
    begun = time.monotonic()
    with SampleStore(samples_of(task.output), config.model.dtype) as store:
        reward = reward_of(config.reward, of_set.grading)
        sampler = Sampler(client, version, sampling, tokenizer, reward, store, of_set.grading)
        graded = iter(sample_and_grade_all(sampler, [*chain(*requests.values())], name))
        answers = {image: [(request, next(graded)) for request in asked] for image, asked in requests.items()}
    seconds = time.monotonic() - begun
    if config.server.shares_gpus:
        release_memory(client.servers)
    write_jsonl(
        out.partial / "predictions.jsonl",
        (prediction(*pair, image) for image, pairs in answers.items() for pair in pairs),
    )
    metrics = evaluation_metrics(answers)
    protocol = protocol_of(task, name, of_set, fingerprint, prompts)
    (out.partial / "protocol.json").write_text(protocol.model_dump_json(indent=1) + "\n")
    (out.partial / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    out.counts |= metrics
    said = {"original": "", "masked": ", on masked images ", "none": ", without images "}
    accuracies = "".join(f"{said[image]}{metrics['accuracy' + SUFFIXES[image]]:.4f}" for image in answers)
    words = f"{name}: avg@{settings.samples_per_prompt} on {len(prompts)} prompts: {accuracies}"
    print(f"{hf}: {words} in {seconds:.0f} s", flush=True)
    return seconds


def set_of(task: Task) -> tuple[str, BenchmarkConfig]:
    """Return the evaluation set of a turn; of one that names none, the only one that there is. Raises UserError."""
    sets, name = task.config.evaluation_sets, task.turn.evaluation_set
    if name is None and len(sets) == 1:
        name = next(iter(sets))
    if name is None or name not in sets:
        raise UserError(f"--evaluation-set {name or 'missing'}: say which of {', '.join(sets)}")
    return name, sets[name]

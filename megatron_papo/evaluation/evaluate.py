"""avg@k of a checkpoint on an evaluation set: what stage 7 does, and a resident stage 4 between two samplings."""

import json
import time

from megatron_papo.checkpoint.model_files import model_fingerprint, require_one_model
from megatron_papo.checkpoint.proof import require_proof_if_converted
from megatron_papo.data.response_tokens import response_tokens
from megatron_papo.evaluation.predictions import evaluation_metrics, evaluation_requests, prediction, with_length
from megatron_papo.pictures.preprocess import PictureSettings
from megatron_papo.rollout.pictures import Pictures, probe_of
from megatron_papo.rollout.sample_and_grade import (
    Sampler,
    load_weights,
    matching_tokenizer,
    open_client,
    sample_and_grade_all,
)
from megatron_papo.run.command_line import Task
from megatron_papo.run.records import Prompt, read_jsonl, write_jsonl
from megatron_papo.run.stage_output import StageOutput, samples_of
from megatron_papo.sglang.requests import Sampling
from megatron_papo.sglang.sample_store import SampleStore, require_store
from megatron_papo.sglang.server import release_memory


def evaluate(task: Task, server: str, started: float | None = None) -> None:
    """Make the output of one turn of stage 7, where it is not there yet.

    The store of its samples stays beside it: of an evaluation that is made again with more samples per prompt, or after
    other changes that leave these samples as they are, only the others are asked for.

    Args:
        task: A turn of stage 7.
        server: Directory of the servers, or URLs.
        started: time.time() when the work could begin; None: with this process.
    """
    inputs = task.inputs(model_fingerprint)
    out = task.stage_output(inputs, started)
    if out.done:
        out.announce_done()
        return
    require_proof_if_converted(task.path("hf"))
    require_one_model(task.path("hf"))
    require_store(samples_of(task.output))
    with out:
        answer(task, server, inputs["hf"].fingerprint, out)


def answer(task: Task, server: str, fingerprint: str, out: StageOutput) -> None:
    """Sample, grade and average; write predictions.jsonl and metrics.json.

    Args:
        task: A turn of stage 7.
        server: Directory of the servers, or URLs.
        fingerprint: Of the checkpoint, by which the servers' weights are known.
        out: The output, open.
    """
    config, data, hf, settings = task.config, task.path("data"), task.path("hf"), task.config.evaluation
    picture_settings = PictureSettings.of_evaluation(config.data, settings)
    prompts = read_jsonl(data / "prompts.jsonl", Prompt)
    if picture_settings != PictureSettings.of(config.data):
        prompts = [with_length(prompt, data, picture_settings) for prompt in prompts]
    tokenizer = matching_tokenizer(hf, data)
    tokens = response_tokens(hf, tokenizer.get_vocab(with_added_tokens=True))
    sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.max_response_tokens, tokens)
    pictures = Pictures(data, picture_settings, config.masked_image, kept=2 * config.rollout.concurrency)
    requests = [
        request
        for masked in ([False, True] if settings.masked_images else [False])
        for request in evaluation_requests(
            prompts, pictures, seed=config.seed, samples_per_prompt=settings.samples_per_prompt, masked=masked
        )
    ]
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
        sampler = Sampler(client, version, sampling, tokenizer, config.reward, store)
        responses = sample_and_grade_all(sampler, requests, "evaluation")
    seconds = time.monotonic() - begun
    if config.server.shares_gpus:
        release_memory(client.servers)
    write_jsonl(out.partial / "predictions.jsonl", map(prediction, requests, responses))
    metrics = evaluation_metrics(requests, responses, len(prompts), settings.samples_per_prompt)
    (out.partial / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    out.counts |= metrics
    on_masked = f", on masked images {metrics['accuracy_masked']:.4f}" if settings.masked_images else ""
    words = f"avg@{settings.samples_per_prompt} on {len(prompts)} prompts: {metrics['accuracy']:.4f}{on_masked}"
    print(f"{hf}: {words} in {seconds:.0f} s", flush=True)

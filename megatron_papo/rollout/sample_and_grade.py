"""Responses to prompts, graded: what stage 4 (rollouts) and stage 7 (evaluation) have in common."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm

from megatron_papo.config import Config
from megatron_papo.data.chat import tokenizer_hash
from megatron_papo.errors import UserError
from megatron_papo.images import load_images, to_data_uri
from megatron_papo.records import Prompt, Rewards
from megatron_papo.rollout.rewards import Grader
from megatron_papo.rollout.sglang_client import Request, Sample, Sampling, SglangClient
from megatron_papo.rollout.sglang_server import open_server

WEIGHT_VERSION_CHARACTERS = 16


@dataclass(frozen=True)
class Job:
    """One response to sample and grade."""

    prompt: Prompt
    sample: int
    seed: int
    masked_image_seed: int | None = None
    """Show the pictures masked, drawn with this seed; None: as they are."""


@dataclass(frozen=True)
class Graded:
    sample: Sample
    text: str
    rewards: Rewards


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, as drawn in one epoch."""

    epoch: int
    jobs: Sequence[Job]
    graded: Sequence[Graded]

    @property
    def accuracy(self) -> float:
        return sum(one.rewards.accuracy for one in self.graded) / len(self.graded)


def matching_tokenizer(hf_dir: Path, data_dir: Path) -> Tokenizer:
    """The checkpoint's tokenizer. Raises UserError if the prompts were made with another one."""
    expected = (data_dir / "tokenizer.sha256").read_text().strip()
    if tokenizer_hash(hf_dir) != expected:
        raise UserError(f"{hf_dir}/tokenizer.json: not the tokenizer that {data_dir} was made with: run stage 1 again with this model.path")
    return Tokenizer.from_file(str(hf_dir / "tokenizer.json"))


def client_with_weights(where: str, hf_dir: Path, fingerprint: str, config: Config) -> tuple[SglangClient, str]:
    """A client of the server that --server names, which then holds the weights of hf_dir, and their version."""
    server = open_server(where, hf_dir, config.server, config.model.dtype)
    client = SglangClient(server, config.rollout.concurrency, config.rollout.request_timeout_seconds)
    version = fingerprint[:WEIGHT_VERSION_CHARACTERS]
    started = time.monotonic()
    if client.update_weights(hf_dir, version):
        print(f"{server.url}: loaded {hf_dir} in {time.monotonic() - started:.1f} s", flush=True)
    return client, version


def picture_loader(data_dir: Path, config: Config, max_pixels: int, kept: int) -> Callable[[Job], Sequence[str]]:
    """Data URIs of a job's resized (and masked) pictures; those of the last `kept` prompts are remembered for the rest of their group."""

    @lru_cache(maxsize=kept)
    def load(names: tuple[str, ...], saliency: tuple[str, ...], seed: int | None) -> tuple[str, ...]:
        masking = None if seed is None else config.masked_image
        pictures = load_images(data_dir, list(names), config.data.min_pixels, max_pixels, masking, seed, saliency)
        return tuple(to_data_uri(picture) for picture in pictures)

    return lambda job: load(tuple(job.prompt.images), tuple(job.prompt.saliency), job.masked_image_seed)


def sample_and_grade(
    client: SglangClient,
    weight_version: str,
    jobs: Sequence[Job],
    pictures: Callable[[Job], Sequence[str]],
    sampling: Sampling,
    tokenizer: Tokenizer,
    config: Config,
    title: str,
) -> list[Graded]:
    """One Graded per job, in order. Responses are graded in other processes while the rest is being sampled."""
    requests = [
        Request(job.prompt, job.seed, name=f"{title}-{number}-{weight_version}", images=partial(pictures, job))
        for number, job in enumerate(jobs)
    ]
    submitted = [None] * len(jobs)
    texts = [""] * len(jobs)
    with Grader(config.reward) as grader, tqdm(total=len(jobs), desc=title, unit=" samples", mininterval=1) as bar:
        counts = {"tokens": 0, "cut off": 0}

        def on_sample(index: int, sample: Sample) -> None:
            texts[index] = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
            cut_off = sample.finish_reason == "length"
            submitted[index] = grader.submit(texts[index], jobs[index].prompt.answer, cut_off)
            counts["tokens"] += len(sample.token_ids)
            counts["cut off"] += cut_off
            rate = counts["tokens"] / max(bar.format_dict["elapsed"], 1e-3)
            bar.set_postfix({"tokens/s": round(rate), "cut off": counts["cut off"]}, refresh=False)
            bar.update()

        samples = client.sample(requests, sampling, weight_version, on_sample)
        rewards = [grader.result(one) for one in submitted]
    return [Graded(*parts) for parts in zip(samples, texts, rewards)]


def summary(graded: Sequence[Graded]) -> dict[str, float | int]:
    """Means and counts over responses, for manifests and metrics."""
    n = len(graded)
    return {
        "responses": n,
        "mean_reward": sum(g.rewards.overall for g in graded) / n,
        "accuracy": sum(g.rewards.accuracy for g in graded) / n,
        "format": sum(g.rewards.format for g in graded) / n,
        "cut_off_share": sum(g.sample.finish_reason == "length" for g in graded) / n,
        "mean_response_tokens": sum(len(g.sample.token_ids) for g in graded) / n,
        "timed_out": sum(g.rewards.timed_out for g in graded),
    }

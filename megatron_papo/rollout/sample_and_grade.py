"""Responses to prompts, graded: what stage 4 (rollouts) and stage 7 (evaluation) have in common."""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm

from megatron_papo.config import Config
from megatron_papo.data.chat import tokenizer_hash
from megatron_papo.errors import UserError
from megatron_papo.pictures.preprocess import load_images, to_data_uri
from megatron_papo.rollout.rewards import Grader
from megatron_papo.run.records import Prompt, Rewards
from megatron_papo.sglang.client import SglangClient
from megatron_papo.sglang.replicas import HealthLimits
from megatron_papo.sglang.requests import Request, Sample, Sampling
from megatron_papo.sglang.server import Server, open_servers, restart

WEIGHT_VERSION_CHARACTERS = 16


@dataclass(frozen=True)
class Job:
    """One response to sample and grade."""

    prompt: Prompt
    sample: int
    seed: int
    masked_image_seed: int | None = None
    """Show the pictures masked, drawn with this seed; None: as they are."""
    group: int | None = None
    """Jobs of one call with the same number have the same prompt and pictures, which are then computed once."""


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
        raise UserError(
            f"{hf_dir}/tokenizer.json: not the tokenizer that {data_dir} was made with: run stage 1 again with this"
            " model.path"
        )
    return Tokenizer.from_file(str(hf_dir / "tokenizer.json"))


def client_with_weights(
    where: str, hf_dir: Path, fingerprint: str, config: Config, probe: Request | None = None
) -> tuple[SglangClient, str]:
    """A client of the servers that --server names, which then hold the weights of hf_dir, and their version.

    probe: see SglangClient.update_weights.
    """
    settings, dtype = config.server, config.model.dtype
    if settings.router and not where.startswith("http"):
        raise UserError(
            "server.router: stands in front of servers that you started: list their URLs with --server, separated by"
            " commas"
        )
    client = SglangClient(
        open_servers(where, hf_dir, settings, dtype),
        config.rollout.concurrency,
        config.rollout.request_timeout_seconds,
        router=Server(settings.router.rstrip("/"), os.environ.get("SGLANG_API_KEY")) if settings.router else None,
        restart=lambda lost: restart(lost, hf_dir, settings, dtype),
        limits=HealthLimits(settings.health_interval_seconds, settings.health_timeout_seconds, settings.max_restarts),
    )
    version = fingerprint[:WEIGHT_VERSION_CHARACTERS]
    started = time.monotonic()
    updated = client.update_weights(hf_dir, version, probe)
    if updated:
        print(
            f"{updated} of {len(client.servers)} server(s): loaded {hf_dir} in {time.monotonic() - started:.1f} s",
            flush=True,
        )
    return client, version


def picture_loader(data_dir: Path, config: Config, max_pixels: int, kept: int) -> Callable[[Job], Sequence[str]]:
    """Data URIs of a job's resized (and masked) pictures; those of the last `kept` prompts are remembered for the rest
    of their group."""

    @lru_cache(maxsize=kept)
    def load(names: tuple[str, ...], saliency: tuple[str, ...], seed: int | None) -> tuple[str, ...]:
        masking = None if seed is None else config.masked_image
        pictures = load_images(data_dir, list(names), config.data.min_pixels, max_pixels, masking, seed, saliency)
        return tuple(to_data_uri(picture) for picture in pictures)

    return lambda job: load(tuple(job.prompt.images), tuple(job.prompt.saliency), job.masked_image_seed)


def probe_of(prompts: Sequence[Prompt], pictures: Callable[[Job], Sequence[str]]) -> Request:
    """The first prompt with a picture (or the first): what a server says about it must change with its weights."""
    prompt = next((prompt for prompt in prompts if prompt.images), prompts[0])
    return Request(prompt, 0, "probe", partial(pictures, Job(prompt, 0, 0)))


def sample_and_grade(
    client: SglangClient,
    weight_version: str,
    jobs: Sequence[Job],
    pictures: Callable[[Job], Sequence[str]],
    sampling: Sampling,
    tokenizer: Tokenizer,
    config: Config,
    title: str,
    groups_wanted: int | None = None,
) -> list[Graded | None]:
    """One Graded per job, in order. Responses are graded in other processes while the rest is being sampled.

    groups_wanted: once so many groups are complete, the other jobs are cancelled; those that were not finished are
    None.
    """
    requests = [
        Request(
            job.prompt,
            job.seed,
            name=f"{title}-{number}-{weight_version}",
            images=partial(pictures, job),
            group=None if job.group is None else str(job.group),
        )
        for number, job in enumerate(jobs)
    ]
    submitted = [None] * len(jobs)
    texts = [""] * len(jobs)
    missing = Counter(job.group for job in jobs)
    with Grader(config.reward) as grader, tqdm(total=len(jobs), desc=title, unit=" samples", mininterval=1) as bar:
        counts = Counter()

        def on_sample(index: int, sample: Sample) -> None:
            texts[index] = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
            cut_off = sample.finish_reason == "length"
            submitted[index] = grader.submit(texts[index], jobs[index].prompt.answer, cut_off)
            missing[jobs[index].group] -= 1
            counts.update(
                {"tokens": len(sample.token_ids), "cut off": cut_off, "groups": missing[jobs[index].group] == 0}
            )
            rate = counts["tokens"] / max(bar.format_dict["elapsed"], 1e-3)
            shown = {
                "tokens/s": round(rate),
                "running": client.running,
                "finished": bar.n + 1,
                "cut off": counts["cut off"],
            }
            bar.set_postfix(shown, refresh=False)
            bar.update()

        def enough() -> bool:
            return groups_wanted is not None and counts["groups"] >= groups_wanted

        samples = client.sample(requests, sampling, weight_version, on_sample, enough)
        rewards = [None if one is None else grader.result(one) for one in submitted]
    return [None if parts[0] is None else Graded(*parts) for parts in zip(samples, texts, rewards)]


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

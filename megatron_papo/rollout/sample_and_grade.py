"""Responses to prompts, graded: what stage 4 (rollouts) and stage 7 (evaluation) have in common."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from megatron_papo.config import Grading, RewardConfig, ServerConfig
from megatron_papo.data.chat import tokenizer_hash
from megatron_papo.errors import UserError
from megatron_papo.reading import read_text, reading
from megatron_papo.rollout.groups import Graded
from megatron_papo.rollout.rewards import Grader, Submitted
from megatron_papo.run.console import progress_bar
from megatron_papo.sglang.answers import Sample
from megatron_papo.sglang.client import SglangClient
from megatron_papo.sglang.open_files import room_for
from megatron_papo.sglang.replicas import HealthLimits
from megatron_papo.sglang.requests import Request, Sampling
from megatron_papo.sglang.sample_store import SampleStore
from megatron_papo.sglang.server import open_servers, restart, urls_of

WEIGHT_VERSION_CHARACTERS = 16


@dataclass(frozen=True)
class Sampler:
    """The servers, which hold the weights of weight_version, and how responses are sampled and graded."""

    client: SglangClient
    weight_version: str
    sampling: Sampling
    tokenizer: Tokenizer
    reward: RewardConfig
    store: SampleStore
    """Where finished samples are kept until the output is published."""
    grading: Grading = "mathruler"


def matching_tokenizer(hf_dir: Path, data_dir: Path) -> Tokenizer:
    """Return the checkpoint's tokenizer. Raises UserError if the prompts were made with another tokenizer."""
    expected = read_text(data_dir / "tokenizer.sha256", "run stage 1 again").strip()
    if tokenizer_hash(hf_dir) != expected:
        raise UserError(
            f"{hf_dir}/tokenizer.json: not the tokenizer that {data_dir} was made with: run stage 1 again with this"
            " model.path"
        )
    with reading(hf_dir / "tokenizer.json", "copy the checkpoint again"):
        return Tokenizer.from_file(str(hf_dir / "tokenizer.json"))


def open_client(
    where: str, hf_dir: Path, server: ServerConfig, dtype: str, *, concurrency: int, timeout_seconds: float
) -> SglangClient:
    """Return a client of the servers that --server names; in a server directory they are started, or found.

    Args:
        where: the value of --server: URLs, or a server directory.
        hf_dir: checkpoint that a server is started with.
        server: how servers are started, and what is done when one fails.
        dtype: in which the servers compute.
        concurrency: requests under way at once.
        timeout_seconds: for one response.
    """
    room = room_for(concurrency)
    return SglangClient(
        open_servers(where, hf_dir, server, dtype),
        room,
        timeout_seconds,
        restart=None if urls_of(where) else lambda lost: restart(lost, hf_dir, server, dtype),
        limits=HealthLimits(server.health_interval_seconds, server.health_timeout_seconds, server.max_restarts),
    )


def load_weights(client: SglangClient, hf_dir: Path, fingerprint: str, probe: Request | None = None) -> str:
    """Load a checkpoint into all servers of the client, where it is not there already. Returns the weights' version.

    Args:
        client: of the servers.
        hf_dir: the checkpoint, which the caller has verified.
        fingerprint: of the checkpoint; its first characters are the version.
        probe: see SglangClient.update_weights.
    """
    version = fingerprint[:WEIGHT_VERSION_CHARACTERS]
    started = time.monotonic()
    updated = client.update_weights(hf_dir, version, probe)
    if updated:
        seconds = time.monotonic() - started
        print(f"{updated} of {len(client.servers)} server(s): loaded {hf_dir} in {seconds:.1f} s", flush=True)
    return version


def sample_and_grade_all(sampler: Sampler, requests: Sequence[Request], title: str) -> list[Graded]:
    """Return one Graded per request, in order."""
    results = sample_and_grade(sampler, requests, title)
    return [result for result in results if result is not None]  # without groups_wanted nothing is cancelled


def sample_and_grade(
    sampler: Sampler, requests: Sequence[Request], title: str, groups_wanted: int | None = None
) -> list[Graded | None]:
    """Return one Graded per request, in order. Responses are graded in other processes while the rest is being sampled.

    Args:
        sampler: servers and settings.
        requests: whole groups.
        title: of the progress bar.
        groups_wanted: once so many groups are complete, the other requests are cancelled; None stands for a response
            that was not finished.
    """
    client = sampler.client
    submitted: list[Submitted | None] = [None] * len(requests)
    texts = [""] * len(requests)
    missing = Counter(request.group for request in requests)
    counts: Counter[str] = Counter()
    if sampler.store is not None and sampler.store.count:
        print(f"{title}: {sampler.store.count:,} samples are kept, those that are missing are asked for", flush=True)
    with Grader(sampler.reward) as grader, progress_bar(len(requests), title, "samples") as bar:

        def on_sample(index: int, sample: Sample) -> None:
            group, cut_off = requests[index].group, sample.finish_reason == "length"
            texts[index] = sampler.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
            prompt = requests[index].prompt
            submitted[index] = grader.submit(texts[index], prompt.answer, cut_off, sampler.grading, prompt.options)
            missing[group] -= 1
            counts.update({"tokens": sample.num_tokens, "cut off": cut_off, "groups": missing[group] == 0})
            rate = counts["tokens"] / max(bar.format_dict["elapsed"], 1e-3)
            shown = {
                "tokens/s": round(rate),
                "running": client.running,
                "finished": bar.n + 1,
                "cut off": counts["cut off"],
            }
            bar.set_postfix(shown, refresh=False)
            bar.initial = client.stored  # samples that were there: the time left is that of the others
            bar.update()

        def enough() -> bool:
            return groups_wanted is not None and counts["groups"] >= groups_wanted

        samples = client.sample(requests, sampler.sampling, sampler.weight_version, on_sample, enough, sampler.store)
        return [
            None if sample is None or grading is None else Graded(sample, text, grader.result(grading))
            for sample, text, grading in zip(samples, texts, submitted, strict=True)
        ]

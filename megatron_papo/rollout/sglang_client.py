"""SGLang over HTTP: build a request and read an answer (pure functions), send many at once, load new weights.

Checked on every answer: prompt length as the server counted it, one log-prob per token, the weights it was made with, no forbidden
token. Token ids and log-probs are the server's; nothing is ever tokenised again.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from megatron_papo.errors import UserError
from megatron_papo.records import Prompt
from megatron_papo.rollout.sglang_server import Server, log_tail

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
RETRY_PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)
CONNECT_TIMEOUT_SECONDS = 10.0
FORBIDDEN_BIAS = -1e9


@dataclass(frozen=True)
class Sampling:
    """How to sample, the same for all requests of a stage."""

    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int
    forbidden: tuple[int, ...]
    """Ids that are never sampled. The server's log-probs are over the allowed ones: they exceed those over the whole vocabulary, which
    training uses, by -log(1 - probability of the forbidden ids), next to nothing in a trained model."""


@dataclass(frozen=True)
class Request:
    """One response to be sampled."""

    prompt: Prompt
    seed: int
    name: str
    """Unique among the requests under way."""
    images: Callable[[], Sequence[str]]
    """Gives the resized pictures as data URIs; called when the request is sent."""


@dataclass(frozen=True)
class Sample:
    token_ids: list[int]
    log_probs: list[float]
    """At the temperature, before top_p and top_k."""
    finish_reason: str
    weight_version: str


def forbidden_tokens(hf_dir: Path, vocabulary: dict[str, int]) -> tuple[int, ...]:
    """Ids that a response must not hold: vision tokens, which would claim a picture that is not there, and the padding of the embedding.

    vocabulary: of the tokenizer, special tokens included.
    """
    config = json.loads((Path(hf_dir) / "config.json").read_text())
    size = config.get("text_config", config).get("vocab_size") or config["vocab_size"]
    vision = {vocabulary[token] for token in VISION_TOKENS if token in vocabulary}
    return tuple(sorted(vision | (set(range(size)) - set(vocabulary.values()))))


def build_request(request: Request, images: Sequence[str], sampling: Sampling, weight_version: str) -> dict:
    """The JSON body of POST /generate.

    extra_key keeps SGLang's prefix cache to requests with this very prompt: the rounding of a cached prefix depends on the length of
    the prompt it was computed with. mm_hashes keep its cache of ViT outputs to these weights, where a foreign server has one.
    """
    prompt = request.prompt
    digests = [hashlib.sha256(f"{weight_version} {image}".encode()).hexdigest() for image in images]
    identity = hashlib.sha256(json.dumps([prompt.token_ids, digests]).encode()).hexdigest()
    body = {
        "input_ids": prompt.token_ids,
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_new_tokens": sampling.max_response_tokens,
            "sampling_seed": request.seed,
            "skip_special_tokens": False,
            "logit_bias": {str(token): FORBIDDEN_BIAS for token in sampling.forbidden},
        },
        "return_logprob": True,
        "rid": request.name,
        "extra_key": identity,
        "stream": False,
    }
    if images:
        body |= {"image_data": list(images), "mm_hashes": digests}
    return body


def parse_answer(answer: dict, request: Request, sampling: Sampling, weight_version: str) -> Sample:
    """The sampled tokens of an answer of /generate. Raises UserError, naming the prompt, where it cannot be trusted."""
    prompt, meta = request.prompt, answer["meta_info"]

    def refuse(problem: str):
        raise UserError(f"prompt {prompt.id}: {problem}")

    if meta["finish_reason"]["type"] not in ("stop", "length"):
        refuse(f"the server gave up on it: {meta['finish_reason']}")
    if meta["prompt_tokens"] != prompt.num_tokens:
        refuse(
            f"the server counted {meta['prompt_tokens']} prompt tokens, we count {prompt.num_tokens}: the server's checkpoint or image"
            " size limits are not those that the prompts were made with (data.min_pixels, data.max_pixels)"
        )
    token_ids = [entry[1] for entry in meta["output_token_logprobs"]]
    log_probs = [entry[0] for entry in meta["output_token_logprobs"]]
    if not token_ids or token_ids != answer["output_ids"] or len(token_ids) != meta["completion_tokens"]:
        refuse(f"{len(answer['output_ids'])} tokens, but log-probs for {len(token_ids)} of them: is the server really SGLang 0.5.21?")
    if None in log_probs:
        refuse("a token without log-prob: is the server really SGLang 0.5.21?")
    if not set(sampling.forbidden).isdisjoint(token_ids):
        refuse("the server sampled a forbidden token: it ignores logit_bias, so it is not SGLang 0.5.21")
    if meta["weight_version"] != weight_version:
        refuse(f"answered with weights {meta['weight_version']}, expected {weight_version}: someone else loads weights into this server")
    return Sample(token_ids, log_probs, meta["finish_reason"]["type"], meta["weight_version"])


class SglangClient:
    """Requests to one server, at most `concurrency` under way at once, each with a finite timeout."""

    def __init__(self, server: Server, concurrency: int, timeout_seconds: float):
        self.server = server
        self.concurrency = concurrency
        self.timeout_seconds = timeout_seconds
        self._ssl_context = httpx.create_ssl_context()

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, weight_version: str, on_sample: Callable[[int, Sample], None]
    ) -> list[Sample]:
        """One Sample per request, in order; on_sample(index, sample) as they come. The first error ends it all."""
        return asyncio.run(self._sample_all(requests, sampling, weight_version, on_sample))

    async def _sample_all(self, requests, sampling, weight_version, on_sample) -> list[Sample]:
        waiting = iter(enumerate(requests))
        samples: list[Sample | None] = [None] * len(requests)

        async def work() -> None:
            # A connection and a pool of one each: httpx's pool takes quadratic time when shared by many requests.
            async with self._client() as client:
                for index, request in waiting:
                    images = await asyncio.to_thread(request.images)
                    body = build_request(request, images, sampling, weight_version)
                    answer = await self._post(client, "/generate", body, f"prompt {request.prompt.id}")
                    samples[index] = parse_answer(answer, request, sampling, weight_version)
                    on_sample(index, samples[index])

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(self.concurrency, len(requests))):
                    tasks.create_task(work())
        except BaseExceptionGroup as group:
            raise group.exceptions[0]
        return samples

    def update_weights(self, hf_dir: Path, weight_version: str) -> bool:
        """Loads the checkpoint in hf_dir, which the caller has verified, into the server. False if it has that version already.

        Requests under way are put back and go on with the new weights (pause_generation "retract"); this protocol does not wait for
        the lock that a stuck request would hold.
        """
        return asyncio.run(self._update_weights(Path(hf_dir).resolve(), weight_version))

    async def _update_weights(self, hf_dir: Path, weight_version: str) -> bool:
        async with self._client() as client:
            if await self._weight_version(client) == weight_version:
                return False
            await self._post(client, "/pause_generation", {"mode": "retract"}, "pause")
            try:
                body = {"model_path": str(hf_dir), "weight_version": weight_version, "flush_cache": True}
                answer = await self._post(client, "/update_weights_from_disk", body, f"weights {hf_dir}")
                if not answer["success"]:
                    raise UserError(f"{hf_dir}: the server could not load it: {answer['message']}")
                found = await self._weight_version(client)
                if found != weight_version:
                    raise UserError(f"{self.server.url}: says its weights are {found} after loading {weight_version}: {self._restart()}")
            finally:
                await self._post(client, "/continue_generation", {}, "continue")
        return True

    async def _weight_version(self, client: httpx.AsyncClient) -> str:
        return (await self._send(client, "GET", "/model_info", None, "model_info")).json()["weight_version"]

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.server.url,
            headers=self.server.headers,
            timeout=httpx.Timeout(self.timeout_seconds, connect=CONNECT_TIMEOUT_SECONDS),
            verify=self._ssl_context,
            trust_env=False,
        )

    async def _post(self, client: httpx.AsyncClient, path: str, body: dict, what: str) -> dict:
        return (await self._send(client, "POST", path, body, what)).json()

    async def _send(self, client: httpx.AsyncClient, method: str, path: str, body: dict | None, what: str) -> httpx.Response:
        """Tries again, with the same seed, after connection errors and HTTP 5xx; a 4xx is our mistake and final."""
        for pause in (*RETRY_PAUSES_SECONDS, None):
            try:
                response = await client.request(method, path, json=body)
            except httpx.TimeoutException as error:
                raise UserError(f"{what}: no answer from {self.server.url} ({type(error).__name__}): {self._restart()}")
            except httpx.TransportError as error:
                problem = f"not reachable ({type(error).__name__})"
            else:
                if response.status_code < 400:
                    return response
                problem = f"HTTP {response.status_code}: {response.text[:300]}"
                if response.status_code < 500:
                    raise UserError(f"{what}: {self.server.url}{path} refused it: {problem}")
            if pause is not None:
                await asyncio.sleep(pause)
        raise UserError(f"{what}: {self.server.url} {problem}: {self._restart()}")

    def _restart(self) -> str:
        if self.server.directory is None:
            return "restart that server, or give --server a directory to have one started"
        tail = log_tail(self.server.directory, 10)
        again = f"start it again with: python -m tools.sglang_server start --server {self.server.directory} --config FILE --model HF_DIR"
        return f"{again} (the stages do so by themselves); {self.server.directory}/server.log ends:\n{tail}"

"""What is said to SGLang and what it answers: pure functions that build a request and read an answer.

Checked on every answer: prompt length as the server counted it, one log-prob per token, the weights it was made with,
no forbidden token. Token ids and log-probs are the server's; nothing is ever tokenised again.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NoReturn

from megatron_papo.errors import UserError
from megatron_papo.run.records import Prompt

FORBIDDEN_BIAS = -1e9


@dataclass(frozen=True)
class Sampling:
    """How to sample, the same for all requests of a stage."""

    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int
    forbidden: tuple[int, ...]
    """Ids that are never sampled. The server's log-probs are over the allowed ones: they exceed those over the whole
    vocabulary, which training uses, by -log(1 - probability of the forbidden ids), next to nothing in a trained
    model."""


@dataclass(frozen=True)
class Request:
    """One response to be sampled, and where it belongs."""

    prompt: Prompt
    seed: int
    images: Callable[[], Sequence[str]]
    """Gives the resized pictures as data URIs; called when the request is sent."""
    group: Hashable | None = None
    """Requests of one group have the same prompt and pictures: they go to one server, which computes those once. None:
    of no group."""
    sample: int = 0
    """Number of the response among those to its prompt, from 0; the server is not told."""
    masked_image_seed: int | None = None
    """The seed that `images` masks with; None: the pictures are not masked. The server is not told."""


@dataclass(frozen=True)
class Sample:
    token_ids: list[int]
    log_probs: list[float]
    """At the temperature, before top_p and top_k."""
    finish_reason: Literal["stop", "length"]
    weight_version: str


def logit_bias(forbidden: Sequence[int]) -> dict[str, float]:
    """Return SGLang's sampling parameter under which these tokens are never sampled."""
    return {str(token): FORBIDDEN_BIAS for token in forbidden}


def build_request(request: Request, images: Sequence[str], sampling: Sampling, weight_version: str) -> dict:
    """Return the JSON body of POST /generate, but for its rid.

    extra_key keeps SGLang's prefix cache to requests with this very prompt and these weights: the rounding of a cached
    prefix depends on what it was computed with, and requests that an earlier client left behind are computed again
    under new weights. mm_hashes keep its cache of ViT outputs to these weights, where a foreign server has one. All
    that shapes the distribution is named, because a server may have defaults of its own (--preferred-sampling-params).

    Args:
        request: what to sample.
        images: its pictures, as data URIs.
        sampling: how.
        weight_version: of the weights that the server holds.
    """
    prompt = request.prompt
    digests = [_digest(weight_version, image) for image in images]
    identity = hashlib.sha256(json.dumps([weight_version, prompt.token_ids, digests]).encode()).hexdigest()
    body = {
        "input_ids": prompt.token_ids,
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "max_new_tokens": sampling.max_response_tokens,
            "sampling_seed": request.seed,
            "skip_special_tokens": False,
            "logit_bias": logit_bias(sampling.forbidden),
        },
        "return_logprob": True,
        "extra_key": identity,
        "stream": False,
    }
    if images:
        body |= {"image_data": list(images), "mm_hashes": digests}
    return body


PICTURES_REMEMBERED = 64
"""Those of the groups that are under way: hashing and quoting one takes longer than all the rest of a request."""


@lru_cache(PICTURES_REMEMBERED)
def _digest(weight_version: str, image: str) -> str:
    return hashlib.sha256(f"{weight_version} {image}".encode()).hexdigest()


@lru_cache(PICTURES_REMEMBERED)
def _quoted(image: str) -> bytes:
    return json.dumps(image).encode()


def encode(body: dict) -> bytes:
    """Return the body of a request as JSON; a picture is quoted once for all samples of its group."""
    images = body.get("image_data", ())
    content = json.dumps({name: value for name, value in body.items() if name != "image_data"}).encode()
    return content[:-1] + b', "image_data": [' + b", ".join(map(_quoted, images)) + b"]}" if images else content


def prefix_request(body: dict) -> dict:
    """Return a request that leaves the prompt of `body` in the prefix cache and makes a token that is thrown away."""
    return body | {"sampling_params": body["sampling_params"] | {"max_new_tokens": 1}, "return_logprob": False}


def probe_request(request: Request, images: Sequence[str], weight_version: str) -> dict:
    """Return a request for the log-probs of the prompt's own tokens: what the weights make of pictures and text."""
    body = build_request(request, images, Sampling(1.0, 1.0, -1, 1, ()), weight_version)
    return body | {"logprob_start_len": 0}


def parse_probe(answer: dict) -> list[float]:
    """Return the log-probs of the prompt's tokens but the first."""
    return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"] if entry[0] is not None]


def parse_answer(answer: dict, request: Request, sampling: Sampling, weight_version: str) -> Sample:
    """Return the sampled tokens of an answer of /generate. Raises UserError, naming the prompt, if it is not trusted.

    Args:
        answer: of the server.
        request: what was asked.
        sampling: how.
        weight_version: that the answer must name.
    """
    prompt, meta = request.prompt, answer["meta_info"]

    def refuse(problem: str) -> NoReturn:
        raise UserError(f"prompt {prompt.id}: {problem}")

    if meta["finish_reason"]["type"] not in ("stop", "length"):
        refuse(f"the server gave up on it: {meta['finish_reason']}")
    if meta["prompt_tokens"] != prompt.num_tokens:
        refuse(
            f"the server counted {meta['prompt_tokens']} prompt tokens, we count {prompt.num_tokens}: the server's"
            " checkpoint or image size limits are not those that the prompts were made with (data.min_pixels,"
            " data.max_pixels)"
        )
    token_ids = [entry[1] for entry in meta["output_token_logprobs"]]
    log_probs = [entry[0] for entry in meta["output_token_logprobs"]]
    if not token_ids or token_ids != answer["output_ids"] or len(token_ids) != meta["completion_tokens"]:
        refuse(
            f"{len(answer['output_ids'])} tokens, but log-probs for {len(token_ids)} of them: is the server really"
            " SGLang 0.5.21?"
        )
    if None in log_probs:
        refuse("a token without log-prob: is the server really SGLang 0.5.21?")
    if not set(sampling.forbidden).isdisjoint(token_ids):
        refuse("the server sampled a forbidden token: it ignores logit_bias, so it is not SGLang 0.5.21")
    if meta["weight_version"] != weight_version:
        refuse(
            f"answered with weights {meta['weight_version']}, expected {weight_version}: someone else loads weights"
            " into this server, or it was started again: run the stage again"
        )
    return Sample(token_ids, log_probs, meta["finish_reason"]["type"], meta["weight_version"])

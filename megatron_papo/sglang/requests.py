"""What is said to SGLang: pure functions that build requests. What it answers: sglang/answers.py."""

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_papo.data.response_tokens import ResponseTokens
from megatron_papo.run.records import Prompt

FORBIDDEN_BIAS = -1e9
ANY_TOKENS = ResponseTokens(0, (), frozenset())
"""Nothing forbidden: of a request whose sample is thrown away."""


@dataclass(frozen=True)
class Sampling:
    """How to sample, the same for all requests of a stage."""

    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int
    tokens: ResponseTokens
    """What a response may consist of. The server's log-probs are over the allowed ids: they exceed those over the whole
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
            "logit_bias": logit_bias(sampling.tokens.forbidden),
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
    body = build_request(request, images, Sampling(1.0, 1.0, -1, 1, ANY_TOKENS), weight_version)
    return body | {"logprob_start_len": 0}

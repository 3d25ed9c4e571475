"""The client against the real server; expected log-probs come from transformers.

Log-probs may differ by 1e-4: both sides are float32, but attention and the order of summation differ (measured: 1e-6 to
1e-5).
"""

import dataclasses
import json
import random
import shutil
import socket
import time

import pytest
import torch

from megatron_papo.data.chat import VISION_TOKENS
from megatron_papo.data.response_tokens import ResponseTokens, response_tokens
from megatron_papo.errors import UserError
from megatron_papo.sglang import delivery, replicas
from megatron_papo.sglang.client import SglangClient
from megatron_papo.sglang.replicas import HealthLimits
from megatron_papo.sglang.requests import Sampling, build_request
from megatron_papo.sglang.server_record import Server
from tests.sglang_server import processed, request_for

TOLERANCE = 1e-4
VOCABULARY = 448


@pytest.fixture(scope="session")
def tokens(checkpoints) -> ResponseTokens:
    from tokenizers import Tokenizer

    return response_tokens(
        checkpoints.first, Tokenizer.from_file(str(checkpoints.first / "tokenizer.json")).get_vocab(True)
    )


@pytest.fixture(scope="session")
def forbidden(tokens):
    return tokens.forbidden


@pytest.fixture(scope="session")
def sampling(tokens):
    return Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_response_tokens=24, tokens=tokens)


def sample(client, requests, sampling, version="first"):
    return client.sample(requests, sampling, version)


def load(checkpoint):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()


def reference_log_probs(model, prompt, root, response, temperature, forbidden):
    """log_softmax(logits / temperature) over the allowed tokens at the response, by transformers on the native
    pictures. [tokens]"""
    extra, ids = {}, list(prompt.token_ids)
    if prompt.images:
        extra = dict(processed(root, prompt.images))
        counts = iter(int(grid.prod()) // 4 for grid in extra["image_grid_thw"])
        pad = model.config.image_token_id
        ids = [token for one in ids for token in ([pad] * next(counts) if one == pad else [one])]
    assert len(ids) == prompt.num_tokens
    tokens = torch.tensor([ids + response])
    types = (tokens == model.config.image_token_id).long()
    with torch.no_grad():
        logits = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), mm_token_type_ids=types, **extra
        ).logits[0]
    logits = logits[len(ids) - 1 : -1] / temperature
    logits[:, list(forbidden)] = -torch.inf
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def difference(found, expected):
    return (torch.tensor(found) - expected).abs().max().item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_transformers(client, checkpoints, prompts, pictures, sampling, forbidden, temperature):
    model = load(checkpoints.first)
    sampling = dataclasses.replace(sampling, temperature=temperature)
    requests = [request_for(prompt, pictures, seed) for seed, prompt in enumerate(prompts.values())]
    for request, got in zip(requests, sample(client, requests, sampling)):
        expected = reference_log_probs(model, request.prompt, pictures, got.token_ids, temperature, forbidden)
        assert difference(got.log_probs, expected) < TOLERANCE, request.prompt.id
        at_other_temperature = reference_log_probs(model, request.prompt, pictures, got.token_ids, 0.9, forbidden)
        assert difference(got.log_probs, at_other_temperature) > 100 * TOLERANCE
    # control: the order of two pictures matters
    two = next(got for request, got in zip(requests, sample(client, requests, sampling)) if request.prompt.id == "two")
    swapped = prompts["two"].model_copy(update={"images": prompts["two"].images[::-1]})
    assert (
        difference(two.log_probs, reference_log_probs(model, swapped, pictures, two.token_ids, temperature, forbidden))
        > 0.01
    )


def test_new_weights_reach_the_vision_tower(client, checkpoints, prompts, pictures, sampling, forbidden):
    """The same picture before and after an update: SGLang's cache of ViT outputs would survive it
    (sgl-project/sglang#36468)."""
    request = request_for(prompts["plain"], pictures, seed=3)
    before = sample(client, [request], sampling)[0]
    assert client.update_weights(checkpoints.second, "second") == 1
    after = sample(client, [request], sampling, "second")[0]
    assert after.token_ids != before.token_ids
    second = load(checkpoints.second)
    assert (
        difference(
            after.log_probs, reference_log_probs(second, request.prompt, pictures, after.token_ids, 1.0, forbidden)
        )
        < TOLERANCE
    )
    # control: what a stale vision tower would give is far away
    second.model.visual.load_state_dict(load(checkpoints.first).model.visual.state_dict())
    assert (
        difference(
            after.log_probs, reference_log_probs(second, request.prompt, pictures, after.token_ids, 1.0, forbidden)
        )
        > 0.1
    )
    assert client.update_weights(checkpoints.first, "first") == 1
    assert sample(client, [request], sampling)[0] == before
    assert client.update_weights(checkpoints.first, "first") == 0


def test_seeds_decide_and_batching_does_not(server, client, prompts, pictures, sampling):
    """Bit for bit: one at a time, 32 at once, another order. This is what makes a resumed run equal an uninterrupted
    one."""
    requests = [request_for(prompt, pictures, seed) for prompt in prompts.values() for seed in range(12)]
    one_by_one = sample(SglangClient([server], concurrency=1, timeout_seconds=60), requests, sampling)
    assert sample(client, requests, sampling) == one_by_one
    order = random.Random(2).sample(range(len(requests)), len(requests))
    shuffled = sample(client, [requests[i] for i in order], sampling)
    assert [shuffled[order.index(i)] for i in range(len(requests))] == one_by_one
    group = [tuple(s.token_ids) for s in one_by_one[:12]]
    assert len(set(group)) == 12


def test_forbidden_tokens_never_appear(client, checkpoints, prompts, pictures, sampling, forbidden):
    """Control: without the list a random model samples them. The log-probs are then over the whole vocabulary."""
    ids = json.loads((checkpoints.first / "tokenizer.json").read_text())["added_tokens"]
    vision = {token["id"] for token in ids if token["content"] in VISION_TOKENS}
    assert len(vision) == 5 and vision < set(forbidden) and VOCABULARY - 1 in forbidden and VOCABULARY not in forbidden
    requests = [request_for(prompts["text"], pictures, seed) for seed in range(64)]
    allowed = {token for one in sample(client, requests, sampling) for token in one.token_ids}
    assert allowed.isdisjoint(forbidden)
    anything = dataclasses.replace(sampling.tokens, forbidden=())
    free = sample(client, requests, dataclasses.replace(sampling, tokens=anything))
    assert not {token for one in free for token in one.token_ids}.isdisjoint(forbidden)
    expected = reference_log_probs(load(checkpoints.first), prompts["text"], pictures, free[0].token_ids, 1.0, ())
    assert difference(free[0].log_probs, expected) < TOLERANCE


def test_top_k_is_passed_on(client, prompts, pictures, sampling):
    requests = [request_for(prompts["plain"], pictures, seed) for seed in range(6)]
    greedy = sample(client, requests, dataclasses.replace(sampling, top_k=1))
    assert len({tuple(one.token_ids) for one in greedy}) == 1
    assert (
        len({tuple(one.token_ids) for one in sample(client, requests, dataclasses.replace(sampling, top_p=1e-6))}) == 1
    )


@pytest.fixture
def sent_twice(monkeypatch):
    """Each answer that is not believed is asked for once more."""
    monkeypatch.setattr(delivery, "RETRY_PAUSES_SECONDS", (0.1,))


def test_prompt_length_mismatch_is_refused(client, prompts, pictures, sampling, sent_twice):
    wrong = prompts["resized"].model_copy(update={"num_tokens": prompts["resized"].num_tokens + 1})
    with pytest.raises(
        UserError, match=rf"prompt resized: .* {wrong.num_tokens - 1} prompt tokens, we count {wrong.num_tokens}"
    ):
        sample(client, [request_for(wrong, pictures, 1)], sampling)


def test_bad_request_is_not_retried(client, prompts, pictures, sampling):
    started = time.monotonic()
    with pytest.raises(UserError, match="prompt plain: .* refused it: HTTP 400"):
        sample(client, [request_for(prompts["plain"], pictures, 1)], dataclasses.replace(sampling, top_p=3.0))
    assert time.monotonic() - started < sum(delivery.RETRY_PAUSES_SECONDS) / 2


def test_checkpoint_that_cannot_be_loaded(client, checkpoints, prompts, pictures, sampling, tmp_path):
    request = request_for(prompts["text"], pictures, 1)
    before = sample(client, [request], sampling)
    with pytest.raises(UserError, match="nowhere"):
        client.update_weights(tmp_path / "nowhere", "third")
    assert sample(client, [request], sampling) == before  # generation was continued, with the old weights


def test_answer_with_unexpected_weights_is_refused(client, prompts, pictures, sampling, sent_twice):
    with pytest.raises(UserError, match="answered with weights first, expected other"):
        sample(client, [request_for(prompts["text"], pictures, 1)], sampling, "other")


def test_missing_picture_is_named(client, prompts, pictures, sampling, tmp_path):
    shutil.copy(pictures / "a.png", tmp_path / "a.png")
    with pytest.raises(UserError, match="c.png: no such file"):
        sample(client, [request_for(prompts["two"], tmp_path, 1)], sampling)


def test_server_that_is_not_there(prompts, pictures, sampling, monkeypatch):
    monkeypatch.setattr(replicas, "UNREACHABLE_PAUSES_SECONDS", (0.1, 0.1))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(UserError, match=f"no SGLang server is left: {url} is not reachable .*--server"):
        sample(SglangClient([Server(url)], 4, 5.0), [request_for(prompts["plain"], pictures, 1)], sampling)


def test_server_that_never_answers_ends_in_time(prompts, pictures, sampling):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=f"no SGLang server is left: {url} did not answer /health within 0.5 s"):
            client = SglangClient([Server(url)], 4, 1.0, limits=HealthLimits(timeout_seconds=0.5))
            sample(client, [request_for(prompts["plain"], pictures, 1)], sampling)
        assert time.monotonic() - started < 5


def test_cache_keys_follow_pictures_and_weights(prompts, pictures, sampling):
    request = request_for(prompts["two"], pictures, 1)
    images = request.images()
    body = build_request(request, images, sampling, "v")
    assert body["input_ids"] == request.prompt.token_ids and len(body["mm_hashes"]) == 2
    for other in (build_request(request, images, sampling, "w"), build_request(request, images[::-1], sampling, "v")):
        assert other["extra_key"] != body["extra_key"] and other["mm_hashes"] != body["mm_hashes"]
    assert build_request(dataclasses.replace(request, seed=2), images, sampling, "v")["extra_key"] == body["extra_key"]


@pytest.mark.parametrize(
    "body",
    [{"a": [1, None, "ü"], "image_data": ['x"é', "y"], "z": {}}, {"image_data": ["q"], "k": 2}, {"k": {"image": 1}}],
)
def test_encoded_body_is_the_body(body):
    from megatron_papo.sglang.requests import encode

    assert json.loads(encode(body)) == body

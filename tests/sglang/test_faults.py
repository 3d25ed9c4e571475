"""Servers that die, hang or lie in mid-batch: nothing is lost, nothing comes twice, and the tokens are those of a run
without the fault."""

import dataclasses
import json
import os
import signal
import time
from array import array
from collections import Counter

import psutil
import pytest

from megatron_papo.config_files import load_config
from megatron_papo.data.response_tokens import response_tokens
from megatron_papo.errors import UserError
from megatron_papo.sglang import delivery, replicas
from megatron_papo.sglang import server as sglang_server
from megatron_papo.sglang.client import SglangClient
from megatron_papo.sglang.replicas import HealthLimits
from megatron_papo.sglang.requests import Sampling
from tests.helpers import DEMO_CONFIG, run_module
from tests.sglang.faulty_proxy import proxy_to
from tests.sglang_server import request_for

IMPATIENT = HealthLimits(interval_seconds=0.5, timeout_seconds=3.0, max_restarts=1)


def sampling_of(checkpoints) -> Sampling:
    from tokenizers import Tokenizer

    tokens = response_tokens(
        checkpoints.first, Tokenizer.from_file(str(checkpoints.first / "tokenizer.json")).get_vocab(True)
    )
    return Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_response_tokens=40, tokens=tokens)


@pytest.fixture(scope="session")
def sampling(checkpoints) -> Sampling:
    return sampling_of(checkpoints)


@pytest.fixture(scope="session")
def requests(prompts, pictures) -> list:
    return [request_for(prompt, pictures, seed, group=prompt.id) for prompt in prompts.values() for seed in range(10)]


@pytest.fixture
def undisturbed(client, requests, sampling) -> list:
    """What a healthy server answers."""
    return client.sample(requests, sampling, "first")


class Seen(Counter):
    """on_sample that counts the calls for each request, and does something once there are so many."""

    def __init__(self, after: int = 0, do=lambda: None):
        self.after, self.do = after, do

    def __call__(self, index: int, sample) -> None:
        self[index] += 1
        if self.after and self.total() == self.after:
            self.do()


def same(samples: list, others: list) -> bool:
    """The same tokens; log-probs to four units in the last place, of which another kind of CPU may promise less than
    all bits."""

    def without_log_probs(sample):
        return dataclasses.replace(sample, packed_log_probs=array("d"))

    return all(
        without_log_probs(one) == without_log_probs(other)
        and one.log_probs == pytest.approx(other.log_probs, rel=5e-7, abs=5e-7)
        for one, other in zip(samples, others, strict=True)
    )


def each_once(seen: Seen, requests: list) -> bool:
    return seen == Counter(range(len(requests)))


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_requests_of_a_lost_server_go_to_another(
    server, client, requests, sampling, undisturbed, fault, monkeypatch, capsys
):
    monkeypatch.setattr(replicas, "UNREACHABLE_PAUSES_SECONDS", (0.1,))
    seen = Seen()
    with proxy_to(server, fault, after=4) as (faulty, proxy):
        two = SglangClient([server, faulty], 16, 60, limits=IMPATIENT)
        started = time.monotonic()
        assert same(two.sample(requests, sampling, "first", seen), undisturbed)
        assert time.monotonic() - started < 30  # far below the 60 s of a request's own time-out
    assert each_once(seen, requests)
    assert two.traffic.servers_lost == 1 and two.traffic.servers_restarted == 0 and two.traffic.resent > 0
    assert proxy.generated > 4  # control: it did have requests when it was lost
    assert f"SGLang server lost: {faulty.url}" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_the_only_server_lost_is_an_error(server, client, requests, sampling, fault, monkeypatch):
    monkeypatch.setattr(replicas, "UNREACHABLE_PAUSES_SECONDS", (0.1,))
    with proxy_to(server, fault, after=5) as (faulty, _):
        with pytest.raises(UserError, match=f"no SGLang server is left: {faulty.url} .*give --server a directory"):
            SglangClient([faulty], 16, 60, limits=IMPATIENT).sample(requests, sampling, "first")


def test_a_passing_503_is_sent_again_to_the_same_server(server, client, requests, sampling, undisturbed):
    seen = Seen()
    with proxy_to(server, "503", after=8) as (shaky, _):
        alone = SglangClient([shaky], 4, 60, limits=IMPATIENT)
        assert same(alone.sample(requests, sampling, "first", seen), undisturbed)
    assert each_once(seen, requests) and alone.traffic.resent == 3 and alone.traffic.servers_lost == 0


def test_slow_answers_of_a_healthy_server_end_with_advice(server, client, checkpoints, prompts, pictures, sampling):
    """The health check passes, so it is not replaced; the same request runs out of time twice."""
    end_of_turn = json.loads((checkpoints.first / "config.json").read_text())["eos_token_id"]
    tokens = dataclasses.replace(sampling.tokens, forbidden=(*sampling.tokens.forbidden, end_of_turn))
    endless = dataclasses.replace(sampling, max_response_tokens=3000, tokens=tokens)
    impatient = SglangClient([server], 4, 0.3, limits=IMPATIENT)
    with pytest.raises(UserError, match="prompt text: .* no answer within rollout.request_timeout_seconds = 0.3"):
        impatient.sample([request_for(prompts["text"], pictures, seed) for seed in range(4)], endless, "first")


def test_groups_stay_on_one_server_and_servers_share_the_groups(server, client, prompts, pictures, sampling):
    requests = [request_for(prompts["text"], pictures, seed, group=str(seed // 4)) for seed in range(48)]
    with proxy_to(server) as (a, first), proxy_to(server) as (b, second):
        SglangClient([a, b], 12, 60).sample(requests, sampling, "first")
    assert first.generated + second.generated == 48 and min(first.generated, second.generated) >= 12
    assert first.generated % 4 == second.generated % 4 == 0


def test_weights_that_did_not_arrive_are_noticed(server, client, checkpoints, prompts, pictures, tmp_path):
    """A server that says it has loaded them and has not. The probe's log-probs do not change."""
    probe = request_for(prompts["plain"], pictures, 0)
    with proxy_to(server, "lies") as (liar, _):
        with pytest.raises(
            UserError, match="prompt plain has the same log-probs as with .*still runs the former weights"
        ):
            SglangClient([liar], 4, 60).update_weights(checkpoints.second, "second", probe)
    # controls: new weights pass; the same weights under another name do, too, because the files are the same
    assert client.update_weights(checkpoints.second, "second", probe) == 1
    copy = tmp_path / "copy"
    copy.symlink_to(checkpoints.second)
    assert client.update_weights(copy, "copy", probe) == 1
    # without a probe nothing would have been noticed
    with proxy_to(server, "lies") as (liar, _):
        assert SglangClient([liar], 4, 60).update_weights(checkpoints.first, "claimed") == 1


def test_a_stale_server_is_refused(server, client, checkpoints, requests, sampling, monkeypatch):
    """Somebody else loads other weights while samples are drawn."""
    monkeypatch.setattr(delivery, "RETRY_PAUSES_SECONDS", (0.1,))
    other = SglangClient([server], 1, 60)

    def meddle():
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as thread:
            thread.submit(other.update_weights, checkpoints.second, "somebody else's").result()

    with pytest.raises(UserError, match="answered with weights somebody else's, expected first"):
        client.sample(requests, sampling, "first", Seen(after=10, do=meddle))


def test_the_prompt_of_a_group_is_computed_once(server, checkpoints, prompts, pictures, sampling):
    """cached_prompt_tokens: all but the last token of each sample's prompt, which every request computes."""
    size = 6
    requests = [
        request_for(prompt, pictures, seed, group=prompt.id) for prompt in prompts.values() for seed in range(size)
    ]
    answers = {}
    for name, prefix_tokens in (("ahead", 1), ("not ahead", 10**6)):
        one = SglangClient([server], 24, 60, prefix_tokens=prefix_tokens)
        for checkpoint in (checkpoints.second, checkpoints.first):  # an update empties the cache
            one.update_weights(checkpoint, f"{name} {checkpoint.name}")
        answers[name] = [
            dataclasses.replace(got, weight_version="") for got in one.sample(requests, sampling, f"{name} first")
        ]
        assert one.traffic.prompt_tokens == size * sum(prompt.num_tokens for prompt in prompts.values())
        everything = one.traffic.prompt_tokens - len(requests)
        assert (one.traffic.cached_prompt_tokens == everything) == (name == "ahead")
    assert answers["ahead"] == answers["not ahead"]  # bit for bit


def test_early_stop_cancels_and_counts_the_rest(client, requests, sampling, undisturbed):
    long = dataclasses.replace(sampling, max_response_tokens=600)
    client.concurrency = 8
    seen = Seen()
    samples = client.sample(requests, long, "first", seen, enough=lambda: seen.total() >= 3)
    finished = [sample for sample in samples if sample is not None]
    traffic = client.traffic
    assert len(finished) == seen.total() == 3
    assert traffic.cancelled_running + traffic.cancelled_waiting + 3 == len(requests)
    assert (
        traffic.cancelled_waiting == len(requests) - 3 - traffic.cancelled_running > 0 and traffic.cancelled_tokens > 0
    )
    # the server is free again, and the aborted requests left nothing behind
    assert same(client.sample(requests, sampling, "first"), undisturbed)


def test_killed_in_mid_batch_and_started_again(
    server, server_dir, checkpoints, client, requests, sampling, undisturbed, capsys
):
    """The real thing: kill -9, a new server with the same weights, the same tokens, and nothing left of the old one."""
    config = load_config(DEMO_CONFIG)
    old = json.loads((server_dir / "server.json").read_text())["pid"]
    children = psutil.Process(old).children(recursive=True)
    seen = Seen(after=10, do=lambda: os.kill(old, signal.SIGKILL))
    supervised = SglangClient(
        [server],
        16,
        60,
        restart=lambda lost: sglang_server.restart(lost, checkpoints.first, config.server, config.model.dtype),
        limits=IMPATIENT,
    )
    supervised.update_weights(checkpoints.first, "first")
    assert same(supervised.sample(requests, sampling, "first", seen), undisturbed)
    assert each_once(seen, requests)
    traffic = supervised.traffic
    assert traffic.servers_lost == traffic.servers_restarted == 1 and traffic.resent > 0
    assert json.loads((server_dir / "server.json").read_text())["pid"] != old
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert f"SGLang server lost: {server.url} died" in capsys.readouterr().out
    assert supervised.weight_versions() == ["first"]
    # control: once more than max_restarts allows, and it is an error
    again = json.loads((server_dir / "server.json").read_text())["pid"]
    no_more = SglangClient(
        supervised.servers, 16, 60, restart=supervised.restart, limits=dataclasses.replace(IMPATIENT, max_restarts=0)
    )
    with pytest.raises(UserError, match=r"no SGLang server is left: .* died: run the stage again.*server.log ends: "):
        no_more.sample(requests, sampling, "first", Seen(after=5, do=lambda: os.kill(again, signal.SIGKILL)))
    status = run_module("tools.sglang_server", "status", "--server", server_dir)
    assert status.returncode == 1 and "no server is running" in status.stdout
    started = run_module(
        "tools.sglang_server", "start", "--server", server_dir, "--config", DEMO_CONFIG, "--model", checkpoints.first
    )
    assert started.returncode == 0, started.stderr
    assert (
        run_module("tools.sglang_server", "status", "--server", server_dir).returncode == 0
    )  # it outlives its starter

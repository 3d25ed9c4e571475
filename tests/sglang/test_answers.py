"""An answer is believed only if it is possible. A false server, HTTP and all, that samples by the seed alone."""

import json
from collections import Counter

import pytest

from megatron_papo.data.response_tokens import ResponseTokens
from megatron_papo.errors import UserError
from megatron_papo.run.records import Prompt
from megatron_papo.sglang import control, delivery, replicas
from megatron_papo.sglang import server as sglang_server
from megatron_papo.sglang.client import SglangClient
from megatron_papo.sglang.requests import Request, Sampling
from megatron_papo.sglang.sample_store import SampleStore
from tests.sglang.false_server import (
    CUT,
    END,
    ENDLESS,
    FORBIDDEN,
    LIMIT,
    VOCABULARY,
    false_server,
    http_answer,
    json_answer,
)

SAMPLING = Sampling(1.0, 1.0, -1, LIMIT, ResponseTokens(VOCABULARY, FORBIDDEN, frozenset({END})))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    for module in (delivery, control):
        monkeypatch.setattr(module, "RETRY_PAUSES_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(replicas, "UNREACHABLE_PAUSES_SECONDS", (0.01,))


def requests(count=12, picture="picture"):
    prompt = Prompt(id="p", problem="?", answer="1", token_ids=[5, 6, 7], num_tokens=3, images=["a.png"])
    return [Request(prompt, seed, lambda: [picture]) for seed in range(count)]


def changed(path, value):
    """A fault: the right answer with one thing changed."""

    def fault(number, answer):
        tree = json.loads(json.dumps(answer))
        *above, name = path
        place = tree
        for part in above:
            place = place[part]
        place[name] = value(place[name]) if callable(value) else value
        return json_answer(tree)

    return fault


def sampled(ids, log_probs=None, reason=None):
    """A fault: the right answer with these tokens."""

    def fault(number, answer):
        entries = [[-1.0, token, None] for token in ids] if log_probs is None else log_probs
        meta = {**answer["meta_info"], "output_token_logprobs": entries, "completion_tokens": len(ids)}
        meta["finish_reason"] = {"type": reason or ("stop" if ids and ids[-1] == END else "length")}
        return json_answer({"output_ids": ids, "meta_info": meta})

    return fault


def raw(content):
    return lambda number, answer: content


FIRST = ["meta_info", "output_token_logprobs", 0]
FAULTS = {
    "another request's id": changed(["meta_info", "id"], "other"),
    "no id": changed(["meta_info", "id"], None),
    "null as a log-prob": changed([*FIRST, 0], None),
    "NaN as a log-prob": changed([*FIRST, 0], float("nan")),
    "-inf as a log-prob": changed([*FIRST, 0], float("-inf")),
    "1e999 as a log-prob": lambda n, answer: http_answer(
        changed([*FIRST, 0], "HUGE")(n, answer).partition(b"\r\n\r\n")[2].replace(b'"HUGE"', b"-1e999")
    ),
    "+3.5": changed([*FIRST, 0], 3.5),
    "-1e300": changed([*FIRST, 0], -1e300),
    "a log-prob that is text": changed([*FIRST, 0], "-1.0"),
    "id 10^9": sampled([10**9, END]),
    "id -1": sampled([-1, END]),
    "id 10^30": sampled([10**30, END]),
    "id true": sampled([True, END]),
    "id beyond the vocabulary": sampled([VOCABULARY, END]),
    "a forbidden id": sampled([FORBIDDEN[0], END]),
    "no tokens": sampled([]),
    "too many tokens": sampled([5] * 5000),
    "one too many": sampled([5] * LIMIT + [END]),
    "stop without an end of turn": sampled([5, 6], reason="stop"),
    "an end of turn that is called length": sampled([5, END], reason="length"),
    "length before the limit": sampled([5, 6]),
    "tokens after the end of the turn": sampled([END, 5, END]),
    "abort": sampled([5, 6], reason="abort"),
    "a prompt of another length": changed(["meta_info", "prompt_tokens"], 4),
    "more cached than there are": changed(["meta_info", "cached_tokens"], 4),
    "another count": changed(["meta_info", "completion_tokens"], lambda count: count + 1),
    "fewer log-probs": changed(["meta_info", "output_token_logprobs"], lambda entries: entries[:-1]),
    "other tokens in the two places": changed(["output_ids"], lambda ids: [*ids[:-1], 7]),
    "other weights": changed(["meta_info", "weight_version"], "w"),
    "html": raw(http_answer(b"<html>welcome</html>")),
    "null": raw(json_answer(None)),
    "[]": raw(json_answer([])),
    "empty": raw(http_answer(b"")),
    "cut JSON": lambda n, answer: http_answer(json.dumps(answer).encode()[:-9]),
    "JSON nested deeply": raw(http_answer(b"[" * 100_000)),
    "a cut body": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nabc" + CUT),
    "302": raw(http_answer(b"", "302 Found", "Location: /health\r\n")),
    "204": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "206": raw(http_answer(b"{}", "206 Partial Content")),
    "429": raw(http_answer(b"slow down", "429 Too Many Requests")),
    "500": raw(http_answer(b"oops", "500 Internal Server Error")),
    "no HTTP": raw(b"220 smtp ready\r\n\r\n" + CUT),
    "gzip": raw(http_answer(b"\x1f\x8b\x08", headers="Content-Encoding: gzip\r\n")),
    "a length that is none": raw(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n" + CUT),
    "a body without end": raw(b"HTTP/1.1 200 OK\r\n\r\n" + ENDLESS),
    "cut at once": raw(CUT),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_impossible_answer_is_sent_again_and_then_one_line(name, tmp_path, capsys):
    with false_server() as (server, behind):
        undisturbed = SglangClient([server], 4, 5.0).sample(requests(), SAMPLING, "v")
        behind.bodies.clear()
        behind.fault = lambda number, answer: FAULTS[name](number, answer) if number == 3 else None
        client, seen = SglangClient([server], 4, 5.0), Counter()
        assert client.sample(requests(), SAMPLING, "v", lambda index, sample: seen.update([index])) == undisturbed
        assert seen == Counter(range(12)) and client.traffic.resent == 1 == len(behind.bodies) - 12
        # for ever: one line that names the prompt and the server, and what is finished is kept
        behind.bodies.clear()
        behind.fault = lambda number, answer: FAULTS[name](number, answer) if number >= 4 else None
        with SampleStore(tmp_path / "s", "float32") as store, pytest.raises(UserError) as caught:
            SglangClient([server], 1, 5.0).sample(requests(), SAMPLING, "v", store=store)
        [line] = str(caught.value).splitlines()
        assert line.startswith(f"prompt p: {server.url}: ") and "restart that server" in line and len(line) < 700
        behind.bodies.clear()
        behind.fault = raw(None)
        with SampleStore(tmp_path / "s", "float32") as store:
            assert SglangClient([server], 4, 5.0).sample(requests(), SAMPLING, "v", store=store) == undisturbed
        assert {body["sampling_params"]["sampling_seed"] for body in behind.bodies} == set(range(4, 12))


@pytest.mark.parametrize("late", [b"", b"\r\n"])
def test_one_surplus_answer_shifts_nothing(late):
    """A second answer on the same connection, at once or a moment later, belongs to nobody."""

    def twice(number, answer):
        return json_answer(answer) + late + json_answer(answer) if number == 2 else None

    with false_server() as (server, behind):
        undisturbed = SglangClient([server], 1, 5.0).sample(requests(60), SAMPLING, "v")
        behind.bodies.clear()
        behind.fault = twice
        assert SglangClient([server], 1, 5.0).sample(requests(60), SAMPLING, "v") == undisturbed


def test_what_the_server_refuses_is_final():
    with false_server() as (server, behind):
        behind.fault = raw(http_answer(b'{"error": "bad\x1b[2J\ntop_p"}', "400 Bad Request"))
        with pytest.raises(UserError) as caught:
            SglangClient([server], 1, 5.0).sample(requests(), SAMPLING, "v")
        assert len(behind.bodies) == 1 and "refused it: HTTP 400" in str(caught.value)
        assert str(caught.value).isprintable()  # what a server says is shown, not obeyed


@pytest.mark.parametrize("log_prob, kept", [(0.0, 0.0), (5e-5, 0.0), (-199.0, -199.0)])
def test_rounding_above_zero_is_zero(log_prob, kept):
    with false_server() as (server, behind):
        behind.fault = sampled([END], [[log_prob, END, None]])
        [sample] = SglangClient([server], 1, 5.0).sample(requests(1), SAMPLING, "v")
        assert sample.log_probs == [kept] and sample.finish_reason == "stop"


NO_ANSWERS = [http_answer(b"<html>"), json_answer(None), json_answer([]), json_answer({}), http_answer(b""), CUT]
NO_ANSWERS += [http_answer(b"", "302 Found"), http_answer(b"", "429 Slow"), b"HTTP/1.1 200 OK\r\n\r\n" + ENDLESS]


@pytest.mark.parametrize("path", ["/model_info", "/update_weights_from_disk", "/pause_generation", "/server_info"])
@pytest.mark.parametrize("wrong", NO_ANSWERS)
def test_control_calls_believe_no_less(path, wrong, tmp_path):
    with false_server() as (server, behind):
        client = SglangClient([server], 1, 5.0)
        assert client.update_weights(tmp_path, "w") == 1 and client.weight_versions() == ["w"]
        assert sglang_server.connect(server.url, None, "float32") == server
        behind.answers[path] = wrong
        with pytest.raises(UserError) as caught:
            if path == "/server_info":
                sglang_server.connect(server.url, None, "float32")
            else:
                client.update_weights(tmp_path, "x")
        assert len(str(caught.value).splitlines()) == 1 and server.url in str(caught.value)


def test_a_probe_of_another_request_is_not_believed(tmp_path):
    with false_server() as (server, behind):
        behind.fault = changed(["meta_info", "id"], "other")
        with pytest.raises(UserError, match="probe with prompt p: .* another request"):
            SglangClient([server], 1, 5.0).update_weights(tmp_path, "w", requests(1)[0])


def test_proxies_and_certificates_of_the_environment_are_not_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent/cacert.pem")
    with false_server() as (server, _):
        assert len(SglangClient([server], 4, 5.0).sample(requests(), SAMPLING, "v")) == 12
        assert sglang_server.connect(server.url, None) == server


@pytest.mark.parametrize(
    "where, urls",
    [
        ("http://a:1", ["http://a:1"]),
        (" HTTP://A:1/ , https://b:2/base/", ["http://A:1", "https://b:2/base"]),
        ("runs/demo/server", None),
        (" runs/demo/server", None),
    ],
)
def test_what_server_names(where, urls):
    assert sglang_server.urls_of(where) == urls


@pytest.mark.parametrize(
    "where",
    [
        "http://[::1",
        "http://",
        "http://a:99999",
        "http://a:b",
        "ftp://a",
        "dir,http://a:1",
        "http:/a",
        "",
        "http://u:p@a",
    ]
    + ["http://a b", "http://a:1?x"],
)
def test_what_server_cannot_name(where):
    with pytest.raises(UserError, match="^--server"):
        sglang_server.urls_of(where)

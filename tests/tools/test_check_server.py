"""tools.check_server with real servers: the right checkpoint passes, every other thing fails or is refused in one
line."""

import contextlib
import http.server
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace

import pytest

from megatron_papo.errors import UserError
from megatron_papo.sglang.client import SglangClient
from megatron_papo.sglang.server_record import Server
from megatron_papo.sglang.server_start import CPU_LAUNCHER, free_port, sglang_python
from tests.helpers import ROOT, command_of, run_module
from tools import check_server


@pytest.fixture
def key_file(server, tmp_path):
    (tmp_path / "key").write_text(f"{server.api_key}\n")
    return tmp_path / "key"


def arguments(server, hf, **changes) -> Namespace:
    given = dict(server=server.url, hf=hf, key_file=None, probe_update=False, scratch=None, device="cpu")
    return Namespace(**(given | changes))


def test_the_right_checkpoint_passes_and_its_pictures_follow_an_update(server, client, checkpoints, key_file, tmp_path):
    given = ["--server", server.url, "--key-file", key_file, "--hf", checkpoints.first, "--scratch", tmp_path]
    result = run_module("tools.check_server", *given, "--probe-update", "--json")
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    assert answers["passed"] is True and answers["problems"] == []
    # float32 on both sides: attention and sums in another order
    assert answers["log_probs"]["mean"] < 1e-5 and answers["log_probs"]["maximum"] < 1e-4
    assert answers["log_probs"]["tokens"] > 500
    assert answers["settings"]["version"] == "0.5.21" and answers["settings"]["dtype"] == "float32"
    probe = answers["probe"]
    assert probe["verdict"] == "follow" and probe["restored"] is True
    assert probe["from_new_weights"] < 1e-4 and probe["from_old_weights"] > 0.01 and probe["weights_move"] > 0.01
    assert client.weight_versions() == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_another_checkpoint_of_the_same_shape_fails(server, client, checkpoints, key_file, capsys):
    answers = check_server.check(arguments(server, checkpoints.second, key_file=key_file))
    assert answers.passed is False and answers.log_probs["mean"] > 0.1
    out = capsys.readouterr().out
    assert "failed: log-probs differ by" in out and "transformers" in out and ">>" in out
    with pytest.raises(UserError, match="could not be put back"):
        check_server.check(arguments(server, checkpoints.second, key_file=key_file, probe_update=True))
    assert client.weight_versions() == ["first"]


def test_interrupted_the_weights_are_put_back(server, client, checkpoints, key_file):
    given = ["--server", server.url, "--key-file", key_file, "--hf", checkpoints.first, "--probe-update"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command_of("tools.check_server", *given), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert any("loading other weights" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    assert status == 130
    assert client.weight_versions() == ["first"]
    assert check_server.check(arguments(server, checkpoints.first, key_file=key_file)).passed


def test_a_server_that_keeps_old_pictures_fails(checkpoints, tmp_path):
    """SGLang as it is: with its cache of vision tower outputs on."""
    from megatron_papo.config import ServerConfig

    server = Server(f"http://127.0.0.1:{free_port('127.0.0.1', 0)}", secrets.token_hex(8))
    command = [sglang_python(ServerConfig()), "-P", CPU_LAUNCHER, "--model-path", checkpoints.first]
    command += ["--port", server.url.rpartition(":")[2]]
    environment = {**os.environ, "SGLANG_VLM_CACHE_SIZE_MB": "100"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
    try:
        process.stdin.write(f"{server.api_key}\n".encode())
        process.stdin.close()
        (tmp_path / "key").write_text(server.api_key)
        deadline = time.monotonic() + 240
        while True:
            with contextlib.suppress(UserError):
                check_server.server_of(server.url, tmp_path / "key")
                break
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
            time.sleep(1)
        given = arguments(server, checkpoints.first, key_file=tmp_path / "key", probe_update=True)
        answers = check_server.check(given)
        assert answers.passed is False and answers.probe["verdict"] == "stale"
        assert any("SGLANG_VLM_CACHE_SIZE_MB=0" in problem for problem in answers.problems)
        assert answers.probe["restored"] is True
        assert SglangClient([server], 1, 60).weight_versions() == [answers.weight_version]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


class Stranger(http.server.BaseHTTPRequestHandler):
    """A web server of another kind: `answer` is what it says to everything."""

    answer = b"{}"

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def stranger(answer: bytes):
    handler = type("Handler", (Stranger,), {"answer": answer})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield Server(f"http://127.0.0.1:{running.server_port}")
        running.shutdown()


@pytest.mark.parametrize(
    "answer, problem",
    [
        (b"{}", "is no SGLang server, or one of another age"),
        (b"<html>", "is no SGLang server, or one of another age"),
        (json.dumps({"model_path": "m", "weight_version": "w", "model_type": "llama"}).encode(), "serves a llama"),
    ],
)
def test_another_kind_of_server(checkpoints, answer, problem):
    with stranger(answer) as server, pytest.raises(UserError, match=problem) as caught:
        check_server.check(arguments(server, checkpoints.first))
    assert len(str(caught.value).splitlines()) == 1


def test_bad_input_is_one_line(server, client, checkpoints, key_file, tmp_path, monkeypatch):
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    nobody = Server("http://127.0.0.1:9")
    for given, problem in (
        (arguments(nobody, checkpoints.first), "127.0.0.1:9: does not answer .*start SGLang there"),
        (arguments(server, checkpoints.first), "refuses the API key.*--key-file"),
        (arguments(server, checkpoints.first, key_file=tmp_path / "none"), "none: cannot be read.*--key-file"),
        (arguments(Server(str(tmp_path)), checkpoints.first), "expected the URL of one server"),
        (arguments(Server("http://a:1,http://b:1"), checkpoints.first), "expected the URL of one server"),
        (arguments(server, tmp_path, key_file=key_file), "config.json"),
        (arguments(server, checkpoints.first, key_file=key_file, device="gpu"), "--device gpu: no device of torch"),
        (arguments(server, checkpoints.first, key_file=key_file, device="cuda:99"), "cuda:99: torch sees no such GPU"),
        (arguments(server, checkpoints.first, scratch=tmp_path / "none"), "--scratch .*none: no directory"),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            check_server.check(given)
        assert len(str(caught.value).splitlines()) == 1
    result = subprocess.run(
        [sys.executable, "-m", "tools.check_server", "--server", nobody.url, "--hf", checkpoints.first],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stderr.startswith("error: http://127.0.0.1:9: does not answer")


def test_what_changes_numbers_is_said():
    """Control: a server as this pipeline starts it has nothing to remark."""
    ours = check_server.Settings(dtype="bfloat16", enable_deterministic_inference=True, kv_cache_dtype="auto")
    assert ours.remarks() == []
    for change, words in (
        ({"enable_deterministic_inference": False}, "ignores seeds"),
        ({"quantization": "fp8"}, "quantized"),
        ({"speculative_algorithm": "EAGLE"}, "speculative"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "KV cache"),
    ):
        [remark] = ours.model_copy(update=change).remarks()
        assert words in remark

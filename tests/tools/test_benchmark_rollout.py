"""tools.benchmark.rollout on the real server, and the connection that it is about; tools.plot.parity."""

import asyncio
import json
import ssl

import pytest

from megatron_papo.sglang.http_connection import HttpConnection
from tests.helpers import run_module


def test_benchmark(server, client, checkpoints):
    """A small one: that it drives both, counts right and ends in JSON. No number of tokens per second is asserted on a
    shared machine."""
    sizes = ["--prompts", 3, "--group-size", 4, "--tokens", 8, "--concurrency", 5, "--rounds", 1]
    command = ["--server", server.url, "--hf", checkpoints.first, *sizes]
    result = run_module("tools.benchmark.rollout", *command, env={"SGLANG_API_KEY": server.api_key})
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["tokens"] == 3 * 4 * 8 and answer["samples"] == 12
    assert answer["tokens_per_second"] > 0 and answer["raw_tokens_per_second"] > 0
    assert answer["overhead"] == pytest.approx(
        1 - answer["tokens_per_second"] / answer["raw_tokens_per_second"], abs=1e-3
    )
    missing = run_module("tools.benchmark.rollout", "--server", server.url)
    assert missing.returncode == 2 and "--hf" in missing.stderr


async def talk(answers: list[bytes], posts: int) -> tuple[list, int]:
    """What a connection makes of raw answers, and how many connections it took."""
    connections, remaining = 0, iter(answers)

    async def serve(reader, writer):
        nonlocal connections
        connections += 1
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(
                next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split(b":")[1]
            )
            assert json.loads(await reader.readexactly(length)) == {"a": "ü"} and b"X-Key: k" in head
            answer = next(remaining)
            if answer:
                writer.write(answer)
                await writer.drain()
            if answer is None or b"Content-Length: 9" in answer or b"close" in answer:
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    http = HttpConnection(0.3, 0.3, ssl.create_default_context())
    found = []
    for _ in range(posts):
        try:
            found.append(
                await http.post_json(
                    f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/generate",
                    json.dumps({"a": "ü"}).encode(),
                    {"X-Key": "k"},
                )
            )
        except (ConnectionError, TimeoutError) as error:
            found.append(type(error))
    http.close()
    server.close()
    return found, connections


def test_connection():
    ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
    chunked = b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"
    closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end"
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"
    noise = b"SMTP? close\r\n\r\n"
    silence = b""
    found, connections = asyncio.run(talk([ok, chunked, closing, cut, noise, None, silence, ok], 8))
    assert found == [
        (200, b"{}"),
        (503, b"abcde"),
        (200, b"until the end"),
        ConnectionError,
        ConnectionError,
        ConnectionError,
        TimeoutError,
        (200, b"{}"),
    ]
    assert connections == 6  # kept for the first three, another after each of the others

    async def nobody():
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        await HttpConnection(1.0, 1.0, ssl.create_default_context()).post_json(f"http://127.0.0.1:{port}/", b"{}", {})

    with pytest.raises(ConnectionError):
        asyncio.run(nobody())


def test_plot(tmp_path):
    from PIL import Image

    empty = run_module("tools.plot.parity", "--run", tmp_path)
    assert empty.returncode == 2 and "metrics.jsonl" in empty.stderr
    for iteration in (1, 2, 3):
        directory = tmp_path / "iterations" / f"{iteration:04d}" / "megatron"
        directory.mkdir(parents=True)
        lines = [
            {"step": 2 * iteration + step, "rollout_log_prob_difference_mean": 1e-3 * iteration * (1 + step)}
            for step in (0, 1)
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run_module("tools.plot.parity", "--run", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "3 iterations" in result.stdout and "of the last one: 0.003 nats" in result.stdout
    with Image.open(tmp_path / "parity.png") as picture:
        assert picture.width > 400 and len(picture.convert("RGB").getcolors(1 << 24)) > 10

"""Measure what the rollout client costs: tokens/s of SglangClient against a bare HTTP loop on the same server.

The two take turns.

    .venv/bin/python -m tools.benchmark.rollout [--server URL|DIR] [--hf DIR] [--prompts 32] [--group-size 8]
    [--tokens 64] [--concurrency 32] [--rounds 4]

Both send the same samples of the same seeds; the server's prefix cache is emptied before each pass, and the tokens that
come back must be the same. The bare loop has its request bodies ready as bytes, and `concurrency` threads that post
them and read JSON, nothing else: no checks, no health, no failover, no pictures to load, and no prompt computed ahead.
The client does all it does in stage 4, from pictures in memory on. Compared are all passes of each together: they take
turns, so that other work on the machine slows both down.

Without --server one is started with --hf, or with a tiny random model, and stopped again. The last line is a JSON
object: tokens_per_second, raw_tokens_per_second, overhead (1 - their ratio; negative where the client is faster), and
more.
"""

import argparse
import http.client
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run

if TYPE_CHECKING:
    from megatron_papo.sglang.client import SglangClient
    from megatron_papo.sglang.requests import Request, Sampling
    from megatron_papo.sglang.server_record import Server

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
MIN_PIXELS, MAX_PIXELS = 3136, 1003520
PICTURE = (224, 168)
SIZES = {"prompts": 32, "group-size": 8, "tokens": 64, "concurrency": 32, "rounds": 4}
"""Option -> default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--server", metavar="URL|DIR", help="a running server, or a server directory (default: start one)")
    add("--hf", type=Path, metavar="DIR", help="checkpoint that the server has or gets (default: a tiny random one)")
    config_help = "section server and model.dtype (default: configs/demo.yaml)"
    add("--config", type=Path, default=CONFIG, metavar="FILE", help=config_help)
    add("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    for name, default in SIZES.items():
        add(f"--{name}", type=int, default=default, metavar="N")
    arguments = parser.parse_args()
    from megatron_papo.sglang.server import urls_of

    if arguments.server and urls_of(arguments.server) and arguments.hf is None:
        raise UserError("--hf: missing: give the checkpoint that the server at --server holds")
    for name in SIZES:
        number = vars(arguments)[name.replace("-", "_")]
        if number < 1:
            raise UserError(f"--{name} {number}: must be at least 1")
    with tempfile.TemporaryDirectory(prefix="benchmark_rollout_") as work:
        answer = benchmark(arguments, Path(work))
    print(json.dumps(answer), flush=True)


def benchmark(arguments: argparse.Namespace, work: Path) -> dict[str, float | int]:
    """Measure client and bare loop, and return what is printed as JSON. work: for a server and a model."""
    from megatron_papo.sglang.client import SglangClient
    from megatron_papo.sglang.server import open_servers, stop_all

    config = load_config(arguments.config, arguments.overrides)
    hf = arguments.hf or tiny_model(work / "model")
    requests, sampling = requests_for(hf, arguments)
    try:
        servers = open_servers(arguments.server or str(work / "server"), hf, config.server, config.model.dtype)
        if len(servers) > 1:
            raise UserError("the bare loop drives one server: give one URL, or server.replicas=1")
        client = SglangClient(servers, arguments.concurrency, 600.0)
        timed = take_turns(client, requests, sampling, arguments.rounds)
    finally:
        if not arguments.server:
            stop_all(work / "server")
    ours, raw = (arguments.rounds * timed.tokens / seconds for seconds in (timed.client, timed.raw))
    print(f"client {ours:.0f} tokens/s, bare loop {raw:.0f} tokens/s: overhead {100 * (1 - ours / raw):.1f} %")
    return {
        "tokens_per_second": round(ours, 1),
        "raw_tokens_per_second": round(raw, 1),
        "overhead": round(1 - ours / raw, 4),
        "tokens": timed.tokens,
        "samples": len(requests),
        "concurrency": arguments.concurrency,
        "rounds": arguments.rounds,
        "cached_prompt_share": round(client.traffic.cached_prompt_tokens / client.traffic.prompt_tokens, 4),
    }


@dataclass(frozen=True)
class Timed:
    """Seconds of all passes together, and the tokens of one pass."""

    client: float
    raw: float
    tokens: int


def take_turns(client: "SglangClient", requests: list["Request"], sampling: "Sampling", rounds: int) -> Timed:
    """Send the requests by the client and by the bare loop, `rounds` times each; a first round warms up."""
    [server], [version] = client.servers, client.weight_versions()
    bodies = bodies_of(requests, sampling, version)
    seconds = {"client": 0.0, "raw": 0.0}
    tokens: list[list[int]] | None = None
    for number in range(rounds + 1):
        for driver in ("client", "raw") if number % 2 else ("raw", "client"):
            flush(server)
            started = time.monotonic()
            if driver == "client":
                samples = client.sample(requests, sampling, version)
                ids = [sample.token_ids for sample in samples if sample is not None]
            else:
                ids = bare_loop(server, bodies, client.concurrency, f"raw{number}")
            took = time.monotonic() - started
            if number:
                seconds[driver] += took
                print(f"round {number}, {driver}: {sum(map(len, ids)) / took:.0f} tokens/s", flush=True)
            if tokens is not None and ids != tokens:
                raise UserError(
                    "the same seeds gave other tokens: is the server started with --enable-deterministic-inference?"
                )
            tokens = ids
    return Timed(seconds["client"], seconds["raw"], sum(map(len, tokens or [])))


def tiny_model(directory: Path) -> Path:
    """Make a tiny random model and return its directory."""
    from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model

    make_tiny_model(directory, 1, TinySizes(initializer_range=0.15))
    return directory


def requests_for(hf: Path, arguments: argparse.Namespace) -> tuple[list["Request"], "Sampling"]:
    """Return group_size requests for each of `prompts` prompts with a picture of their own, and how to sample.

    No response ends before it has `tokens` tokens.
    """
    import numpy as np
    from PIL import Image

    from megatron_papo.data.chat import ChatFormat, RenderSettings
    from megatron_papo.data.response_tokens import response_tokens
    from megatron_papo.pictures.preprocess import PictureSettings, grid_of, num_image_tokens, resize, to_data_uri
    from megatron_papo.run.records import Prompt
    from megatron_papo.sglang.requests import Request, Sampling

    chat = ChatFormat(hf, RenderSettings("{problem}"))
    ids = chat.encode_prompt("What is shown here? First think, then answer.", 1)
    random = np.random.default_rng(3)
    size = arguments.group_size
    requests = []
    for number in range(arguments.prompts):
        noise = Image.fromarray(random.integers(0, 256, (*PICTURE[::-1], 3), dtype=np.uint8))
        picture = resize(noise, PictureSettings(MIN_PIXELS, MAX_PIXELS))
        length, images = len(ids) - 1 + num_image_tokens(grid_of(picture)), Loaded((to_data_uri(picture),))
        prompt = Prompt(id=str(number), problem="", answer="", token_ids=ids, num_tokens=length, images=[""])
        requests += [Request(prompt, number * size + sample, images, number, sample) for sample in range(size)]
    tokens = response_tokens(hf, chat.tokenizer.get_vocab())
    endless = replace(tokens, forbidden=tuple(sorted(tokens.ends | set(tokens.forbidden))))
    return requests, Sampling(1.0, 1.0, -1, arguments.tokens, endless)


@dataclass(frozen=True)
class Loaded:
    """Pictures that are in memory."""

    uris: Sequence[str]

    def __call__(self) -> Sequence[str]:
        return self.uris


def bodies_of(requests: list["Request"], sampling: "Sampling", version: str) -> list[bytes]:
    """Return the bodies of the requests, as JSON."""
    from megatron_papo.sglang.requests import build_request

    return [json.dumps(build_request(request, request.images(), sampling, version)).encode() for request in requests]


def bare_loop(server: "Server", bodies: list[bytes], concurrency: int, name: str) -> list[list[int]]:
    """Return the token ids of each body's answer.

    Args:
        server: which.
        bodies: of the requests.
        concurrency: threads that post.
        name: for an error message.
    """
    url = urlsplit(server.url)
    waiting, lock, failures = iter(enumerate(bodies)), threading.Lock(), []
    answers: dict[int, list[int]] = {}

    def post() -> None:
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=600)
        while True:
            with lock:
                index, body = next(waiting, (-1, b""))
            if index < 0:
                return connection.close()
            connection.request("POST", "/generate", body, {"Content-Type": "application/json", **server.headers})
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                failures.append(f"HTTP {response.status}: {content[:200]!r}")
                return
            answers[index] = json.loads(content)["output_ids"]

    threads = [threading.Thread(target=post) for _ in range(min(concurrency, len(bodies)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures or len(answers) < len(bodies):
        raise UserError(f"{name}: the server failed: {failures[0] if failures else 'a connection broke'}")
    return [answers[index] for index in range(len(bodies))]


def flush(server: "Server") -> None:
    """Empty the server's prefix cache."""
    from megatron_papo.sglang.http import Fault, Refused, anything, at_once

    try:
        at_once(lambda http: http.call(server, "/flush_cache?timeout=30", b"", believe=anything, timeout_seconds=60.0))
    except (Fault, Refused) as problem:
        raise UserError(f"{server.url}/flush_cache: {problem}: somebody else uses this server: measure when it is idle")


if __name__ == "__main__":
    run(main)

"""What the rollout client costs: tokens/s of SglangClient against the same server driven by a bare HTTP loop, in turns,
in one run.

    python -m tools.benchmark.rollout [--server URL|DIR] [--hf DIR] [--prompts 32] [--group-size 8] [--tokens 64]
    [--concurrency 32] [--rounds 4]

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
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run

if TYPE_CHECKING:
    from megatron_papo.sglang.requests import Request, Sampling

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
MIN_PIXELS, MAX_PIXELS = 3136, 1003520
PICTURE = (224, 168)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--server", metavar="URL|DIR", help="a running server, or a server directory (default: start one)"
    )
    parser.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="checkpoint whose weights the server has or gets (default: a tiny random one)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=CONFIG,
        metavar="FILE",
        help="server section and model.dtype (default: configs/demo.yaml)",
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    for name, default in (("prompts", 32), ("group-size", 8), ("tokens", 64), ("concurrency", 32), ("rounds", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    arguments = parser.parse_args()
    if arguments.server and arguments.server.startswith("http") and arguments.hf is None:
        raise UserError("--hf: missing: give the checkpoint that the server at --server holds")
    for name in ("prompts", "group_size", "tokens", "concurrency", "rounds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    with tempfile.TemporaryDirectory(prefix="benchmark_rollout_") as work:
        answer = benchmark(arguments, Path(work))
    print(json.dumps(answer), flush=True)


def benchmark(arguments, work: Path) -> dict:
    from megatron_papo.sglang import server as sglang_server
    from megatron_papo.sglang.client import SglangClient

    config = load_config(arguments.config, arguments.overrides)
    hf = arguments.hf or tiny_model(work / "model")
    requests, sampling = requests_for(hf, arguments)
    try:
        servers = sglang_server.open_servers(
            arguments.server or str(work / "server"), hf, config.server, config.model.dtype
        )
        if len(servers) > 1:
            raise UserError("the bare loop drives one server: give one URL, or server.replicas=1")
        client = SglangClient(servers, arguments.concurrency, 600.0)
        [version] = client.weight_versions()
        bodies = bodies_of(requests, sampling, version)
        seconds = {"client": [], "raw": []}
        tokens = None
        for number in range(arguments.rounds + 1):
            for driver in ("client", "raw") if number % 2 else ("raw", "client"):
                flush(servers[0])
                started = time.monotonic()
                if driver == "client":
                    ids = [sample.token_ids for sample in client.sample(requests, sampling, version)]
                else:
                    ids = bare_loop(servers[0], bodies, arguments.concurrency, f"raw{number}")
                if number:  # the first round warms up
                    seconds[driver].append(time.monotonic() - started)
                    print(
                        f"round {number}, {driver}: {sum(map(len, ids)) / seconds[driver][-1]:.0f} tokens/s", flush=True
                    )
                if tokens is not None and ids != tokens:
                    raise UserError(
                        "the same seeds gave other tokens: is the server started with --enable-deterministic-inference?"
                    )
                tokens = ids
    finally:
        if not arguments.server:
            sglang_server.stop_all(work / "server")
    count = sum(map(len, tokens))
    ours, raw = (arguments.rounds * count / sum(seconds[driver]) for driver in ("client", "raw"))
    print(f"client {ours:.0f} tokens/s, bare loop {raw:.0f} tokens/s: overhead {100 * (1 - ours / raw):.1f} %")
    return {
        "tokens_per_second": round(ours, 1),
        "raw_tokens_per_second": round(raw, 1),
        "overhead": round(1 - ours / raw, 4),
        "tokens": count,
        "samples": len(requests),
        "concurrency": arguments.concurrency,
        "rounds": arguments.rounds,
        "cached_prompt_share": round(client.traffic.cached_prompt_tokens / client.traffic.prompt_tokens, 4),
    }


def tiny_model(directory: Path) -> Path:
    from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model

    make_tiny_model(directory, 1, TinySizes(initializer_range=0.15))
    return directory


def requests_for(hf: Path, arguments) -> tuple["list[Request]", "Sampling"]:
    """group_size samples of each of `prompts` prompts with a picture of their own; none ends before `tokens` tokens."""
    import numpy as np
    from PIL import Image

    from megatron_papo.data.chat import ChatFormat, forbidden_tokens
    from megatron_papo.pictures.preprocess import grid_of, num_image_tokens, resize, to_data_uri
    from megatron_papo.run.records import Prompt
    from megatron_papo.sglang.requests import Request, Sampling

    chat = ChatFormat(hf, "{problem}", None)
    ids = chat.encode_prompt("What is shown here? First think, then answer.", 1)
    random = np.random.default_rng(3)
    requests = []
    for number in range(arguments.prompts):
        picture = resize(
            Image.fromarray(random.integers(0, 256, (*PICTURE[::-1], 3), dtype=np.uint8)), MIN_PIXELS, MAX_PIXELS
        )
        length, uris = len(ids) - 1 + num_image_tokens(grid_of(picture)), [to_data_uri(picture)]
        prompt = Prompt(id=str(number), problem="", answer="", token_ids=ids, num_tokens=length, images=[""])
        for sample in range(arguments.group_size):
            requests.append(
                Request(prompt, number * arguments.group_size + sample, lambda uris=uris: uris, str(number))
            )
    vocabulary = chat.tokenizer.get_vocab()
    endless = {*forbidden_tokens(hf, vocabulary), chat.end_of_turn, *filter(None, (vocabulary.get("<|endoftext|>"),))}
    return requests, Sampling(1.0, 1.0, -1, arguments.tokens, tuple(sorted(endless)))


def bodies_of(requests, sampling, version: str) -> list[bytes]:
    from megatron_papo.sglang.requests import build_request

    return [json.dumps(build_request(request, request.images(), sampling, version)).encode() for request in requests]


def bare_loop(server, bodies: list[bytes], concurrency: int, name: str) -> list[list[int]]:
    """Token ids of each body's answer."""
    url = urlsplit(server.url)
    waiting, lock, answers, failures = iter(enumerate(bodies)), threading.Lock(), [None] * len(bodies), []

    def post() -> None:
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=600)
        while True:
            with lock:
                index, body = next(waiting, (None, None))
            if body is None:
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
    if failures or None in answers:
        raise UserError(f"{name}: the server failed: {failures[0] if failures else 'a connection broke'}")
    return answers


def flush(server) -> None:
    """Empties the server's prefix cache."""
    import httpx

    answer = httpx.post(server.url + "/flush_cache?timeout=30", headers=server.headers, timeout=60, trust_env=False)
    if answer.status_code != 200:
        raise UserError(
            f"{server.url}/flush_cache: HTTP {answer.status_code}: somebody else uses this server: measure when it is"
            " idle"
        )


if __name__ == "__main__":
    run(main)

"""A server that speaks HTTP as SGLang does, samples by the seed alone, and answers what it is told to."""

import base64
import hashlib
import http.server
import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_papo.sglang.server_record import Server

VOCABULARY, FORBIDDEN, END = 448, (440, 441), 381
LIMIT = 12
Fault = Callable[[int, dict], bytes | None]
"""Given how many answers there were before, and the right one: the bytes to send in its place; None: the right one."""


def http_answer(content: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n{headers}\r\n".encode() + content


def json_answer(tree: object) -> bytes:
    return http_answer(json.dumps(tree).encode())


def image_tokens(picture: str) -> int:
    """Return how many tokens a resized picture makes, from the first bytes of its PNG."""
    width, height = struct.unpack(">II", base64.b64decode(picture.partition(",")[2][:64])[16:24])
    return width * height // 28**2


def right_answer(body: dict, version: str, chosen: list[int] | None = None) -> dict:
    """Return what a server would sample: tokens and log-probs that follow from the seed, up to the limit.

    chosen: the tokens, in place of those.
    """
    parameters = body["sampling_params"]
    digest = hashlib.sha256(f"{parameters['sampling_seed']} {body['extra_key']}".encode()).digest()
    limit = parameters["max_new_tokens"]
    ids = [100 + byte for byte in digest[1 : 1 + digest[0] % 9 + 1]]
    ids = [*(ids if chosen is None else chosen), END][:limit]
    entries = [[-token / 64, token, None] for token in ids]
    meta = {
        "id": body["rid"],
        "finish_reason": {"type": "stop", "matched": END} if ids[-1] == END else {"type": "length", "length": limit},
        "prompt_tokens": len(body["input_ids"])
        + sum(image_tokens(picture) - 1 for picture in body.get("image_data", []) if picture.startswith("data:")),
        "completion_tokens": len(ids),
        "cached_tokens": 0,
        "weight_version": version,
        "output_token_logprobs": entries,
        "input_token_logprobs": [[None, 5, None], [-len(version) - ord(version[0]) / 256, 6, None]],
        "e2e_latency": 0.1,
    }
    return {"text": "...", "output_ids": ids, "meta_info": meta}


class FalseServer:
    def __init__(self) -> None:
        self.fault: Fault = lambda number, answer: None
        """Of the answers of /generate."""
        self.answers: dict[str, bytes] = {}
        """Path -> what other calls get in place of their right answer."""
        self.bodies: list[dict] = []
        """What was asked of /generate."""
        self.version = "v"
        self.choose: Callable[[dict], list[int] | None] = lambda body: None
        """The tokens that a request gets, but for the end of the turn; None: some that follow from its seed."""

    def answer(self, path: str, body: dict) -> bytes:
        if path == "/generate":
            answer = right_answer(body, self.version, self.choose(body))
            wrong = self.fault(len(self.bodies), answer)
            self.bodies.append(body)
            return json_answer(answer) if wrong is None else wrong
        if path in self.answers:
            return self.answers[path]
        if path == "/update_weights_from_disk":
            self.version = body["weight_version"]
        right = {
            "/model_info": {"model_path": "/m", "weight_version": self.version, "is_generation": True},
            "/server_info": {"dtype": "float32", "enable_deterministic_inference": True, "tp_size": 1},
            "/update_weights_from_disk": {"success": True, "message": "done", "num_paused_requests": 0},
            "/pause_generation": {"status": "ok", "message": "paused"},
            "/continue_generation": {"status": "ok", "message": "continued"},
        }
        return json_answer(right[path]) if path in right else http_answer(b"")


@contextmanager
def false_server() -> Iterator[tuple[Server, FalseServer]]:
    """Yield the server as a client knows it, and what it does."""
    behind = FalseServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

        def reply(self, body: dict) -> None:
            with lock:
                answer = behind.answer(self.path.partition("?")[0], body)
            try:
                if answer.endswith(ENDLESS):
                    self.wfile.write(answer.removesuffix(ENDLESS))
                    while not over.is_set():
                        self.wfile.write(b" " * 65536)
                self.wfile.write(answer)
            except OSError:
                self.close_connection = True
            self.close_connection |= answer.endswith(CUT)

        def log_message(self, *arguments: object) -> None:
            pass

    class Listener(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    lock, over = threading.Lock(), threading.Event()
    with Listener(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield Server(f"http://127.0.0.1:{listener.server_port}"), behind
        finally:
            over.set()
            listener.shutdown()


ENDLESS, CUT = b"<endless>", b"<cut>"
"""At the end of an answer: blanks without end; the connection is cut."""

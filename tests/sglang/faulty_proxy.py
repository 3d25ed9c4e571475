"""A way to a real server on which things go wrong: everything is passed on, until it is told otherwise."""

import http.client
import http.server
import json
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

from megatron_papo.sglang.server_record import Server


class Proxy:
    """fault: None; "hangs": no answer any more; "dies": connections are cut and new ones refused; "lies": weights are
    not passed on, but said to be loaded; "503": /generate fails for a while.
    """

    def __init__(self, server: Server, fault: str | None = None, after: int = 0):
        self.target, self.fault, self.after = server, fault, after
        self.generated = 0
        self.claimed: str | None = None
        self.released = threading.Event()
        self.lock = threading.Lock()

    def is_faulty(self) -> bool:
        return self.generated > self.after

    def forward(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        target = urlsplit(self.target.url)
        connection = http.client.HTTPConnection(target.hostname, target.port, timeout=120)
        connection.request(method, path, body, {**self.target.headers, "Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, content


@contextmanager
def proxy_to(server: Server, fault: str | None = None, after: int = 0):
    """-> (Server to give to a client, its Proxy). after: so many /generate calls go well."""
    proxy = Proxy(server, fault, after)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.handle_with(b"")

        def do_POST(self):
            self.handle_with(self.rfile.read(int(self.headers["Content-Length"])))

        def handle_with(self, body: bytes):
            with proxy.lock:
                proxy.generated += self.path == "/generate"
            if proxy.fault == "hangs" and proxy.is_faulty():
                proxy.released.wait(60)
                self.close_connection = True
                return
            if proxy.fault == "dies" and proxy.is_faulty():
                self.close_connection = True
                return
            if proxy.fault == "503" and self.path == "/generate" and proxy.after < proxy.generated <= proxy.after + 3:
                return self.answer(503, b"busy")
            if proxy.fault == "lies" and self.path == "/update_weights_from_disk":
                proxy.claimed = json.loads(body)["weight_version"]
                return self.answer(200, b'{"success": true, "message": "of course"}')
            status, content = proxy.forward(self.command, self.path, body)
            if proxy.claimed and self.path == "/model_info":
                content = json.dumps({**json.loads(content), "weight_version": proxy.claimed}).encode()
            self.answer(status, content)

        def answer(self, status: int, content: bytes):
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *arguments):
            pass

    class Listener(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    with Listener(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{listener.server_port}", server.api_key), proxy
        finally:
            proxy.released.set()
            listener.shutdown()

"""A Hugging Face hub on loopback: the few calls by which huggingface_hub and datasets find and download files.

with serving({"models/Qwen/Tiny": directory, "datasets/me/rows": other}) as hub:
    run(..., env={"HF_ENDPOINT": hub.url})
"""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    url: str
    asked: list[str] = field(default_factory=list)
    """`METHOD path` of each request, in order."""
    downloads: list[str] = field(default_factory=list)
    """Names of the files whose content was asked for."""


@contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[Hub]:
    """Serve directories as repositories by their names, `models/OWNER/NAME` or `datasets/OWNER/NAME`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def do_POST(self):
            self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def answer(self, body: bytes = b""):
            parts = urlsplit(self.path)
            path, query = unquote(parts.path).strip("/"), parse_qs(parts.query)
            hub.asked.append(f"{self.command} {path}")
            for name, directory in repositories.items():
                if path == f"api/{name}" or path.startswith(f"api/{name}/"):
                    what = path.removeprefix(f"api/{name}").strip("/")
                    return self.send_json(described(name, directory, what, body, query))
                place = f"{name.removeprefix('models/')}/resolve/"
                if path.startswith(place):
                    return self.send_file(directory / path.removeprefix(place).partition("/")[2])
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def send_json(self, tree):
            if tree is None:
                return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

        def send_file(self, path: Path):
            if not path.is_file():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            content = path.read_bytes()
            if self.command == "GET":
                hub.downloads.append(path.name)
            self.send(200, content, {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": COMMIT})

        def send(self, status: int, content: bytes, headers: dict[str, str]):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def described(name: str, directory: Path, what: str, body: bytes, query: dict) -> object:
    """Return what the hub says of a repository: its commit, its files, or some of them."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    entries = {str(path.relative_to(directory)): entry(path, directory) for path in files}
    kind, _, rest = what.partition("/")
    if kind in ("", "revision"):
        siblings = [{"rfilename": file} for file in entries]
        return {"id": name.partition("/")[2], "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
    if kind == "tree":
        below = rest.partition("/")[2]
        return [found for file, found in entries.items() if not below or file.startswith(f"{below}/")] or None
    if kind == "paths-info":
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        return [entries[file] for file in wanted if file in entries]
    return None


def entry(path: Path, directory: Path) -> dict:
    """Return a file as a tree of the hub lists it."""
    content = path.read_bytes()
    return {"type": "file", "path": str(path.relative_to(directory)), "size": len(content), "oid": blob_id(content)}


def blob_id(content: bytes) -> str:
    """Return the name of a file's content in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

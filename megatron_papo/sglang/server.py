"""SGLang servers: start them, find them again, stop them. They outlive the stage that started them; iterations load
their weights into them.

A server directory holds server.json (url, key, process, what it was started with) and server.log; those of further
replicas are in replica_1, replica_2, ... below it, those on other nodes in node_NAME (nodes.py).
"""

import asyncio
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from megatron_papo.config import ServerConfig
from megatron_papo.errors import UserError
from megatron_papo.reading import in_short, shown
from megatron_papo.sglang import nodes
from megatron_papo.sglang.answers import ServerInfo, reader
from megatron_papo.sglang.http import Fault, Http, Refused, anything, at_once
from megatron_papo.sglang.server_health import HEALTH_TIMEOUT_SECONDS, problem_of
from megatron_papo.sglang.server_process import kill, process_of, stop
from megatron_papo.sglang.server_record import OwnedServer, Server, ServerRecord, read_record, replica_dir, write_record
from megatron_papo.sglang.server_start import Launch, start, wait_until_ready

MEMORY_TIMEOUT_SECONDS = 300.0
"""For a server to give up its GPU memory, or to get it back: some gigabytes are copied."""
IDLE_PAUSE_SECONDS = 0.2
RELEASED_OR_NOT = "was left while it gave up or took back its GPU memory"


def urls_of(where: str) -> list[str] | None:
    """Return the URLs that --server names, separated by commas; None if it names a directory.

    Raises UserError for what is neither.
    """
    parts = [part.strip() for part in where.split(",")]
    if not any("://" in part or part.lower().startswith(("http:", "https:")) for part in parts):
        if not where.strip():
            raise UserError("--server: is empty: name a directory, or the URL of a running server")
        return None
    return [_url(part) for part in parts]


def _url(text: str) -> str:
    problem = "expected http://HOST:PORT"
    try:
        parts = urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            if not (parts.username or parts.password or parts.query or parts.fragment) and " " not in text:
                return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    except ValueError as error:
        problem = in_short(error)
    without_secret = shown(re.sub("//[^/]*@", "//...@", text))
    raise UserError(f"--server {without_secret}: no address of a server ({problem}): http://HOST:PORT, or a directory")


def open_servers(where: str, model: Path, config: ServerConfig, dtype: str) -> Sequence[Server]:
    """Return the servers that --server names: running ones by their URLs, or those of a directory, which are started.

    Args:
        where: URLs (http..., separated by commas), or a server directory.
        model: checkpoint that a server is started with.
        config: how servers are started.
        dtype: in which they compute.
    """
    urls = urls_of(where)
    if urls is None:
        return connect_or_start_all(Path(where.strip()), model, config, dtype)
    if config.shares_gpus:
        raise UserError(
            "server.shares_gpus: is for servers that the stages start (--server DIR): whoever starts others manages"
            " their memory"
        )
    return [connect(url, os.environ.get("SGLANG_API_KEY"), dtype) for url in urls]


def connect(url: str, api_key: str | None, dtype: str | None = None) -> Server:
    """Return a server that somebody else started.

    Raises UserError if it does not answer, refuses the key or computes in another dtype.
    """
    server = Server(url, api_key)
    problem = problem_of(server)
    if problem:
        raise UserError(
            f"{server.url}: {problem}: start SGLang there, set SGLANG_API_KEY if it has a key, or give --server a"
            " directory"
        )
    try:
        read = reader(ServerInfo)
        info = at_once(
            lambda http: http.call(server, "/server_info", believe=read, timeout_seconds=HEALTH_TIMEOUT_SECONDS)
        )
    except (Fault, Refused) as problem:
        raise UserError(f"{server.url}/server_info: {problem}: is it a server of SGLang 0.5.21?")
    check_settings(server.url, info, dtype)
    return server


def check_settings(url: str, info: ServerInfo, dtype: str | None) -> None:
    """Check the settings of a foreign server that rollouts depend on, by its /server_info.

    Raises UserError for another dtype; a server that ignores seeds is spoken of.
    """
    if dtype is not None and info.dtype not in (dtype, "auto"):
        raise UserError(
            f"{url}: computes in {shown(info.dtype)}, model.dtype is {dtype}: start that server with --dtype {dtype}"
        )
    if not info.enable_deterministic_inference:
        print(
            f"{url}: runs without --enable-deterministic-inference: it ignores seeds, so its rollouts cannot be made"
            " again",
            flush=True,
        )


def connect_or_start_all(server_dir: Path, model: Path, config: ServerConfig, dtype: str) -> list[OwnedServer]:
    """Return config.replicas servers, on each node where SERVER_LAUNCHER is set; they are started where they do not
    run."""
    launcher = nodes.server_launcher()
    if launcher is not None:
        stop_here(server_dir)
        return nodes.connect_or_start(nodes.Wanted(server_dir, model, config, dtype, launcher))
    nodes.stop(server_dir)
    return connect_or_start_here(server_dir, model, config, dtype)


def connect_or_start_here(server_dir: Path, model: Path, config: ServerConfig, dtype: str) -> list[OwnedServer]:
    """Return config.replicas servers of this machine, started at the same time where they do not run.

    Further ones, of a former configuration, are stopped.
    """
    for directory in _replica_dirs(server_dir):
        if directory not in [replica_dir(server_dir, number) for number in range(config.replicas)]:
            stop(directory)
    with ThreadPoolExecutor(config.replicas) as threads:
        starting = [
            threads.submit(connect_or_start, server_dir, model, config, dtype, number)
            for number in range(config.replicas)
        ]
        return [future.result() for future in starting]


def _replica_dirs(server_dir: Path) -> list[Path]:
    return [server_dir, *sorted(server_dir.glob("replica_*"))]


def connect_or_start(server_dir: Path, model: Path, config: ServerConfig, dtype: str, replica: int = 0) -> OwnedServer:
    """Return a replica of a server directory; it is started if none runs that was started with the same settings.

    Args:
        server_dir: directory of the first replica.
        model: checkpoint that a new server is started with.
        config: how it is started.
        dtype: in which it computes.
        replica: its number, from 0.
    """
    launch = Launch(replica_dir(server_dir.resolve(), replica), replica, model.resolve(), config, dtype)
    record = read_record(launch.directory)
    process = process_of(record)
    if record is None or process is None:
        return start(launch)
    if record.settings == launch.settings and not record.lost:
        running = record.server(launch.directory, replica)
        if record.released:
            _resume_memory(running, record)
        if not record.ready:
            return wait_until_ready(launch, process, record)
        problem = RELEASED_OR_NOT if record.releasing else problem_of(running)
        if problem is None:
            return running
        print(f"{running.url}: {problem}: starting a new server", flush=True)
    stop(launch.directory)
    return start(launch)


def restart(lost: OwnedServer, model: Path, config: ServerConfig, dtype: str) -> OwnedServer:
    """Return a new server in the place of one that died or hangs; what is left of that is killed."""
    if lost.node is not None:
        return nodes.restart(lost, model.resolve(), config.start_timeout_seconds)
    kill(lost.directory)
    return start(Launch(lost.directory, lost.replica, model.resolve(), config, dtype))


def release_memory(servers: Sequence[Server]) -> None:
    """Have servers that the pipeline started give up their GPU memory until connect_or_start finds them again.

    What they still compute is aborted: SGLang ends where a server that is not idle is asked to release.
    """
    for server in servers:
        if isinstance(server, OwnedServer):
            record = read_record(server.directory)
            if record is None:
                raise UserError(f"{server.url}: its server.json is gone: run the stage again")
            if record.released:
                continue
            # SGLang does not say whether it has released, and ends when it is to resume what it holds.
            write_record(server.directory, record.but(releasing=True))
            _call_memory(server, "release_memory_occupation")
            write_record(server.directory, record.but(released=True))


def _resume_memory(server: OwnedServer, record: ServerRecord) -> None:
    write_record(server.directory, record.but(released=False, releasing=True))
    _call_memory(server, "resume_memory_occupation")
    write_record(server.directory, record.but(released=False))


def _call_memory(server: OwnedServer, call: str) -> None:
    """Have an idle server release its memory, or resume it. One that fails is stopped."""

    async def make_idle_and_call(http: Http) -> None:
        if call == "release_memory_occupation":
            await _make_idle(http, server)
        await http.call(server, f"/{call}", b"{}", believe=anything, timeout_seconds=MEMORY_TIMEOUT_SECONDS)

    try:
        at_once(make_idle_and_call)
    except (Fault, Refused) as problem:
        stop(server.directory)
        raise UserError(f"{server.url}: /{call} failed ({problem}): the server was stopped; run the stage again")


async def _make_idle(http: Http, server: Server) -> None:
    """Abort what a server computes and wait until nothing is left of it; its prefix cache is then empty.

    Raises Refused, with what the server says, after MEMORY_TIMEOUT_SECONDS.
    """
    every_request = b'{"abort_all": true}'
    await http.call(server, "/abort_request", every_request, believe=anything, timeout_seconds=HEALTH_TIMEOUT_SECONDS)
    deadline = time.monotonic() + MEMORY_TIMEOUT_SECONDS
    while True:
        try:
            await http.call(server, "/flush_cache", b"{}", believe=anything, timeout_seconds=HEALTH_TIMEOUT_SECONDS)
            return
        except Refused:  # it does so while requests are left
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(IDLE_PAUSE_SECONDS)


def stop_all(server_dir: Path) -> int:
    """End all servers of a server directory, on all nodes. Returns how many were running."""
    return nodes.stop(server_dir) + stop_here(server_dir)


def stop_here(server_dir: Path) -> int:
    """End the servers that run on this machine. Returns how many were running."""
    return sum(stop(directory) for directory in _replica_dirs(server_dir))


def status(server_dir: Path) -> list[tuple[bool, str]]:
    """Return, for each server of a server directory, whether it can be used and a line that says so."""
    record = nodes.read_nodes(server_dir)
    if record is not None:
        return nodes.status(server_dir, record)
    return [_status(directory) for directory in _replica_dirs(server_dir)]


def _status(directory: Path) -> tuple[bool, str]:
    record = read_record(directory)
    process = process_of(record)
    if record is None or process is None:
        return False, f"{directory}: no server is running"
    what = f"{directory}: process {process.pid} at {record.url}"
    if record.releasing:
        return False, f"{what} {RELEASED_OR_NOT}: the next stage starts it again"
    if record.released:
        return True, f"{what} has given up its GPU memory until a stage wants it"
    problem = problem_of(Server(record.url, record.api_key))
    return (True, f"{what} is healthy") if problem is None else (False, f"{what}: {problem}")

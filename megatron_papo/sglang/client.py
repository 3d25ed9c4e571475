"""SGLang over HTTP: many requests at once to one or several servers, and new weights into all of them.

No request is lost, and none is counted twice: each has one place in the result, is sent again when its server fails
(the same seed, so the same tokens), and only one answer to it is ever read. HTTP 4xx is our own mistake and ends it
all.
"""

import asyncio
import json
import secrets
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from megatron_papo.errors import UserError
from megatron_papo.sglang.http_connection import HttpConnection
from megatron_papo.sglang.replicas import HealthLimits, Replica, Replicas, ServerLost
from megatron_papo.sglang.requests import (
    Request,
    Sample,
    Sampling,
    build_request,
    encode,
    parse_answer,
    parse_probe,
    prefix_request,
    probe_request,
)
from megatron_papo.sglang.server import Server, log_tail

RETRY_PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)
CONNECT_TIMEOUT_SECONDS = 10.0
PREFIX_TOKENS = 128
"""The prompt of a group is computed ahead of its samples if it is at least so long; a shorter one is not worth a
request."""
ABORT_SECONDS = 10.0
"""How long cancelled requests get to say how far they had come."""


@dataclass
class Traffic:
    """What became of the requests of one call of SglangClient.sample."""

    resent: int = 0
    """Attempts beyond the first."""
    servers_lost: int = 0
    servers_restarted: int = 0
    cancelled_running: int = 0
    cancelled_waiting: int = 0
    """Never sent."""
    cancelled_tokens: int = 0
    """Sampled for requests that were then cancelled."""
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Of those, how many the server had not to compute again."""

    def add(self, other: "Traffic") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class _Batch:
    """One call of SglangClient.sample."""

    name: str
    """Unique among all calls of all clients: a server refuses two requests of the same rid."""
    requests: Sequence[Request]
    sampling: Sampling
    weight_version: str
    on_sample: Callable[[int, Sample], None]
    enough: Callable[[], bool]
    replicas: Replicas
    samples: list[Sample | None]
    group_sizes: dict[Hashable, int]
    traffic: Traffic = field(default_factory=Traffic)
    prefixes: dict[tuple[Hashable, Replica], asyncio.Task] = field(default_factory=dict)
    under_way: dict[str, Replica] = field(default_factory=dict)
    """rid -> where it runs."""
    stopped: asyncio.Event = field(default_factory=asyncio.Event)


class SglangClient:
    """Requests to servers that hold the same weights, at most `concurrency` under way at once, each with a finite
    timeout.

    restart: starts a lost server of this pipeline again (blocking); without it, lost servers are done without.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        concurrency: int,
        timeout_seconds: float,
        *,
        restart: Callable[[Server], Server] | None = None,
        limits: HealthLimits = HealthLimits(),
        prefix_tokens: int = PREFIX_TOKENS,
    ):
        self.servers = list(servers)
        self.concurrency = concurrency
        self.timeout_seconds = timeout_seconds
        self.restart = restart
        self.limits = limits
        self.prefix_tokens = prefix_tokens
        self.traffic = Traffic()
        """Of all calls of sample."""
        self.running = 0
        """Requests under way now."""
        # A server may still be busy with the requests of a client that was killed, and refuses a second one of the same
        # name.
        self._nonce = secrets.token_hex(4)
        self._batches = 0
        self._weights: tuple[Path, str] | None = None
        self._ssl_context = httpx.create_ssl_context()

    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        weight_version: str,
        on_sample: Callable[[int, Sample], None] = lambda index, sample: None,
        enough: Callable[[], bool] = lambda: False,
    ) -> list[Sample | None]:
        """One Sample per request, in order; on_sample(index, sample) as they come. The first error ends it all.

        enough: asked after each sample; once it says True the other requests are cancelled, and their places hold None.
        """
        return asyncio.run(self._sample_all(requests, sampling, weight_version, on_sample, enough))

    async def _sample_all(self, requests, sampling, weight_version, on_sample, enough) -> list[Sample | None]:
        sizes: dict[Hashable, int] = {}
        for request in requests:
            sizes[request.group] = sizes.get(request.group, 0) + 1
        async with self._http() as control:
            replicas = Replicas(
                self.servers,
                control,
                self.limits,
                self._replace if self.restart else None,
            )
            none_yet = [None] * len(requests)
            batch = _Batch(
                self._batch_name(), requests, sampling, weight_version, on_sample, enough, replicas, none_yet, sizes
            )
            waiting = iter(enumerate(requests))
            try:
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(replicas.watch())
                    workers = [
                        tasks.create_task(self._work(batch, waiting))
                        for _ in range(min(self.concurrency, len(requests)))
                    ]
                    stop = tasks.create_task(self._stop_when_enough(batch, control, workers))
                    await asyncio.wait(workers)
                    stop.cancel()
                    watch.cancel()
                await replicas.finish()
            except BaseExceptionGroup as group:
                raise group.exceptions[0]
            finally:
                self.running = 0
            batch.traffic.cancelled_waiting = sum(1 for _ in waiting)
            batch.traffic.servers_lost, batch.traffic.servers_restarted = replicas.lost, replicas.restarts
            self.traffic.add(batch.traffic)
        return batch.samples

    def _batch_name(self) -> str:
        self._batches += 1
        return f"{self._nonce}-{self._batches}"

    async def _work(self, batch: _Batch, waiting) -> None:
        """Sends one request after the other."""
        http = HttpConnection(self.timeout_seconds, CONNECT_TIMEOUT_SECONDS, self._ssl_context)
        try:
            for index, request in waiting:
                images = await asyncio.to_thread(request.images)
                body = build_request(request, images, batch.sampling, batch.weight_version)
                self.running += 1
                answer = await self._generate(batch, http, index, body)
                self.running -= 1
                if batch.stopped.is_set():
                    batch.traffic.cancelled_running += 1
                    batch.traffic.cancelled_tokens += 0 if answer is None else answer["meta_info"]["completion_tokens"]
                    return
                sample = batch.samples[index] = parse_answer(answer, request, batch.sampling, batch.weight_version)
                batch.traffic.prompt_tokens += answer["meta_info"]["prompt_tokens"]
                batch.traffic.cached_prompt_tokens += answer["meta_info"]["cached_tokens"]
                batch.on_sample(index, sample)
                if batch.enough():
                    batch.stopped.set()
                    return
        finally:
            http.close()

    async def _generate(self, batch: _Batch, http: HttpConnection, index: int, body: dict) -> dict | None:
        """The answer of the first server that gives one; None where the batch has been stopped before."""
        request = batch.requests[index]
        what, attempt, timeouts, pauses = f"prompt {request.prompt.id}", 0, 0, iter(RETRY_PAUSES_SECONDS)
        while not batch.stopped.is_set():
            replica = await batch.replicas.take(request.group)
            rid = f"{batch.name}-{index}-{attempt}"
            batch.under_way[rid] = replica
            replica.under_way += 1
            try:
                await self._prefix(batch, http, replica, request, body)
                status, content = await self._send(http, replica, {**body, "rid": rid})
            except ServerLost:
                problem = None
            except TimeoutError:
                problem = f"no answer within rollout.request_timeout_seconds = {self.timeout_seconds:g}"
                timeouts += 1
            except ConnectionError as error:
                problem = f"not reachable ({error})"
            else:
                if status < 400:
                    return json.loads(content)
                problem = f"HTTP {status}: {content[:300].decode(errors='replace')}"
                if status < 500:
                    raise UserError(f"{what}: {replica.server.url}/generate refused it: {problem}")
            finally:
                replica.under_way -= 1
                del batch.under_way[rid]
            attempt += 1
            batch.traffic.resent += 1
            if problem is None or not await batch.replicas.examine(replica):
                continue  # that server is lost: another one, at once
            pause = next(pauses, None)
            if timeouts == 2 or pause is None:
                raise UserError(f"{what}: {replica.server.url} {problem}: {advice(replica.server)}")
            await asyncio.sleep(pause)
        return None

    async def _prefix(
        self, batch: _Batch, http: HttpConnection, replica: Replica, request: Request, body: dict
    ) -> None:
        """Has the prompt of a group computed once, by the first of its requests; the others wait for that.

        SGLang's prefix cache knows a prompt only when it has been computed: samples of a group that arrive together
        each compute it, and its pictures, for themselves. A failure here is left to the requests themselves.
        """
        alone = request.group is None or batch.group_sizes[request.group] == 1
        if alone or request.prompt.num_tokens < self.prefix_tokens:
            return
        key = (request.group, replica)
        if key not in batch.prefixes:
            rid = f"{batch.name}-prefix-{len(batch.prefixes)}"
            batch.prefixes[key] = asyncio.create_task(
                self._send_quietly(http, replica, {**prefix_request(body), "rid": rid})
            )
        await asyncio.shield(batch.prefixes[key])

    async def _send_quietly(self, http: HttpConnection, replica: Replica, body: dict) -> None:
        with suppress(ServerLost, ConnectionError, TimeoutError):
            await self._send(http, replica, body)

    async def _send(self, http: HttpConnection, replica: Replica, body: dict) -> tuple[int, bytes]:
        """POST /generate. Raises ServerLost as soon as the server is known to be lost, however long it would keep the
        connection."""
        post = asyncio.ensure_future(
            http.post_json(replica.server.url + "/generate", encode(body), replica.server.headers)
        )
        try:
            await asyncio.wait((post, replica.lost), return_when=asyncio.FIRST_COMPLETED)
            if not post.done():
                raise ServerLost
            return post.result()
        finally:
            post.cancel()

    async def _stop_when_enough(self, batch: _Batch, http: httpx.AsyncClient, workers: list[asyncio.Task]) -> None:
        """Once the batch is stopped, aborts what is under way; what has not answered after ABORT_SECONDS is left to
        itself."""
        await batch.stopped.wait()
        aborts = [
            self._post(http, replica.server, "/abort_request", {"rid": rid}, "abort", read=False)
            for rid, replica in list(batch.under_way.items())
        ]
        await asyncio.gather(*aborts, return_exceptions=True)
        await asyncio.wait(workers, timeout=ABORT_SECONDS)
        for worker in workers:
            if not worker.done():
                batch.traffic.cancelled_running += 1
                worker.cancel()

    async def _replace(self, server: Server) -> Server:
        """A new server in the place of a lost one, with the weights of the last update."""
        started = await asyncio.to_thread(self.restart, server)
        if self._weights is not None:
            async with self._http() as http:
                await self._load(http, started, *self._weights)
        self.servers[self.servers.index(server)] = started
        return started

    def update_weights(self, hf_dir: Path, weight_version: str, probe: Request | None = None) -> int:
        """Loads the checkpoint in hf_dir, which the caller has verified, into all servers. -> how many had not that
        version already.

        Requests under way are put back and go on with the new weights (pause_generation "retract"); this protocol does
        not wait for the lock that a stuck request would hold. probe: a prompt whose own log-probs must change with the
        weights; UserError if the server says that it has loaded other files and they do not.
        """
        self._weights = (Path(hf_dir).resolve(), weight_version)
        return asyncio.run(self._update_all(probe))

    async def _update_all(self, probe: Request | None) -> int:
        hf_dir, version = self._weights
        async with self._http() as http:
            done = await asyncio.gather(
                *(self._load(http, server, hf_dir, version, probe) for server in self.servers), return_exceptions=True
            )
        for one in done:
            if isinstance(one, BaseException):
                raise one
        return sum(done)

    async def _load(
        self, http: httpx.AsyncClient, server: Server, hf_dir: Path, version: str, probe: Request | None = None
    ) -> bool:
        before = await self._model_info(http, server)
        if before["weight_version"] == version:
            return False
        seen_before = None if probe is None else await self._probe(http, server, probe, before["weight_version"])
        await self._post(http, server, "/pause_generation", {"mode": "retract"}, "pause")
        try:
            body = {"model_path": str(hf_dir), "weight_version": version, "flush_cache": True}
            answer = await self._post(http, server, "/update_weights_from_disk", body, f"weights {hf_dir}")
            if not answer["success"]:
                raise UserError(f"{hf_dir}: the server could not load it: {answer['message']}")
            found = (await self._model_info(http, server))["weight_version"]
            if found != version:
                raise UserError(f"{server.url}: says its weights are {found} after loading {version}: {advice(server)}")
        finally:
            await self._post(http, server, "/continue_generation", {}, "continue")
        if probe is not None and await self._probe(http, server, probe, version) == seen_before:
            if not same_weight_files(Path(before["model_path"]), hf_dir):
                raise UserError(
                    f"{server.url}: says that it has loaded {hf_dir}, but prompt {probe.prompt.id} has the same"
                    " log-probs as with"
                    f" {before['model_path']}: it still runs the former weights: {advice(server)}"
                )
        return True

    async def _probe(self, http: httpx.AsyncClient, server: Server, probe: Request, version: str) -> list[float]:
        body = probe_request(probe, await asyncio.to_thread(probe.images), version)
        return parse_probe(await self._post(http, server, "/generate", body, f"probe with prompt {probe.prompt.id}"))

    def weight_versions(self) -> list[str]:
        """What each server says its weights are."""

        async def ask() -> list[str]:
            async with self._http() as http:
                return [(await self._model_info(http, server))["weight_version"] for server in self.servers]

        return asyncio.run(ask())

    async def _model_info(self, http: httpx.AsyncClient, server: Server) -> dict:
        return await self._call(http, server, "GET", "/model_info", None, "model_info")

    async def _post(
        self, http: httpx.AsyncClient, server: Server, path: str, body: dict, what: str, read: bool = True
    ) -> dict | None:
        return await self._call(http, server, "POST", path, body, what, read)

    async def _call(
        self,
        http: httpx.AsyncClient,
        server: Server,
        method: str,
        path: str,
        body: dict | None,
        what: str,
        read: bool = True,
    ):
        """A control call. Tries again after connection errors and HTTP 5xx; a 4xx is our mistake and final."""
        for pause in (*RETRY_PAUSES_SECONDS, None):
            try:
                response = await http.request(method, server.url + path, json=body, headers=server.headers)
            except httpx.TimeoutException as error:
                raise UserError(f"{what}: no answer from {server.url} ({type(error).__name__}): {advice(server)}")
            except httpx.TransportError as error:
                problem = f"not reachable ({type(error).__name__})"
            else:
                if response.status_code < 400:
                    return response.json() if read else None
                problem = f"HTTP {response.status_code}: {response.text[:300]}"
                if response.status_code < 500:
                    raise UserError(f"{what}: {server.url}{path} refused it: {problem}")
            if pause is not None:
                await asyncio.sleep(pause)
        raise UserError(f"{what}: {server.url} {problem}: {advice(server)}")

    def _http(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(self.timeout_seconds, connect=CONNECT_TIMEOUT_SECONDS)
        return httpx.AsyncClient(timeout=timeout, verify=self._ssl_context, trust_env=False)


def same_weight_files(first: Path, second: Path) -> bool:
    """Whether the safetensors of two checkpoints hold the same bytes; False where one cannot be read any more."""
    from megatron_papo.run.stage_output import file_hash

    def hashes(directory: Path) -> dict[str, str]:
        return {file.name: file_hash(file) for file in sorted(directory.glob("*.safetensors"))}

    return bool(found := hashes(first)) and found == hashes(second)


def advice(server: Server) -> str:
    """What to do about a server that fails, for the end of an error message."""
    if server.directory is None:
        return "restart that server, or give --server a directory to have one started"
    tail = log_tail(server.directory, 10)
    command = f"python -m tools.sglang_server start --server {server.directory} --config FILE --model HF_DIR"
    again = f"start it again with: {command}"
    return f"{again} (the stages do so by themselves); {server.directory}/server.log ends:\n{tail}"

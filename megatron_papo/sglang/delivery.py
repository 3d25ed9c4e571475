"""One batch of requests on its way to the servers: sent, sent again, answered or cancelled.

No request is lost, and none is counted twice: each has one place in the result, is sent again when its server fails or
answers something that cannot be believed (the same seed, so the same tokens), and only one answer to it is ever
believed. What the server refuses (HTTP 4xx) is our own mistake and ends it all; what is finished by then is in the
store.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from megatron_papo.errors import UserError
from megatron_papo.reading import shown
from megatron_papo.sglang.answers import Generated, Sample, read_generated, read_prefix, sample_of
from megatron_papo.sglang.control import BYTES_PER_TOKEN, RETRY_PAUSES_SECONDS, Control, advice
from megatron_papo.sglang.http import CONTROL_BYTES, Fault, Http, Refused, TimedOut
from megatron_papo.sglang.replicas import Replica, Replicas, ServerLost
from megatron_papo.sglang.requests import Request, Sampling, build_request, encode, prefix_request
from megatron_papo.sglang.sample_store import SampleStore

ABORT_SECONDS = 10.0
"""How long cancelled requests get to say how far they had come."""
Answer = TypeVar("Answer")


@dataclass
class Traffic:
    """What became of the requests."""

    stored: int = 0
    """Samples that an attempt before this one had kept: nothing was sent for them."""
    stored_tokens: int = 0
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
    """How many of the prompt tokens the server did not have to compute again."""

    def add(self, other: "Traffic") -> None:
        """Add the counts of another to these."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Batch:
    """The requests of one call of SglangClient.sample."""

    name: str
    """Unique among all batches of all clients: a server refuses a second request of the same rid."""
    requests: Sequence[Request]
    sampling: Sampling
    weight_version: str
    on_sample: Callable[[int, Sample], None]
    """Called with the index of a request and its sample, as they come."""
    enough: Callable[[], bool]
    """Asked after each sample; once it says True the other requests are cancelled."""
    store: SampleStore | None = None
    """Where finished samples are kept."""


@dataclass(frozen=True)
class Limits:
    """Of the requests of a client."""

    concurrency: int
    """Requests under way at once."""
    timeout_seconds: float
    """For one answer."""
    prefix_tokens: int
    """The prompt of a group is computed ahead of its samples if it is at least so long."""


class Delivery:
    """A batch on its way, in one event loop."""

    def __init__(
        self,
        batch: Batch,
        limits: Limits,
        http: Http,
        *,
        replicas: Replicas,
        control: Control,
    ):
        """
        Args:
            batch: what to send.
            limits: how much at once, how long.
            http: the way to the servers.
            replicas: the servers.
            control: for the end of requests that are cancelled.
        """
        self.batch, self.limits, self.http, self.replicas, self.control = batch, limits, http, replicas, control
        self.samples: list[Sample | None] = [None] * len(batch.requests)
        self.traffic = Traffic()
        self.running = 0
        """Requests under way now."""
        self._group_sizes = Counter(request.group for request in batch.requests)
        self._waiting = iter(enumerate(batch.requests))
        self._prefixes: dict[tuple[Hashable, Replica], asyncio.Task] = {}
        self._under_way: dict[str, Replica] = {}
        """rid -> where it runs."""
        self._stopped = asyncio.Event()
        self._most_bytes = CONTROL_BYTES + BYTES_PER_TOKEN * batch.sampling.max_response_tokens

    async def run(self) -> None:
        """Send the requests and fill `samples` and `traffic`. The first error ends it all."""
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self.replicas.watch())
                number = min(self.limits.concurrency, len(self.batch.requests))
                workers = [tasks.create_task(self._work(self._waiting)) for _ in range(number)]
                stop = tasks.create_task(self._stop_when_enough(workers))
                await asyncio.wait(workers)
                stop.cancel()
                watch.cancel()
            await self.replicas.finish()
        except BaseExceptionGroup as group:
            raise group.exceptions[0]
        finally:
            self.running = 0
        self.traffic.cancelled_waiting = sum(1 for _ in self._waiting)
        self.traffic.servers_lost, self.traffic.servers_restarted = self.replicas.lost, self.replicas.restarts

    async def _work(self, waiting: Iterator[tuple[int, Request]]) -> None:
        """Send one request after the other."""
        batch = self.batch
        for index, request in waiting:
            images = await asyncio.to_thread(request.images)
            body = build_request(request, images, batch.sampling, batch.weight_version)
            sample = await self._sample(index, body)
            if sample is None:
                return
            self.samples[index] = sample
            batch.on_sample(index, sample)
            if batch.enough():
                self._stopped.set()
                return

    async def _sample(self, index: int, body: dict) -> Sample | None:
        """Return a request's sample, from the store or from a server; None if the batch has been stopped before."""
        batch, request, store = self.batch, self.batch.requests[index], self.batch.store
        key = "" if store is None else store.key(request, body)
        kept = None if store is None else store.find(key, batch.sampling, batch.weight_version)
        if kept is not None and not self._stopped.is_set():
            self.traffic.stored += 1
            self.traffic.stored_tokens += kept.num_tokens
            return kept
        self.running += 1
        sample = await self._generate(index, body)
        self.running -= 1
        if store is not None and sample is not None:
            store.add(key, sample)
        return sample

    async def _generate(self, index: int, body: dict) -> Sample | None:
        """Return the first answer that can be believed; None if the batch has been stopped before."""
        batch, request = self.batch, self.batch.requests[index]
        what, attempt, timeouts, pauses = f"prompt {shown(request.prompt.id)}", 0, 0, iter(RETRY_PAUSES_SECONDS)
        while not self._stopped.is_set():
            replica = await self.replicas.take(request.group)
            rid = f"{batch.name}-{index}-{attempt}"
            self._under_way[rid] = replica
            replica.under_way += 1
            problem: str | None
            try:
                await self._prefix(replica, request, body)
                answer = await self._send(replica, {**body, "rid": rid}, partial(read_generated, rid=rid))
                if self._stopped.is_set():
                    self.traffic.cancelled_tokens += answer.meta_info.completion_tokens
                    break
                sample = sample_of(answer, request, batch.sampling, batch.weight_version)
                self._count(answer)
                return sample
            except ServerLost:
                problem = None
            except TimedOut:
                problem = f"no answer within rollout.request_timeout_seconds = {self.limits.timeout_seconds:g}"
                timeouts += 1
            except Refused as refused:
                raise UserError(f"{what}: {replica.server.url}/generate refused it: {refused}")
            except Fault as fault:
                problem = str(fault)
            finally:
                replica.under_way -= 1
                del self._under_way[rid]
            attempt += 1
            self.traffic.resent += 1
            if problem is None or not await self.replicas.examine(replica):
                continue  # that server is lost: another server gets it, at once
            pause = next(pauses, None)
            if timeouts == 2 or pause is None:
                raise UserError(f"{what}: {replica.server.url}: {problem}: {advice(replica.server)}")
            await asyncio.sleep(pause)
        self.traffic.cancelled_running += 1
        return None

    def _count(self, answer: Generated) -> None:
        self.traffic.prompt_tokens += answer.meta_info.prompt_tokens
        self.traffic.cached_prompt_tokens += answer.meta_info.cached_tokens

    async def _prefix(self, replica: Replica, request: Request, body: dict) -> None:
        """Have the prompt of a group computed once, by the first of its requests; the others wait for that.

        SGLang's prefix cache knows a prompt only when it has been computed: samples of a group that arrive together
        each compute it, and its pictures, for themselves. A failure here is left to the requests themselves.
        """
        single = request.group is None or self._group_sizes[request.group] == 1
        if single or request.prompt.num_tokens < self.limits.prefix_tokens:
            return
        key = (request.group, replica)
        if key not in self._prefixes:
            rid = f"{self.batch.name}-prefix-{len(self._prefixes)}"
            self._prefixes[key] = asyncio.create_task(self._send_quietly(replica, {**prefix_request(body), "rid": rid}))
        await asyncio.shield(self._prefixes[key])

    async def _send_quietly(self, replica: Replica, body: dict) -> None:
        with suppress(ServerLost, Fault, Refused):
            await self._send(replica, body, partial(read_prefix, rid=body["rid"]))

    async def _send(self, replica: Replica, body: dict, believe: Callable[[bytes], Answer]) -> Answer:
        """POST to /generate, and return what `believe` makes of the answer.

        Raises ServerLost as soon as the server is known to be lost, however long it would keep the connection.
        """
        post = asyncio.ensure_future(
            self.http.call(
                replica.server,
                "/generate",
                encode(body),
                believe=believe,
                timeout_seconds=self.limits.timeout_seconds,
                most_bytes=self._most_bytes,
            )
        )
        try:
            await asyncio.wait((post, replica.lost), return_when=asyncio.FIRST_COMPLETED)
            if not post.done():
                raise ServerLost
            return post.result()
        finally:
            post.cancel()

    async def _stop_when_enough(self, workers: list[asyncio.Task]) -> None:
        """Once the batch is stopped, abort what is under way, and leave what has not answered after ABORT_SECONDS."""
        await self._stopped.wait()
        aborts = [self.control.abort(replica.server, rid) for rid, replica in list(self._under_way.items())]
        await asyncio.gather(*aborts, return_exceptions=True)
        await asyncio.wait(workers, timeout=ABORT_SECONDS)
        for worker in workers:
            if not worker.done():
                self.traffic.cancelled_running += 1
                worker.cancel()

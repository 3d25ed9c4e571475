"""SGLang over HTTP: many requests at once to one or several servers, and new weights into all of them."""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_papo.sglang.answers import Sample
from megatron_papo.sglang.control import Control
from megatron_papo.sglang.delivery import Batch, Delivery, Limits, Traffic
from megatron_papo.sglang.http import Http, at_once, open_http
from megatron_papo.sglang.replicas import HealthLimits, Replicas
from megatron_papo.sglang.requests import Request, Sampling
from megatron_papo.sglang.sample_store import SampleStore
from megatron_papo.sglang.server_record import OwnedServer, Server

PREFIX_TOKENS = 128
"""A shorter prompt is not worth a request of its own that computes it ahead of its group's samples."""


class SglangClient:
    """Requests to servers that hold the same weights."""

    def __init__(
        self,
        servers: Sequence[Server],
        concurrency: int,
        timeout_seconds: float,
        *,
        restart: Callable[[OwnedServer], OwnedServer] | None = None,
        limits: HealthLimits = HealthLimits(),
        prefix_tokens: int = PREFIX_TOKENS,
    ):
        """
        Args:
            servers: which, at least one.
            concurrency: requests under way at once.
            timeout_seconds: for one answer.
            restart: starts a lost server of this pipeline again (blocking); None: lost servers are done without.
            limits: when a server counts as lost, and how often one is started again.
            prefix_tokens: the prompt of a group is computed ahead of its samples if it is at least so long.
        """
        self.servers = list(servers)
        self.concurrency = concurrency
        self.timeout_seconds = timeout_seconds
        self.restart = restart
        self.limits = limits
        self.prefix_tokens = prefix_tokens
        self.traffic = Traffic()
        """Of all calls of sample."""
        # A server may still be busy with the requests of a client that was killed, and refuses a second request of the
        # same name.
        self._nonce = secrets.token_hex(4)
        self._batches = 0
        self._delivery: Delivery | None = None
        self._weights: tuple[Path, str] | None = None

    @property
    def running(self) -> int:
        """Requests under way now."""
        return 0 if self._delivery is None else self._delivery.running

    @property
    def stored(self) -> int:
        """Samples of this call of `sample` that came from the store until now."""
        return 0 if self._delivery is None else self._delivery.traffic.stored

    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        weight_version: str,
        on_sample: Callable[[int, Sample], None] = lambda index, sample: None,
        enough: Callable[[], bool] = lambda: False,
        store: SampleStore | None = None,
    ) -> list[Sample | None]:
        """Return one Sample per request, in order. The first error ends it all.

        Args:
            requests: what to sample.
            sampling: how.
            weight_version: what the servers must say that they sampled with.
            on_sample: called with the index of a request and its sample, as they come.
            enough: asked after each sample; once it says True the other requests are cancelled, and None stands in
                their places.
            store: samples that are there are taken from there; others are kept in it as they come.
        """
        self._batches += 1
        name = f"{self._nonce}-{self._batches}"
        return asyncio.run(self._deliver(Batch(name, requests, sampling, weight_version, on_sample, enough, store)))

    async def _deliver(self, batch: Batch) -> list[Sample | None]:
        limits = Limits(self.concurrency, self.timeout_seconds, self.prefix_tokens)
        async with open_http() as http:
            replicas = Replicas(self.servers, http, self.limits, self._replace if self.restart else None)
            self._delivery = Delivery(batch, limits, http, replicas=replicas, control=self._control(http))
            await self._delivery.run()
        self.traffic.add(self._delivery.traffic)
        return self._delivery.samples

    async def _replace(self, lost: OwnedServer) -> OwnedServer:
        """Return a new server in the place of a lost one, with the weights of the last update."""
        assert self.restart is not None  # nobody is replaced without it
        started = await asyncio.to_thread(self.restart, lost)
        if self._weights is not None:
            async with open_http() as http:
                await self._control(http).load(started, *self._weights)
        self.servers[self.servers.index(lost)] = started
        return started

    def update_weights(self, hf_dir: Path, weight_version: str, probe: Request | None = None) -> int:
        """Load a checkpoint into all servers. Returns how many did not have that version yet.

        Args:
            hf_dir: the checkpoint, which the caller has verified.
            weight_version: how the weights are called from then on.
            probe: a prompt whose own log-probs must change with the weights. Raises UserError if they do not although
                the server says that it has loaded other files.
        """
        self._weights = hf_dir.resolve(), weight_version
        return asyncio.run(self._update_all(*self._weights, probe))

    async def _update_all(self, hf_dir: Path, version: str, probe: Request | None) -> int:
        async with open_http() as http:
            control = self._control(http)
            loads = (control.load(server, hf_dir, version, probe) for server in self.servers)
            results = await asyncio.gather(*loads, return_exceptions=True)
        updated = 0
        for result in results:
            if isinstance(result, BaseException):
                raise result
            updated += result
        return updated

    def weight_versions(self) -> list[str]:
        """Return what each server says its weights are."""

        async def ask(http: Http) -> list[str]:
            return [await self._control(http).weight_version(server) for server in self.servers]

        return at_once(ask)

    def _control(self, http: Http) -> Control:
        return Control(http, self.timeout_seconds)

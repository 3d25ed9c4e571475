"""The servers of one batch of requests, which hold the same weights: which one gets a request, which is lost, which
takes its place.

A server is lost when its process is gone or when it does not answer /health in time. Its requests under way are given
up at once, so that the client can send them to another server; where it was started by this pipeline, it is started
again meanwhile.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field

from megatron_papo.errors import UserError
from megatron_papo.sglang.http import Http
from megatron_papo.sglang.server_health import UNREACHABLE, health_problem
from megatron_papo.sglang.server_record import OwnedServer, Server, last_words, log_tail

UNREACHABLE_PAUSES_SECONDS = (0.5, 1.0, 2.0)
"""A connection that is refused may be the network's fault; where the process is known to be gone nobody waits."""


LOG_LINES = 10
"""Of a lost server's log that are printed."""


class ServerLost(Exception):
    """The server that a request was sent to will not answer it any more."""


@dataclass(frozen=True)
class HealthLimits:
    """server.health_interval_seconds, server.health_timeout_seconds, server.max_restarts."""

    interval_seconds: float = 10.0
    timeout_seconds: float = 30.0
    max_restarts: int = 3


@dataclass(eq=False)
class Replica:
    server: Server
    lost: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done, with the reason, once the server is lost."""
    under_way: int = 0
    examination: asyncio.Task | None = None


class Replicas:
    """The servers of one batch, in one event loop."""

    def __init__(
        self,
        servers: Sequence[Server],
        http: Http,
        limits: HealthLimits,
        replace: Callable[[OwnedServer], Awaitable[OwnedServer]] | None,
    ):
        """
        Args:
            servers: which, at least one.
            http: for their health.
            limits: when a server counts as lost, and how often one is started again.
            replace: kills a lost server and gives its successor, with the batch's weights; None: none is replaced.
        """
        self.http, self.limits, self.replace = http, limits, replace
        self.serving = [Replica(server) for server in servers]
        self.replacing: set[asyncio.Task] = set()
        self.lost = self.restarts = 0
        self.incidents: list[str] = []
        self._last_words = ""
        self._homes: dict[Hashable, Replica] = {}
        self._changed = asyncio.Event()

    async def take(self, group: Hashable) -> Replica:
        """Return the server of this group; for a new group, or None, the least busy server.

        Waits while all are being replaced. Raises UserError if none is left.
        """
        while True:
            home = self._homes.get(group)
            if home is None or home.lost.done():
                home = min(self.serving, key=lambda replica: replica.under_way, default=None)
            if home is not None:
                if group is not None:
                    self._homes[group] = home
                return home
            if not self.replacing:
                raise UserError(
                    f"no SGLang server is left: {'; '.join(self.incidents)}: {self._advice()}{self._last_words}"
                )
            self._changed.clear()
            await self._changed.wait()

    async def watch(self) -> None:
        """Look at every server from time to time, until cancelled."""
        while True:
            await asyncio.sleep(self.limits.interval_seconds)
            await asyncio.gather(*(self.examine(replica) for replica in list(self.serving)))

    async def examine(self, replica: Replica) -> bool:
        """Return whether the server is still of use. However many ask, it is looked at once at a time."""
        if replica.lost.done():
            return False
        if replica.examination is None:
            replica.examination = asyncio.create_task(self._examine(replica))
        return await asyncio.shield(replica.examination)

    async def finish(self) -> None:
        """Wait for the servers that are being started: they cannot be left alone half-way."""
        await asyncio.gather(*self.replacing)

    def _advice(self) -> str:
        if self.replace is None:
            return "restart them, or give --server a directory to have them started"
        return "run the stage again, which starts new ones (raise server.max_restarts to have that done sooner)"

    async def _examine(self, replica: Replica) -> bool:
        for pause in (*UNREACHABLE_PAUSES_SECONDS, None):
            problem = await health_problem(self.http, replica.server, self.limits.timeout_seconds)
            if pause is None or problem is None or UNREACHABLE not in problem:
                break
            await asyncio.sleep(pause)
        replica.examination = None
        if problem is not None:
            self._lose(replica, problem)
        return problem is None

    def _lose(self, replica: Replica, problem: str) -> None:
        server = replica.server
        self.serving.remove(replica)
        self.lost += 1
        replica.lost.set_result(problem)
        what = f"{server.name} {problem}"
        self.incidents.append(what)
        then = "going on without it"
        if isinstance(server, OwnedServer):
            self._last_words = f"; {last_words(server.directory)}"
            for line in log_tail(server.directory, LOG_LINES):
                print(f"  {line}", flush=True)
            if self.replace is not None and self.restarts < self.limits.max_restarts:
                then = "starting it again"
                self.restarts += 1
                task = asyncio.ensure_future(self._start(self.replace(server)))
                self.replacing.add(task)
                task.add_done_callback(self._replaced)
        left = f"{len(self.serving)} left, {replica.under_way} requests are sent again"
        print(f"SGLang server lost: {what}: {then}; {left}", flush=True)
        self._changed.set()

    def _replaced(self, task: asyncio.Task) -> None:
        self.replacing.discard(task)
        self._changed.set()

    async def _start(self, successor: Awaitable[OwnedServer]) -> None:
        try:
            self.serving.append(Replica(await successor))
        except UserError as error:
            self.incidents.append(f"it could not be started again: {error}")

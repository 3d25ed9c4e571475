"""The one door to SGLang servers: every call over HTTP goes through it, and gives an answer that was believed, or a
fault.

An answer is believed only if it can be one: HTTP 200, complete, of a possible size, and accepted by the reader that the
caller gives (sglang/answers.py). Everything else that comes over the wire is a Fault, after which a call may be sent
again; the connection that it came over is closed, because whatever follows on it belongs to another request. Proxies of
the environment are not used, redirects not followed, nothing is decompressed.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp

from megatron_papo.reading import shown
from megatron_papo.sglang.server_record import Server

CONNECT_TIMEOUT_SECONDS = 10.0
IDLE_SECONDS = 2.0
"""How long an unused connection is kept: less than the 5 s after which SGLang closes it, perhaps just as it is used."""
CONTROL_BYTES = 1 << 20
"""The longest answer to a call that samples nothing."""
PASSING = {408, 425, 429}
"""HTTP 4xx that speak of the moment, not of the request."""
Answer = TypeVar("Answer")


class Fault(Exception):
    """What came, or did not come, is no answer: the call may be sent again."""


class NotReachable(Fault):
    """The connection was refused, cut, or does not speak HTTP."""


class TimedOut(Fault):
    """No complete answer in time."""


class Refused(Exception):
    """HTTP 4xx: the server understood the call and will not do it; another try would be as wrong."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Http:
    """Calls to servers in one event loop, over connections that are kept while they are in use."""

    def __init__(self, session: aiohttp.ClientSession):
        self._session = session

    async def call(
        self,
        server: Server,
        path: str,
        body: bytes | None = None,
        *,
        believe: Callable[[bytes], Answer],
        timeout_seconds: float,
        most_bytes: int = CONTROL_BYTES,
    ) -> Answer:
        """POST a JSON body, or GET where there is none, and return what `believe` makes of the content.

        Args:
            server: which.
            path: below the server's URL.
            body: JSON.
            believe: reads the content; raises Fault for what cannot be an answer.
            timeout_seconds: until the answer is complete.
            most_bytes: of the content; more is a Fault, and not read.

        Raises a Fault, which may pass, or Refused, which will not.
        """
        headers = server.headers if body is None else {**server.headers, "Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=CONNECT_TIMEOUT_SECONDS)
        try:
            async with self._session.request(
                "GET" if body is None else "POST",
                server.url + path,
                data=body,
                headers=headers,
                allow_redirects=False,
                timeout=timeout,
            ) as response:
                try:
                    content = await _content(response, most_bytes)
                    _require_success(response.status, content)
                    return believe(content)
                except BaseException:
                    response.close()
                    raise
        except TimeoutError:
            raise TimedOut(f"no complete answer within {timeout_seconds:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise NotReachable(f"not reachable ({type(error).__name__}: {shown(error)})")


async def _content(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > most_bytes:
            raise Fault(f"HTTP {response.status} with more than {most_bytes} bytes")
    return b"".join(parts)


def _require_success(status: int, content: bytes) -> None:
    if status == 200:
        return
    words = shown(content[:1000].decode(errors="replace"), limit=300)
    text = f"HTTP {status}: {words}" if words else f"HTTP {status}"
    if 400 <= status < 500 and status not in PASSING:
        raise Refused(status, text)
    raise Fault(text)


def anything(content: bytes) -> None:
    """Believe any content: of calls that answer by their status."""


@asynccontextmanager
async def open_http() -> AsyncIterator[Http]:
    """Give the door to an event loop, and close its connections at the end."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
    async with aiohttp.ClientSession(
        connector=connector, trust_env=False, auto_decompress=False, skip_auto_headers=["Accept-Encoding", "User-Agent"]
    ) as session:
        yield Http(session)


def at_once(calls: Callable[[Http], Coroutine[Any, Any, Answer]]) -> Answer:
    """Make some calls from where no event loop runs, and return what they return."""

    async def within() -> Answer:
        async with open_http() as http:
            return await calls(http)

    return asyncio.run(within())

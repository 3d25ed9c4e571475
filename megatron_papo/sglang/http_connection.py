"""POST after POST over one kept connection: as much of HTTP/1.1 as the many requests of a rollout need, on asyncio's
streams.

With httpx a request takes 1 ms of processor time more: on a machine whose cores also serve the model that is felt
(tools/benchmark/rollout.py). Control calls, which are few, go through httpx.
"""

import asyncio
import ssl
from urllib.parse import SplitResult, urlsplit


class HttpConnection:
    """A connection for one request at a time.

    Any failure, and a cancelled request, closes it; the next request opens another.
    """

    def __init__(self, timeout_seconds: float, connect_timeout_seconds: float, ssl_context: ssl.SSLContext):
        self.timeout_seconds = timeout_seconds
        self.connect_timeout_seconds = connect_timeout_seconds
        self.ssl_context = ssl_context
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._host: tuple[str, int] | None = None

    async def post_json(self, url: str, content: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """Post JSON. Returns status and content.

        Raises TimeoutError, or ConnectionError if the connection fails or the answer is not HTTP.
        """
        parts, done = urlsplit(url), False
        try:
            async with asyncio.timeout(self.timeout_seconds):
                reader, writer = await self._connected(parts)
                writer.write(_request(parts, content, headers))
                await writer.drain()
                status, answer, keep = await _response(reader)
            done = keep
            return status, answer
        except TimeoutError:
            raise
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise ConnectionError(type(error).__name__)
        finally:
            if not done:
                self.close()

    async def _connected(self, parts: SplitResult) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        secure = parts.scheme == "https"
        host = parts.hostname or "", parts.port or (443 if secure else 80)
        if self._streams is None or host != self._host or self._streams[0].at_eof():
            self.close()
            async with asyncio.timeout(self.connect_timeout_seconds):
                self._streams = await asyncio.open_connection(*host, ssl=self.ssl_context if secure else None)
            self._host = host
        return self._streams

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


def _request(parts: SplitResult, content: bytes, headers: dict[str, str]) -> bytes:
    lines = [
        f"POST {parts.path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    ]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


async def _response(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """Return status, content, and whether the connection may be used again.

    Raises EOFError or ValueError for what is not a complete response.
    """
    version, status, *_ = (await _line(reader)).split(maxsplit=2)
    if not version.startswith("HTTP/1."):
        raise ValueError(version)
    headers = {}
    while line := await _line(reader):
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip().lower()
    keep = version == "HTTP/1.1" and headers.get("connection") != "close"
    if headers.get("transfer-encoding") == "chunked":
        return int(status), await _chunks(reader), keep
    if "content-length" in headers:
        return int(status), await reader.readexactly(int(headers["content-length"])), keep
    return int(status), await reader.read(), False


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    content = []
    while size := int((await _line(reader)).partition(";")[0], 16):
        content.append(await reader.readexactly(size))
        await _line(reader)
    while await _line(reader):  # trailers
        pass
    return b"".join(content)


async def _line(reader: asyncio.StreamReader) -> str:
    return (await reader.readuntil(b"\n")).decode("latin-1").rstrip("\r\n")

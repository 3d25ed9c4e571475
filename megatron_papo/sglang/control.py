"""Control calls to SGLang servers: which weights they hold, new weights into them, the end of a request."""

import asyncio
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_papo.errors import UserError
from megatron_papo.reading import shown
from megatron_papo.run.stage_output import file_hash
from megatron_papo.sglang.answers import Acknowledged, Loaded, ModelInfo, read_probe, reader
from megatron_papo.sglang.http import CONTROL_BYTES, Fault, Http, Refused, TimedOut, anything
from megatron_papo.sglang.requests import Request, encode, probe_request
from megatron_papo.sglang.server_record import OwnedServer, Server, last_words

RETRY_PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)
BYTES_PER_TOKEN = 256
"""More than an answer holds for one token: its id, its log-prob, its text."""
Answer = TypeVar("Answer")


class Control:
    """Control calls of one event loop. A call is sent again after a fault; what the server refuses is final."""

    def __init__(self, http: Http, timeout_seconds: float):
        """
        Args:
            http: the way to the servers.
            timeout_seconds: for one answer; the first that takes longer is an error.
        """
        self.http, self.timeout_seconds = http, timeout_seconds

    async def weight_version(self, server: Server) -> str:
        """Return what the server says its weights are."""
        return (await self._model_info(server)).weight_version

    async def load(self, server: Server, hf_dir: Path, version: str, probe: Request | None = None) -> bool:
        """Load a checkpoint into a server. Returns False if the server had that version already.

        Requests under way are put back and go on with the new weights (pause_generation "retract"); this protocol does
        not wait for the lock that a stuck request would hold.

        Args:
            server: which.
            hf_dir: the checkpoint, as an absolute path.
            version: how the weights are called from then on.
            probe: a prompt whose own log-probs must change with the weights. Raises UserError if they do not although
                the server says that it has loaded other files.
        """
        before = await self._model_info(server)
        if before.weight_version == version:
            return False
        probed_before = None if probe is None else await self._probe(server, probe, before.weight_version)
        await self._post(server, "/pause_generation", {"mode": "retract"}, reader(Acknowledged), "pause")
        try:
            body = {"model_path": str(hf_dir), "weight_version": version, "flush_cache": True}
            answer = await self._post(
                server, "/update_weights_from_disk", body, reader(Loaded), f"weights {shown(hf_dir)}"
            )
            if not answer.success:
                raise UserError(f"{shown(hf_dir)}: the server could not load it: {shown(answer.message)}")
            after = await self.weight_version(server)
            if after != version:
                raise UserError(
                    f"{server.url}: says its weights are {shown(after)} after loading {version}: {advice(server)}"
                )
        finally:
            await self._post(server, "/continue_generation", {}, reader(Acknowledged), "continue")
        if probe is not None and await self._probe(server, probe, version) == probed_before:
            if not same_weight_files(Path(before.model_path), hf_dir):
                raise UserError(
                    f"{server.url}: says that it has loaded {shown(hf_dir)}, but prompt {shown(probe.prompt.id)} has"
                    f" the same log-probs as with {shown(before.model_path)}: it still runs the former weights:"
                    f" {advice(server)}"
                )
        return True

    async def abort(self, server: Server, rid: str) -> None:
        """Have the server end a request."""
        await self._post(server, "/abort_request", {"rid": rid}, anything, "abort")

    async def _probe(self, server: Server, probe: Request, version: str) -> list[float]:
        rid = f"probe-{secrets.token_hex(4)}"
        body = {**probe_request(probe, await asyncio.to_thread(probe.images), version), "rid": rid}
        return await self._call(
            server,
            "/generate",
            encode(body),
            lambda content: read_probe(content, rid),
            f"probe with prompt {shown(probe.prompt.id)}",
            CONTROL_BYTES + BYTES_PER_TOKEN * probe.prompt.num_tokens,
        )

    async def _model_info(self, server: Server) -> ModelInfo:
        return await self._call(server, "/model_info", None, reader(ModelInfo), "model_info")

    async def _post(
        self, server: Server, path: str, body: dict, believe: Callable[[bytes], Answer], what: str
    ) -> Answer:
        return await self._call(server, path, json.dumps(body).encode(), believe, what)

    async def _call(
        self,
        server: Server,
        path: str,
        body: bytes | None,
        believe: Callable[[bytes], Answer],
        what: str,
        most_bytes: int = CONTROL_BYTES,
    ) -> Answer:
        for pause in (*RETRY_PAUSES_SECONDS, None):
            try:
                return await self.http.call(
                    server,
                    path,
                    body,
                    believe=believe,
                    timeout_seconds=self.timeout_seconds,
                    most_bytes=most_bytes,
                )
            except TimedOut as fault:
                raise UserError(f"{what}: {server.name}: {fault}: {advice(server)}")
            except Refused as refused:
                raise UserError(f"{what}: {server.url}{path} refused it: {refused}")
            except Fault as fault:
                problem = str(fault)
            if pause is not None:
                await asyncio.sleep(pause)
        raise UserError(f"{what}: {server.name} {problem}: {advice(server)}")


def same_weight_files(first: Path, second: Path) -> bool:
    """Return whether the safetensors of two checkpoints hold the same bytes; False if one cannot be read any more."""

    def hashes(directory: Path) -> dict[str, str]:
        return {file.name: file_hash(file) for file in sorted(directory.glob("*.safetensors"))}

    hashes_of_first = hashes(first)
    return bool(hashes_of_first) and hashes_of_first == hashes(second)


def advice(server: Server) -> str:
    """Return what to do about a server that fails, for the end of an error message."""
    if not isinstance(server, OwnedServer):
        return "restart that server, or give --server a directory to have one started"
    return f"run the stage again, which starts it again if need be; {last_words(server.directory)}"

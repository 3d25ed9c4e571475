"""Control calls to SGLang servers: which weights they hold, new weights into them, the end of a request."""

import asyncio
from pathlib import Path

import httpx

from megatron_papo.errors import UserError
from megatron_papo.run.stage_output import file_hash
from megatron_papo.sglang.requests import Request, parse_probe, probe_request
from megatron_papo.sglang.server_record import OwnedServer, Server, log_tail

RETRY_PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)


class Control:
    """Control calls over one HTTP client. A call is sent again after connection errors and HTTP 5xx; a 4xx is final."""

    def __init__(self, http: httpx.AsyncClient):
        self.http = http

    async def weight_version(self, server: Server) -> str:
        """Return what the server says its weights are."""
        return (await self._model_info(server))["weight_version"]

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
        if before["weight_version"] == version:
            return False
        probed_before = None if probe is None else await self._probe(server, probe, before["weight_version"])
        await self._post(server, "/pause_generation", {"mode": "retract"}, "pause")
        try:
            body = {"model_path": str(hf_dir), "weight_version": version, "flush_cache": True}
            answer = (await self._post(server, "/update_weights_from_disk", body, f"weights {hf_dir}")).json()
            if not answer["success"]:
                raise UserError(f"{hf_dir}: the server could not load it: {answer['message']}")
            after = await self.weight_version(server)
            if after != version:
                raise UserError(f"{server.url}: says its weights are {after} after loading {version}: {advice(server)}")
        finally:
            await self._post(server, "/continue_generation", {}, "continue")
        if probe is not None and await self._probe(server, probe, version) == probed_before:
            if not same_weight_files(Path(before["model_path"]), hf_dir):
                raise UserError(
                    f"{server.url}: says that it has loaded {hf_dir}, but prompt {probe.prompt.id} has the same"
                    f" log-probs as with {before['model_path']}: it still runs the former weights: {advice(server)}"
                )
        return True

    async def abort(self, server: Server, rid: str) -> None:
        """Have the server end a request."""
        await self._post(server, "/abort_request", {"rid": rid}, "abort")

    async def _probe(self, server: Server, probe: Request, version: str) -> list[float]:
        body = probe_request(probe, await asyncio.to_thread(probe.images), version)
        response = await self._post(server, "/generate", body, f"probe with prompt {probe.prompt.id}")
        return parse_probe(response.json())

    async def _model_info(self, server: Server) -> dict[str, str]:
        return (await self._call(server, "GET", "/model_info", None, "model_info")).json()

    async def _post(self, server: Server, path: str, body: dict, what: str) -> httpx.Response:
        return await self._call(server, "POST", path, body, what)

    async def _call(self, server: Server, method: str, path: str, body: dict | None, what: str) -> httpx.Response:
        for pause in (*RETRY_PAUSES_SECONDS, None):
            try:
                response = await self.http.request(method, server.url + path, json=body, headers=server.headers)
            except httpx.TimeoutException as error:
                raise UserError(f"{what}: no answer from {server.url} ({type(error).__name__}): {advice(server)}")
            except httpx.TransportError as error:
                problem = f"not reachable ({type(error).__name__})"
            else:
                if response.status_code < 400:
                    return response
                problem = f"HTTP {response.status_code}: {response.text[:300]}"
                if response.status_code < 500:
                    raise UserError(f"{what}: {server.url}{path} refused it: {problem}")
            if pause is not None:
                await asyncio.sleep(pause)
        raise UserError(f"{what}: {server.url} {problem}: {advice(server)}")


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
    tail = log_tail(server.directory, 10)
    command = f".venv/bin/python -m tools.sglang_server start --server {server.directory} --config FILE --model HF_DIR"
    again = f"start it again with: {command}"
    return f"{again} (the stages do so by themselves); {server.directory}/server.log ends:\n{tail}"

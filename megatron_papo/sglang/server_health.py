"""Control calls to one server at a time, over HTTP."""

import httpx

from megatron_papo.sglang.server_record import Server

HEALTH_TIMEOUT_SECONDS = 30.0
"""/health generates a token, which takes about a second; SGLang itself gives up after 20."""


def http_client(server: Server, timeout_seconds: float) -> httpx.Client:
    """Return an HTTP client with the server's address and key, which ignores the proxies of the environment."""
    return httpx.Client(base_url=server.url, headers=server.headers, timeout=timeout_seconds, trust_env=False)


def problem_of(server: Server, timeout_seconds: float = HEALTH_TIMEOUT_SECONDS) -> str | None:
    """Return why the server cannot be used; None if it can."""
    try:
        with http_client(server, timeout_seconds) as client:
            key = client.get("/model_info").status_code
            if key in (401, 403):
                return "refuses the API key"
            health = client.get("/health").status_code if key == 200 else key
    except httpx.HTTPError as error:
        return f"does not answer ({type(error).__name__})"
    return None if health == 200 else f"is not healthy (HTTP {health})"

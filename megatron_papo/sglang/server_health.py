"""Whether a server can be used."""

from megatron_papo.reading import shown
from megatron_papo.sglang.http import Fault, Http, NotReachable, Refused, TimedOut, anything, at_once
from megatron_papo.sglang.server_process import process_is_gone
from megatron_papo.sglang.server_record import Server

HEALTH_TIMEOUT_SECONDS = 30.0
"""/health generates a token, which takes about a second; SGLang itself gives up after 20."""
UNREACHABLE = "is not reachable"


async def health_problem(http: Http, server: Server, timeout_seconds: float) -> str | None:
    """Return why the server is of no use; None if it answers.

    /health makes a token, which takes a second, unless other tokens are being made.
    """
    if process_is_gone(server):
        return "died"
    try:
        await http.call(server, "/health", believe=anything, timeout_seconds=timeout_seconds)
    except TimedOut:
        return "died" if process_is_gone(server) else f"did not answer /health within {timeout_seconds:g} s"
    except NotReachable as fault:
        return f"{UNREACHABLE}{str(fault).removeprefix('not reachable')}"
    except (Fault, Refused) as fault:
        return f"is not healthy ({fault})"
    return None


def problem_of(server: Server, timeout_seconds: float = HEALTH_TIMEOUT_SECONDS) -> str | None:
    """Return why the server cannot be used; None if it can: it answers, and takes our key."""

    async def ask(http: Http) -> str | None:
        try:
            await http.call(server, "/model_info", believe=anything, timeout_seconds=timeout_seconds)
        except Refused as refused:
            return "refuses the API key" if refused.status in (401, 403) else f"is no SGLang server ({refused})"
        except (TimedOut, NotReachable) as fault:
            return f"does not answer ({shown(fault)})"
        except Fault as fault:
            return f"is not healthy ({fault})"
        return await health_problem(http, server, timeout_seconds)

    return at_once(ask)

"""Room for the connections of a stage among the files that a process may have open."""

import resource

import psutil

from megatron_papo.errors import UserError

RESERVED = 64
"""For what a process opens beside connections: pictures, graders, outputs, the server's log."""


def room_for(connections: int) -> int:
    """Return how many connections a stage can have open at once: `connections`, or fewer where the system allows no
    more.

    The limit of the process is raised to what it needs, as far as it may be. Raises UserError
    where there is no room for a single connection.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = psutil.Process().num_fds() + RESERVED
    wanted = others + connections
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    room = allowed - others
    if room < 1:
        raise UserError(f"this process may open {hard} files, which leaves none for a server: raise it (ulimit -n)")
    if room < connections:
        print(
            f"rollout.concurrency {connections}: this process may open {hard} files: {room} requests at once (raise it"
            " with ulimit -n, or lower rollout.concurrency)",
            flush=True,
        )
    return min(room, connections)

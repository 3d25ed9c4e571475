"""Room for the connections of a stage among the files that a process may have open."""

import resource

from megatron_papo.errors import UserError

RESERVED = 96
"""For what a process opens beside connections: libraries, pictures, graders, outputs, the server's log."""


def most_connections(wanted: int) -> int:
    """Return how many connections a process can have open at once: `wanted`, or fewer where the system allows no more.

    Raises UserError where there is no room for a single one.
    """
    highest = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if highest == resource.RLIM_INFINITY:
        return wanted
    if highest <= RESERVED:
        raise UserError(
            f"this process may open {highest} files, which leaves none for a server: raise it to at least"
            f" {RESERVED + wanted} (ulimit -n)"
        )
    return min(wanted, highest - RESERVED)


def room_for(connections: int) -> int:
    """Return most_connections(), with the limit of this process raised to what they need, and say where they are
    fewer."""
    room = most_connections(connections)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < room + RESERVED:
        resource.setrlimit(resource.RLIMIT_NOFILE, (room + RESERVED, hard))
    if room < connections:
        print(
            f"rollout.concurrency {connections}: this process may open {hard} files: {room} requests at once (raise it"
            " with ulimit -n, or lower rollout.concurrency)",
            flush=True,
        )
    return room

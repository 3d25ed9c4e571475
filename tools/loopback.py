"""The meeting place of the processes of one machine, for tools.torchrun: torch's own listens on all interfaces."""

import socket
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

ADDRESS, BACKEND = "127.0.0.1", "loopback"
TIMEOUT = timedelta(minutes=5)


class LoopbackRendezvous(RendezvousHandler):
    """One agent, which meets nobody, and holds the store in which its processes meet."""

    def __init__(self, run_id: str):
        self._run_id = run_id
        with socket.create_server((ADDRESS, 0)) as listener:
            self._port = listener.getsockname()[1]
            self._store = TCPStore(
                ADDRESS,
                self._port,
                is_master=True,
                wait_for_workers=False,
                timeout=TIMEOUT,
                multi_tenant=True,
                master_listen_fd=listener.detach(),
            )

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(ADDRESS, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def create(params: RendezvousParameters) -> RendezvousHandler:
    """Make the meeting place of a run, for torch's registry."""
    return LoopbackRendezvous(params.run_id)

"""The keeper of one node's servers: what SERVER_LAUNCHER runs on every server node (nodes.py).

    python -m megatron_papo.sglang.node_keeper --list                           say which node this is, and end
    python -m megatron_papo.sglang.node_keeper --server DIR --attempt ATTEMPT   start this node's servers, and keep them
    python -m megatron_papo.sglang.node_keeper --server DIR --end               end what a keeper that was killed left

It starts the servers that DIR/nodes.json asks for, starts one again that a stage has given up, and ends them, and
itself, when that file goes, when the launcher ends, or when it is told to.
"""

import argparse
import os
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType

from megatron_papo.errors import UserError
from megatron_papo.reading import reading
from megatron_papo.run.command_line import run
from megatron_papo.sglang.addresses import NodeReport, interfaces, resolved
from megatron_papo.sglang.nodes import (
    WORD_SECONDS,
    NodesRecord,
    NodeState,
    identity_of_machine,
    node_dir,
    node_name,
    read_nodes,
)
from megatron_papo.sglang.server import connect_or_start_here, restart, stop_here
from megatron_papo.sglang.server_record import OwnedServer, read_record, replica_dir, write_private

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOOK_SECONDS = 1.0
"""How often it looks what is wanted."""


class Told(BaseException):
    """A signal says that the keeper is to end."""


class Keeper:
    """The servers of this node, for one attempt."""

    def __init__(self, server_dir: Path, record: NodesRecord, launcher: int):
        """
        Args:
            server_dir: Of all nodes.
            record: What is wanted.
            launcher: Number of the process that started this one.
        """
        self.server_dir, self.record, self.launcher = server_dir, record, launcher
        self.node = node_name()
        self.directory = node_dir(server_dir, self.node)
        self.config = record.server_config.model_copy(update={"host": self._address()})
        self.model = Path(record.model)

    def _address(self) -> str:
        if self.node not in self.record.addresses:
            raise UserError(
                f"node {self.node}: was not among those that were listed: {', '.join(self.record.addresses)}"
            )
        return self.record.addresses[self.node]

    def keep(self) -> None:
        """Keep the servers until they are not wanted any more."""
        with reading(self.directory, "make room, or choose another --server"):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._say(NodeState(attempt=self.record.attempt))
        stop_here(self.directory)  # what a keeper that was killed has left
        work = ThreadPoolExecutor(self.config.replicas)
        under_way = {self.directory: work.submit(self._start_all)}
        try:
            while self._is_wanted():
                for directory in [directory for directory, future in under_way.items() if future.done()]:
                    self._say(self._outcome(under_way.pop(directory)))
                for server in self._lost():
                    if server.directory not in under_way:
                        self._say(NodeState(attempt=self.record.attempt))
                        under_way[server.directory] = work.submit(self._restart, server)
                time.sleep(LOOK_SECONDS)
        finally:
            stop_here(self.directory)  # upon which a start that is under way fails
            work.shutdown()
            stop_here(self.directory)
            (self.directory / "state.json").unlink(missing_ok=True)

    def _start_all(self) -> None:
        connect_or_start_here(self.directory, self.model, self.config, self.record.dtype)

    def _lost(self) -> list[OwnedServer]:
        """Return the servers that a stage has given up."""
        lost = []
        with suppress(UserError):  # a network file system that does not answer for a moment
            for number in range(self.config.replicas):
                directory = replica_dir(self.directory, number)
                record = read_record(directory)
                if record is not None and record.lost:
                    lost.append(record.server(directory, number))
        return lost

    def _restart(self, lost: OwnedServer) -> None:
        record = read_record(lost.directory)
        model = self.model if record is None else Path(record.model)
        restart(lost, model, self.config, self.record.dtype)

    def _outcome(self, done: "Future[None]") -> NodeState:
        error = done.exception()
        if error is not None and not isinstance(error, UserError):
            raise error
        problem = None if error is None else "; ".join(error.lines)
        return NodeState(attempt=self.record.attempt, ready=problem is None, problem=problem)

    def _say(self, state: NodeState) -> None:
        write_private(self.directory / "state.json", state)

    def _is_wanted(self) -> bool:
        if os.getppid() != self.launcher:
            return False
        try:
            record = read_nodes(self.server_dir)
        except UserError:  # a network file system that does not answer for a moment
            return True
        return record is not None and record.attempt == self.record.attempt


def wait_for_record(server_dir: Path, attempt: str, launcher: int) -> NodesRecord | None:
    """Return what is wanted, once the stage that started this attempt has written it; None if it does not."""
    deadline = time.monotonic() + WORD_SECONDS
    while time.monotonic() < deadline and os.getppid() == launcher:
        record = read_nodes(server_dir)
        if record is not None and record.attempt == attempt:
            return record
        time.sleep(LOOK_SECONDS / 5)
    return None


def report() -> NodeReport:
    """Return what the stage must know of this node."""
    name = node_name()
    return NodeReport(node=name, machine=identity_of_machine(), resolved=resolved(name), interfaces=interfaces())


def main() -> None:
    launcher = os.getppid()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say which node this is, and end")
    parser.add_argument("--server", type=Path, metavar="DIR", help="server directory of all nodes")
    parser.add_argument("--attempt", help="of the start that wants servers")
    parser.add_argument("--end", action="store_true", help="end the servers of a keeper that was killed")
    arguments = parser.parse_args()
    if arguments.list:
        os.write(sys.stdout.fileno(), f"{report().model_dump_json()}\n".encode())  # whole: the nodes share the pipe
        return
    if arguments.server is None or (arguments.attempt is None) is not arguments.end:
        parser.error("give --server with --attempt or --end, or --list")
    if arguments.end:
        stop_here(node_dir(arguments.server, node_name()))
        return

    def end(number: int, frame: FrameType | None) -> None:
        for other in ENDING:
            signal.signal(other, signal.SIG_IGN)  # once is enough, and the servers are to be ended in peace
        raise Told

    for number in ENDING:
        signal.signal(number, end)
    try:
        record = wait_for_record(arguments.server, arguments.attempt, launcher)
        if record is not None:
            Keeper(arguments.server, record, launcher).keep()
    except Told:
        pass


if __name__ == "__main__":
    run(main)

"""The processes of servers that the pipeline started: whether they run, and their end.

A process is known by its number and its time of creation, and ended together with its process group, nothing else.
"""

import os
import signal
from pathlib import Path

import psutil

from megatron_papo.sglang.server_record import OwnedServer, Server, ServerRecord, read_record

STOP_SECONDS = 20.0


def process_of(record: ServerRecord | None) -> psutil.Process | None:
    """Return the recorded process if it still runs; another process that was given its number since does not count."""
    if record is None:
        return None
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.create_time) < 0.01
    except psutil.NoSuchProcess:
        return None
    return process if same and is_running(process) else None


def is_running(process: psutil.Process) -> bool:
    """Return whether the process is there and not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def process_is_gone(server: Server) -> bool:
    """Return whether a server that this pipeline started has died; False for any other, of which nobody knows."""
    if not isinstance(server, OwnedServer):
        return False
    record = read_record(server.directory)
    return record is None or record.url != server.url or process_of(record) is None


def stop(server_dir: Path) -> bool:
    """End the server of a directory by SIGTERM, after 20 s by SIGKILL. Returns False if none was running."""
    process = process_of(read_record(server_dir))
    if process is not None:
        group = _group(process)
        _signal_group(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(group, timeout=STOP_SECONDS)
        if alive:
            _signal_group(process.pid, signal.SIGKILL)
            psutil.wait_procs(alive, timeout=STOP_SECONDS)
    (server_dir / "server.json").unlink(missing_ok=True)
    return process is not None


def kill(server_dir: Path) -> None:
    """End what is left of the server of a directory at once, by SIGKILL."""
    process = process_of(read_record(server_dir))
    if process is not None:
        group = _group(process)
        _signal_group(process.pid, signal.SIGKILL)
        psutil.wait_procs(group, timeout=STOP_SECONDS)


def _group(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal_group(group: int, which: signal.Signals) -> None:
    try:
        os.killpg(group, which)
    except ProcessLookupError:
        pass

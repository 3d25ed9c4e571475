"""The processes of servers that the pipeline started: whether they run, and their end.

A process is known by its number and by what the kernel says of its start, and ended together with its process group,
nothing else.
"""

import os
import signal
from pathlib import Path

import psutil

from megatron_papo.sglang.leftovers import clear, shared_memory_of
from megatron_papo.sglang.server_record import OwnedServer, Server, ServerRecord, read_record

STOP_SECONDS = 20.0


def identity_of(pid: int) -> str | None:
    """Return what tells a process from another one with the same number; None if it is not there.

    That is the boot of the machine, and the ticks from it to the start of the process: setting the clock moves neither.
    Where the system does not say so, it is the time of its start.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {fields[19]}"  # starttime, the 22nd field; the second one, in brackets, may hold blanks
    except OSError:
        pass
    try:
        return f"started {psutil.Process(pid).create_time():.2f}"
    except psutil.NoSuchProcess:
        return None


def process_of(record: ServerRecord | None) -> psutil.Process | None:
    """Return the recorded process if it still runs; another process that was given its number since does not count."""
    return None if record is None else running_process(record.pid, record.process)


def running_process(pid: int, identity: str) -> psutil.Process | None:
    """Return the process of this number if it runs and is the one that identity_of told apart."""
    if identity_of(pid) != identity:
        return None
    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None
    return process if is_running(process) else None


def is_running(process: psutil.Process) -> bool:
    """Return whether the process is there and not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def process_is_gone(server: Server) -> bool:
    """Return whether a server that this pipeline started on this machine has died; False for any other, of which nobody
    knows."""
    if not isinstance(server, OwnedServer) or server.node is not None:
        return False
    record = read_record(server.directory)
    return record is None or record.url != server.url or process_of(record) is None


def stop(server_dir: Path) -> bool:
    """End the server of a directory by SIGTERM, after 20 s by SIGKILL, and clear away what it leaves, also if it has
    ended already. Returns False if none was running."""
    record = read_record(server_dir)
    process = process_of(record)
    if record is not None:
        _end(record, process, [signal.SIGTERM, signal.SIGKILL])
    (server_dir / "server.json").unlink(missing_ok=True)
    return process is not None


def kill(server_dir: Path) -> None:
    """End what is left of the server of a directory at once, by SIGKILL, and clear away what it leaves."""
    record = read_record(server_dir)
    if record is not None:
        _end(record, process_of(record), [signal.SIGKILL])


def _end(record: ServerRecord, process: psutil.Process | None, signals: list[signal.Signals]) -> None:
    """Send one signal after the other to a process group, until all of its processes have ended; then clear away."""
    alive = orphans_of(record) if process is None else group_of(process)
    pids = [one.pid for one in alive] + ([] if psutil.pid_exists(record.pid) else [record.pid])
    left = set(record.shared_memory) | set(shared_memory_of(pids))
    for which in signals:
        if not alive:
            break
        _signal_group(record.pid, which)
        _, alive = psutil.wait_procs(alive, timeout=STOP_SECONDS)
    clear(record.temporary, left)


def pids_of(process: psutil.Process) -> list[int]:
    """Return the numbers of group_of."""
    return [one.pid for one in group_of(process)]


def group_of(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all that descend from it."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def orphans_of(record: ServerRecord) -> list[psutil.Process]:
    """Return the processes of a server's group that outlived it.

    The group is its own as long as a process is in it that works in the server's temporary directory: a number is not
    given again before the group of that number is empty.
    """
    orphans = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == record.pid and process.environ().get("TMPDIR") == record.temporary:
                orphans.append(process)
        except (OSError, psutil.Error):
            continue
    return orphans


def _signal_group(group: int, which: signal.Signals) -> None:
    try:
        os.killpg(group, which)
    except ProcessLookupError:
        pass

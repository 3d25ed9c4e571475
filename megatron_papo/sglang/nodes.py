"""Servers on several nodes: start them on all, find them again, stop them on all.

The environment variable SERVER_LAUNCHER is a command that runs what follows it once on every server node, and ends when
that has ended on all, e.g. `srun --overlap --nodes=2 --ntasks-per-node=1`. It is given the keeper of a node
(node_keeper.py), which starts server.replicas servers there and ends them when they are not wanted any more. Stages and
keepers speak through the server directory, on a file system that all of them see:

    nodes.json              what is wanted: settings and nodes; the keepers end when it goes
    nodes.log               what launcher and keepers print
    node_NAME/state.json    how far the keeper of a node is
    node_NAME/              server.json, server.log, replica_1/... as in the server directory of one machine
"""

import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from megatron_papo.config import ServerConfig
from megatron_papo.errors import UserError
from megatron_papo.reading import reading, shown
from megatron_papo.sglang.addresses import NodeReport, address_for_others
from megatron_papo.sglang.server_health import problem_of
from megatron_papo.sglang.server_process import STOP_SECONDS, identity_of, running_process
from megatron_papo.sglang.server_record import (
    OwnedServer,
    last_line,
    read_record,
    read_typed,
    replica_dir,
    write_private,
    write_record,
)
from megatron_papo.sglang.server_start import NOT_OF_ONE_SERVER, POLL_SECONDS, REPORT_SECONDS, REPOSITORY

LAUNCHER = "SERVER_LAUNCHER"
KEEPER = [sys.executable, "-m", "megatron_papo.sglang.node_keeper"]
LIST_SECONDS = 120.0
"""For the launcher to reach all nodes."""
WORD_SECONDS = 120.0
"""For a word of a node's keeper to be seen here: network file systems show new files after up to a minute."""
LEAVE_SECONDS = 40.0
"""For the keepers to end their servers."""


class NodesRecord(BaseModel):
    """nodes.json: what is wanted of the keepers, and who started them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    attempt: str
    """Tells the keepers of this start from those of another one."""
    pid: Annotated[int, Field(gt=0, lt=1 << 31)]
    process: str
    """Of the launcher, see server_process.identity_of."""
    launcher: list[str]
    settings: dict[str, JsonValue]
    """What must be the same, beside the launcher, for running servers to be used again."""
    model: str
    """The checkpoint that the servers are started with."""
    dtype: str
    config: dict[str, JsonValue]
    """Section server."""
    addresses: dict[str, str]
    """Node -> the address that its servers listen on."""

    @property
    def server_config(self) -> ServerConfig:
        """Section server, typed."""
        return ServerConfig.model_validate(self.config)


class NodeState(BaseModel):
    """state.json: how far the keeper of a node is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    attempt: str
    ready: bool = False
    problem: str | None = None
    """Why the last start of a server failed."""


@dataclass(frozen=True)
class Wanted:
    """The servers of a stage."""

    directory: Path
    model: Path
    config: ServerConfig
    dtype: str
    launcher: list[str]

    @property
    def settings(self) -> dict[str, JsonValue]:
        """What must be the same, beside the launcher, for running servers to be used again."""
        return {"dtype": self.dtype, **self.config.model_dump(mode="json", exclude=NOT_OF_ONE_SERVER - {"replicas"})}


def server_launcher() -> list[str] | None:
    """Return the words of SERVER_LAUNCHER; None where it is not set. Raises UserError for what is no command."""
    text = os.environ.get(LAUNCHER, "").strip()
    if not text:
        return None
    with reading(f"{LAUNCHER}={text}", "give a command, such as srun --overlap --nodes=2 --ntasks-per-node=1"):
        return shlex.split(text)


def require_own_gpus(config: ServerConfig) -> None:
    """Raise UserError where servers on several nodes are to share GPUs with training, which takes one machine."""
    if config.shares_gpus:
        raise UserError(
            f"server.shares_gpus: is for one machine, {LAUNCHER} starts servers on nodes of their own:"
            f" --set server.shares_gpus=false, or unset {LAUNCHER}"
        )


def node_dir(server_dir: Path, node: str) -> Path:
    """Return the server directory of one node."""
    return server_dir / f"node_{node}"


def connect_or_start(wanted: Wanted) -> list[OwnedServer]:
    """Return the servers of all nodes: those that run, if all do with the same settings, or new ones.

    Raises UserError, naming the node, where one cannot be reached or its servers do not start; none is then left.
    """
    require_own_gpus(wanted.config)
    record = read_nodes(wanted.directory)
    if record is not None:
        servers = _running_servers(wanted, record)
        if servers is not None:
            return servers
        stop(wanted.directory)
    return _start(wanted)


def _running_servers(wanted: Wanted, record: NodesRecord) -> list[OwnedServer] | None:
    """Return the servers that a former stage started, once all are ready; None where they are of no use."""
    if launcher_of(record) is None or (record.launcher, record.settings) != (wanted.launcher, wanted.settings):
        return None
    try:
        return _wait_until_ready(wanted, record)
    except UserError as error:
        print(f"{shown(error, limit=0)}: starting the servers of all nodes again", flush=True)
        return None


def _start(wanted: Wanted) -> list[OwnedServer]:
    reports = list_nodes(wanted.launcher)
    here = identity_of_machine()
    is_one_machine = all(report.machine == here for report in reports)
    addresses = {report.node: address_for_others(report, wanted.config.host, is_one_machine) for report in reports}
    attempt = secrets.token_hex(8)
    process = _run_launcher(wanted, attempt)
    record = NodesRecord(
        attempt=attempt,
        pid=process.pid,
        process=identity_of(process.pid) or "ended at once",
        launcher=wanted.launcher,
        settings=wanted.settings,
        model=str(wanted.model.resolve()),
        dtype=wanted.dtype,
        config=wanted.config.model_dump(mode="json"),
        addresses=addresses,
    )
    write_private(wanted.directory / "nodes.json", record)
    started = time.monotonic()
    try:
        servers = _wait_until_ready(wanted, record)
    except BaseException:
        stop(wanted.directory)
        raise
    seconds = time.monotonic() - started
    print(f"{len(servers)} SGLang servers on {_nodes(addresses)} ready after {seconds:.0f} s", flush=True)
    return servers


def list_nodes(launcher: list[str]) -> list[NodeReport]:
    """Return what each node that the launcher reaches says of itself, by name. Raises UserError."""
    command, shown_launcher = [*launcher, *KEEPER, "--list"], f"{LAUNCHER}={shown(shlex.join(launcher))}"
    cure = "see that it reaches every node (in a job: that the nodes are the job's and are up), and run the stage again"
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=LIST_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"{shown_launcher}: has not come back from all nodes after {LIST_SECONDS:g} s: {cure}")
    except OSError as error:
        raise UserError(f"{shown_launcher}: cannot be run ({error.strerror}): {cure}")
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise UserError(f"{shown_launcher}: ended with status {done.returncode}: {_most_telling(lines)}: {cure}")
    reports = []
    for line in done.stdout.splitlines():
        _, brace, content = line.partition("{")  # a launcher may put the number of the task before a line
        try:
            reports.append(NodeReport.model_validate_json(brace + content))
        except ValidationError:
            continue
    names = sorted(report.node for report in reports)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{shown_launcher}: runs more than once on {shown(', '.join(twice))}: once on each node is wanted"
            " (--ntasks-per-node=1)"
        )
    if not names:
        raise UserError(f"{shown_launcher}: does not run the command that follows it: {cure}")
    return sorted(reports, key=lambda report: report.node)


def _most_telling(lines: list[str]) -> str:
    """Return the line of a launcher's output that says what went wrong: the first that calls itself an error."""
    telling = [line for line in lines if "error" in line.lower()] or lines[-1:]
    return shown(telling[0]) if telling else "it said nothing"


def identity_of_machine() -> str:
    """Return what is the same for all processes of one machine since it was started."""
    with reading("/proc/sys/kernel/random/boot_id", "servers on several nodes need Linux"):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def node_name() -> str:
    """Return the name of this node: SLURM's, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _run_launcher(wanted: Wanted, attempt: str) -> subprocess.Popen[bytes]:
    directory = wanted.directory.resolve()
    command = [*wanted.launcher, *KEEPER, "--server", str(directory), "--attempt", attempt]
    with reading(directory, "choose another --server, or make room"):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / "nodes.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as log:
            return subprocess.Popen(
                command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )


def _wait_until_ready(wanted: Wanted, record: NodesRecord) -> list[OwnedServer]:
    """Wait until the keepers of all nodes say that their servers are ready, and see whether they are reached from here.

    Raises UserError that names the node with which something is wrong.
    """
    started = reported = time.monotonic()
    while True:
        states = {node: read_state(wanted.directory, node, record.attempt) for node in record.addresses}
        waiting = [node for node, state in states.items() if state is None or not state.ready]
        if not waiting:
            break
        seconds = time.monotonic() - started
        problem = _problem_of_start(wanted, states, seconds, is_over=launcher_of(record) is None)
        if problem is not None:
            raise UserError(problem)
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            print(f"SGLang servers are starting, {seconds:.0f} s, not ready: {shown(', '.join(waiting))}", flush=True)
        time.sleep(POLL_SECONDS)
    servers = servers_of(wanted.directory, record)
    with ThreadPoolExecutor(len(servers)) as threads:
        for server, problem in zip(servers, threads.map(problem_of, servers), strict=True):
            if problem is not None:
                raise UserError(
                    f"node {shown(server.node)}: its server {server.url} {problem}, as seen from {node_name()}:"
                    " --set server.host= the network interface (ib0, eth0) on which the nodes reach each other"
                )
    return servers


def _problem_of_start(
    wanted: Wanted, states: Mapping[str, NodeState | None], seconds: float, is_over: bool
) -> str | None:
    """Return why servers that are starting will not be ready, naming their node; None while they may.

    Args:
        wanted: The servers.
        states: Of each node.
        seconds: Since their start.
        is_over: The launcher has ended.
    """
    log, timeout = last_line(wanted.directory / "nodes.log"), wanted.config.start_timeout_seconds
    for node, state in states.items():
        if state is not None and state.problem is not None:
            return f"node {shown(node)}: {state.problem}"
    waiting = shown(", ".join(node for node, state in states.items() if state is None or not state.ready))
    silent = shown(", ".join(node for node, state in states.items() if state is None))
    if is_over:
        return f"node {waiting}: {LAUNCHER} ended before the servers there were ready: {log}"
    if silent and seconds > WORD_SECONDS:
        where = shown(wanted.directory)
        return (
            f"node {silent}: no word from there after {seconds:.0f} s: is {where} on a file system of all nodes? {log}"
        )
    if seconds > timeout + WORD_SECONDS:
        return f"node {waiting}: not ready within server.start_timeout_seconds = {timeout:g}: raise it; {log}"
    return None


def servers_of(server_dir: Path, record: NodesRecord) -> list[OwnedServer]:
    """Return the servers on record of all nodes, node by node. Raises UserError where one is missing."""
    servers = []
    for node in record.addresses:
        for replica, directory in enumerate(_replica_dirs(server_dir, node, record)):
            of_server = read_record(directory)
            if of_server is None or of_server.lost:
                raise UserError(f"node {shown(node)}: its server {replica} is gone")
            servers.append(of_server.server(directory, replica, node))
    return servers


def _replica_dirs(server_dir: Path, node: str, record: NodesRecord) -> list[Path]:
    directory = node_dir(server_dir.resolve(), node)
    return [replica_dir(directory, number) for number in range(record.server_config.replicas)]


def restart(lost: OwnedServer, model: Path, start_timeout_seconds: float) -> OwnedServer:
    """Return the server that the keeper of a node starts in the place of one that died or hangs.

    Args:
        lost: Which.
        model: Checkpoint that the new one is started with.
        start_timeout_seconds: How long that may take.

    Raises UserError, naming the node, where the keeper does not answer or cannot.
    """
    assert lost.node is not None
    server_dir = (lost.directory if lost.replica == 0 else lost.directory.parent).parent
    nodes, before = read_nodes(server_dir), read_record(lost.directory)
    if nodes is None or before is None or launcher_of(nodes) is None:
        raise UserError(f"node {shown(lost.node)}: the keeper of its servers is gone")
    write_record(lost.directory, before.but(lost=True, model=str(model)))
    started = time.monotonic()
    while True:
        time.sleep(POLL_SECONDS)
        record, state = read_record(lost.directory), read_state(server_dir, lost.node, nodes.attempt)
        is_noticed = record is None or not record.lost
        if record is not None and record.ready and is_noticed:
            return record.server(lost.directory, lost.replica, lost.node)
        if is_noticed and state is not None and state.problem is not None:
            raise UserError(f"node {shown(lost.node)}: {state.problem}")
        seconds = time.monotonic() - started
        if launcher_of(nodes) is None or (not is_noticed and seconds > WORD_SECONDS):
            raise UserError(f"node {shown(lost.node)}: the keeper of its servers does not answer")
        if seconds > start_timeout_seconds + WORD_SECONDS:
            raise UserError(f"node {shown(lost.node)}: no new server within server.start_timeout_seconds: raise it")


def stop(server_dir: Path) -> int:
    """End the servers of all nodes, and the launcher. Returns how many were on record; 0 where there are no nodes."""
    record = read_nodes(server_dir)
    if record is None:
        return 0
    process, on_record = launcher_of(record), len(_on_record(server_dir, record))
    (server_dir / "nodes.json").unlink(missing_ok=True)  # upon which the keepers end their servers and themselves
    deadline = time.monotonic() + LEAVE_SECONDS
    while time.monotonic() < deadline:
        staying = [node for node in record.addresses if read_state(server_dir, node, record.attempt) is not None]
        if launcher_of(record) is None and (process is not None or not staying):
            break
        time.sleep(POLL_SECONDS / 5)
    for which in (signal.SIGTERM, signal.SIGKILL):
        left = launcher_of(record)
        if left is None:
            break
        os.killpg(record.pid, which)
        psutil.wait_procs([left], timeout=STOP_SECONDS)
    _end_orphans(server_dir, record)
    return on_record


def _end_orphans(server_dir: Path, record: NodesRecord) -> None:
    """End the servers of keepers that were killed, by way of the launcher; those of a node that is gone are named."""
    if not _on_record(server_dir, record):
        return
    command = [*record.launcher, *KEEPER, "--end", "--server", str(server_dir.resolve())]
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, timeout=LEAVE_SECONDS)
    gone = sorted({node for node, _ in _on_record(server_dir, record)})
    if gone:
        print(f"node {shown(', '.join(gone))}: not reached: if it is up, servers may still run there", flush=True)


def _on_record(server_dir: Path, record: NodesRecord) -> list[tuple[str, Path]]:
    """Return node and directory of each server that is on record."""
    places = [(node, place) for node in record.addresses for place in _replica_dirs(server_dir, node, record)]
    return [(node, place) for node, place in places if (place / "server.json").exists()]


def status(server_dir: Path, record: NodesRecord) -> list[tuple[bool, str]]:
    """Return, for each server of each node, whether it can be used and a line that says so."""
    lines = []
    for node in record.addresses:
        for replica, directory in enumerate(_replica_dirs(server_dir, node, record)):
            of_server = read_record(directory)
            if of_server is None:
                lines.append((False, f"{directory}: no server is running on node {node}"))
                continue
            server = of_server.server(directory, replica, node)
            problem = problem_of(server)
            lines.append(
                (problem is None, f"{directory}: {server.name}{' is healthy' if not problem else f': {problem}'}")
            )
    return lines


def launcher_of(record: NodesRecord) -> psutil.Process | None:
    """Return the launcher if it still runs."""
    return running_process(record.pid, record.process)


def read_nodes(server_dir: Path) -> NodesRecord | None:
    """Return what is wanted of the keepers; None if nothing is. Raises UserError for a damaged file."""
    return read_typed(
        server_dir / "nodes.json", NodesRecord, "stop its servers by hand if they run, and remove the file"
    )


def read_state(server_dir: Path, node: str, attempt: str) -> NodeState | None:
    """Return how far the keeper of this attempt is on a node; None if it has not said anything."""
    path = node_dir(server_dir, node) / "state.json"
    state = read_typed(path, NodeState, "remove the file, and run the stage again")
    return state if state is not None and state.attempt == attempt else None


def _nodes(addresses: dict[str, str]) -> str:
    return f"{len(addresses)} node(s) ({shown(', '.join(addresses))})"

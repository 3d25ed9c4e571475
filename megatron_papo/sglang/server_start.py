"""Start one SGLang server: its command, its port, and the wait until it answers.

A server runs in SGLang's own Python environment, detached, on the loopback interface unless the configuration says
otherwise, with a random key, which it is told through a pipe.
"""

import os
import random
import secrets
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from megatron_papo.config import ServerConfig
from megatron_papo.distributed.gpus import count_gpus
from megatron_papo.errors import UserError
from megatron_papo.reading import reading, shown
from megatron_papo.sglang.addresses import own_address
from megatron_papo.sglang.compilers import missing_for_server
from megatron_papo.sglang.leftovers import shared_memory_of, temporary_directory
from megatron_papo.sglang.server_environment import server_environment
from megatron_papo.sglang.server_health import problem_of
from megatron_papo.sglang.server_process import identity_of, is_running, kill, pids_of, stop
from megatron_papo.sglang.server_record import OwnedServer, ServerRecord, last_words, log_tail, write_record

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER, CPU_LAUNCHER = (Path(__file__).resolve().with_name(name) for name in ("launcher.py", "cpu_launcher.py"))
PORT_ATTEMPTS = 3
POLL_SECONDS = 0.5
REPORT_SECONDS = 15.0
"""How often a server that is starting is spoken of."""
ONE_PROCESS = "server.tensor_parallel_size: a server on a CPU is one process: --set server.tensor_parallel_size=1"
NOT_OF_ONE_SERVER = {
    "start_timeout_seconds", "replicas", "health_interval_seconds", "health_timeout_seconds", "max_restarts",
}  # fmt: skip
"""Fields of ServerConfig that a running server need not have been started with."""


@dataclass(frozen=True)
class Launch:
    """What a server is started with."""

    directory: Path
    """Where server.json and server.log go."""
    replica: int
    model: Path
    """Checkpoint to load first."""
    config: ServerConfig
    dtype: str

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a running server to be used again."""
        return {"dtype": self.dtype, **self.config.model_dump(exclude=NOT_OF_ONE_SERVER)}

    @property
    def name(self) -> str:
        return "SGLang server" if self.replica == 0 else f"SGLang replica {self.replica}"


class _PortTaken(UserError):
    """Another program took the port between our choice and the moment, seconds later, at which the server wanted it."""


def start(launch: Launch) -> OwnedServer:
    """Start a server and return it once it answers; what another one has left in its directory is cleared away.

    Raises UserError if it lacks a compiler, or dies or takes too long; it is then ended.
    """
    require_tools(launch.config)
    kill(launch.directory)
    for _ in range(PORT_ATTEMPTS - 1 if launch.config.port == 0 else 0):
        try:
            return _start_once(launch)
        except _PortTaken as error:
            print(f"{error}: trying another", flush=True)
    return _start_once(launch)


def _start_once(launch: Launch) -> OwnedServer:
    config, host = launch.config, own_address(launch.config.host)
    port = free_port(host, config.port + launch.replica if config.port else 0)
    api_key = secrets.token_hex(16)
    command = [*launcher(sglang_python(config), config, launch.replica)]
    command += ["--model-path", str(launch.model), "--dtype", launch.dtype]
    command += ["--host", host, "--port", str(port)]
    if config.max_total_tokens is not None:
        command += ["--max-total-tokens", str(config.max_total_tokens)]
    command += config.extra_arguments
    with reading(launch.directory, "choose another --server, or make room"):
        temporary = temporary_directory(launch.directory)
        started = _run_detached(command, launch.directory, temporary)
        process = psutil.Process(started.pid)
    record = ServerRecord(
        url=f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}",
        api_key=api_key,
        pid=process.pid,
        process=identity_of(process.pid) or "ended at once",
        create_time=time.time(),
        model=str(launch.model),
        settings=launch.settings,
        command=command,
        temporary=str(temporary),
    )
    write_record(launch.directory, record)
    _tell_key(started, api_key)  # one that is not on record ends without it
    return wait_until_ready(launch, process, record)


def _run_detached(command: list[str], directory: Path, temporary: Path) -> subprocess.Popen[bytes]:
    """Run a command in a session and an environment of its own, with a pipe as its stdin; what it prints goes to
    server.log, readable by the owner only."""
    log_file = directory / "server.log"
    if log_file.exists():
        log_file.replace(directory / "server.log.previous")
    with os.fdopen(os.open(log_file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=directory,
            env=server_environment(os.environ, temporary, command),
            start_new_session=True,
        )


def _tell_key(started: subprocess.Popen[bytes], api_key: str) -> None:
    assert started.stdin is not None
    with suppress(BrokenPipeError), started.stdin:  # it has ended already, which is noticed at once
        started.stdin.write(f"{api_key}\n".encode())


def wait_until_ready(launch: Launch, process: psutil.Process, record: ServerRecord) -> OwnedServer:
    """Wait until the server answers, with a line now and then that says how long it has taken and the log's last line.

    Raises UserError if it dies or does not answer in time; it is then ended.
    """
    server, directory = record.server(launch.directory, launch.replica), launch.directory
    started = reported = time.monotonic()
    try:
        while True:
            if not is_running(process):
                print(*log_tail(directory), sep="\n", flush=True)
                raise UserError(f"the SGLang server died while starting: {last_words(directory)}")
            made = shared_memory_of(pids_of(process))
            if made != record.shared_memory:
                record = record.but(shared_memory=made)
                write_record(directory, record)
            if problem_of(server, timeout_seconds=5.0) is None:
                break
            if any("address already in use" in line for line in log_tail(directory)):
                # SGLang logs it and keeps running without listening
                raise _PortTaken(f"{server.url}: the port was taken while SGLang started")
            now, timeout = time.monotonic(), launch.config.start_timeout_seconds
            if now - started > timeout:
                print(*log_tail(directory), sep="\n", flush=True)
                raise UserError(
                    f"the SGLang server did not answer within server.start_timeout_seconds = {timeout:g}: raise it;"
                    f" {last_words(directory)}"
                )
            if now - reported > REPORT_SECONDS:
                reported = now
                last_line = shown("".join(log_tail(directory, 1)).strip(), limit=100)
                print(f"{launch.name} is starting, {now - started:.0f} s: {last_line}", flush=True)
            time.sleep(POLL_SECONDS)
    except BaseException:
        stop(directory)
        raise
    write_record(directory, record.but(ready=True, shared_memory=shared_memory_of(pids_of(process))))
    seconds = time.monotonic() - started
    print(f"{launch.name} ready at {server.url} after {seconds:.0f} s, log: {directory}/server.log", flush=True)
    return server


def launcher(python: Path, config: ServerConfig, replica: int) -> list[str]:
    """Return the beginning of the command: launcher.py on GPUs, cpu_launcher.py on a machine without any."""
    if _has_gpu(config):
        tp_size = config.tensor_parallel_size
        command = [str(python), "-P", str(LAUNCHER)]
        if config.deterministic:
            command.append("--enable-deterministic-inference")
        command += ["--tp", str(tp_size), "--mem-fraction-static", str(config.memory_fraction)]
        if config.shares_gpus:
            command += ["--enable-memory-saver", "--enable-weights-cpu-backup"]
        return [*command, "--base-gpu-id", str(config.first_gpu + replica * tp_size)]
    if config.tensor_parallel_size > 1:
        raise UserError(ONE_PROCESS)
    return [str(python), "-P", str(CPU_LAUNCHER)]


def problems(config: ServerConfig) -> list[str]:
    """Return why servers cannot be started with this configuration on this machine, as far as it can be known before:
    one line each, with what to do."""
    found = [] if config.tensor_parallel_size == 1 or _has_gpu(config) else [ONE_PROCESS]
    checks: list[Callable[[], object]] = [lambda: require_tools(config), lambda: own_address(config.host)]
    if config.port:
        ports = range(config.port, config.port + config.replicas)
        checks += [partial(free_port, config.host, port) for port in ports]
    for check in checks:
        try:
            check()
        except UserError as error:
            found += [line for line in error.lines if line not in found]
    return found


def _has_gpu(config: ServerConfig) -> bool:
    """Say whether servers compute on GPUs: those that this process sees, unless extra_arguments say `--device cpu`."""
    flags = " ".join(config.extra_arguments).replace("=", " ")
    return "--device cpu" not in flags and count_gpus() > 0


def sglang_python(config: ServerConfig) -> Path:
    """Return the Python interpreter of SGLang's environment, of which there is one for CPUs and one for GPUs.

    Raises UserError if there is none.
    """
    device, environment = ("cuda", ".venv-sglang-cuda") if _has_gpu(config) else ("cpu", ".venv-sglang")
    named = config.python or os.environ.get("SGLANG_PYTHON")
    python = Path(named).absolute() if named else REPOSITORY / environment / "bin" / "python"
    if not python.is_file():
        raise UserError(
            f"{python}: no such Python for SGLang: run DEVICE={device} bash tools/setup_environment.sh, or set"
            " server.python or $SGLANG_PYTHON"
        )
    return python


def require_tools(config: ServerConfig) -> None:
    """Raise UserError where there is no Python for SGLang, or one on GPUs lacks what compiles its kernels."""
    python = sglang_python(config)
    lines = missing_for_server(python, os.environ) if _has_gpu(config) else []
    if lines:
        raise UserError(*lines)


def free_port(host: str, port: int) -> int:
    """Return the given port if it can be had; for 0 a free one.

    A free port is chosen, if possible, from those that the system does not give to outgoing connections meanwhile.
    """
    host = own_address(host)
    if port == 0:
        below = list(range(20000, first_ephemeral_port()))
        for candidate in random.sample(below, min(100, len(below))):
            if _why_taken(host, candidate) is None:
                return candidate
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
            return probe.getsockname()[1]
    problem = _why_taken(host, port)
    if problem is not None:
        raise UserError(f"server.port {port} on {host}: {problem}: choose another, or 0 for any free port")
    return port


def _why_taken(host: str, port: int) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror
    return None


def first_ephemeral_port() -> int:
    """Return the lowest port that the system gives to outgoing connections."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768

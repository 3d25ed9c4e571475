"""Start one SGLang server: its command, its port, and the wait until it answers.

A server runs in SGLang's own Python environment, detached, on the loopback interface unless the configuration says
otherwise, with a random key.
"""

import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from megatron_papo.config import ServerConfig
from megatron_papo.errors import UserError
from megatron_papo.sglang.server_health import problem_of
from megatron_papo.sglang.server_process import is_running, stop
from megatron_papo.sglang.server_record import OwnedServer, ServerRecord, log_tail, write_record

REPOSITORY = Path(__file__).resolve().parents[2]
CPU_LAUNCHER = Path(__file__).resolve().parent / "cpu_launcher.py"
PORT_ATTEMPTS = 3
POLL_SECONDS = 0.5
REPORT_SECONDS = 15.0
"""How often a server that is starting is spoken of."""
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
    def settings(self) -> dict[str, object]:
        """What must be the same for a running server to be used again."""
        return {"dtype": self.dtype, **self.config.model_dump(exclude=NOT_OF_ONE_SERVER)}

    @property
    def name(self) -> str:
        return "SGLang server" if self.replica == 0 else f"SGLang replica {self.replica}"


class _PortTaken(UserError):
    """Another program took the port between our choice and the moment, seconds later, at which the server wanted it."""


def start(launch: Launch) -> OwnedServer:
    """Start a server and return it once it answers. Raises UserError if it dies or takes too long; it is then ended."""
    for _ in range(PORT_ATTEMPTS - 1 if launch.config.port == 0 else 0):
        try:
            return _start_once(launch)
        except _PortTaken as error:
            print(f"{error}: trying another", flush=True)
    return _start_once(launch)


def _start_once(launch: Launch) -> OwnedServer:
    config = launch.config
    port = free_port(config.host, config.port + launch.replica if config.port else 0)
    api_key = secrets.token_hex(16)
    command = [*launcher(sglang_python(config), config, launch.replica)]
    command += ["--model-path", str(launch.model), "--dtype", launch.dtype]
    command += ["--host", config.host, "--port", str(port), "--api-key", api_key]
    if config.max_total_tokens is not None:
        command += ["--max-total-tokens", str(config.max_total_tokens)]
    command += config.extra_arguments
    process = _run_detached(command, launch.directory)
    host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
    record = ServerRecord(
        url=f"http://{host}:{port}",
        api_key=api_key,
        pid=process.pid,
        create_time=process.create_time(),
        model=str(launch.model),
        settings=launch.settings,
        command=command,
    )
    write_record(launch.directory, record)
    return wait_until_ready(launch, process, record)


def _run_detached(command: list[str], directory: Path) -> psutil.Process:
    """Run a command in a session of its own; what it prints goes to server.log, readable by the owner only."""
    directory.mkdir(parents=True, exist_ok=True)
    log_file = directory / "server.log"
    if log_file.exists():
        log_file.replace(directory / "server.log.previous")
    environment = {**os.environ, "SGLANG_VLM_CACHE_SIZE_MB": "0"}  # ViT outputs survive an update (sglang#36468)
    with os.fdopen(os.open(log_file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as log:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=directory,
            env=environment,
            start_new_session=True,
        )
    return psutil.Process(popen.pid)


def wait_until_ready(launch: Launch, process: psutil.Process, record: ServerRecord) -> OwnedServer:
    """Wait until the server answers, with a line now and then that says how long it has taken and the log's last line.

    Raises UserError if it dies or does not answer in time; it is then ended.
    """
    server, directory = record.server(launch.directory, launch.replica), launch.directory
    started = reported = time.monotonic()
    try:
        while True:
            if not is_running(process):
                raise UserError(
                    f"the SGLang server died while starting; {directory}/server.log ends:\n{log_tail(directory)}"
                )
            if problem_of(server, timeout_seconds=5.0) is None:
                break
            if "address already in use" in log_tail(directory):  # SGLang logs it and keeps running without listening
                raise _PortTaken(f"{server.url}: the port was taken while SGLang started")
            now, timeout = time.monotonic(), launch.config.start_timeout_seconds
            if now - started > timeout:
                raise UserError(
                    f"the SGLang server did not answer within server.start_timeout_seconds = {timeout:g}: raise it;"
                    f" {directory}/server.log ends:\n{log_tail(directory)}"
                )
            if now - reported > REPORT_SECONDS:
                reported = now
                last_line = log_tail(directory, 1).strip()[:100]
                print(f"{launch.name} is starting, {now - started:.0f} s: {last_line}", flush=True)
            time.sleep(POLL_SECONDS)
    except BaseException:
        stop(directory)
        raise
    write_record(directory, replace(record, ready=True))
    seconds = time.monotonic() - started
    print(f"{launch.name} ready at {server.url} after {seconds:.0f} s, log: {directory}/server.log", flush=True)
    return server


def launcher(python: Path, config: ServerConfig, replica: int) -> list[str]:
    """Return the beginning of the command: SGLang's own server on GPUs, cpu_launcher.py on a machine without any."""
    if _has_gpu(config):
        tp_size = config.tensor_parallel_size
        command = [str(python), "-m", "sglang.launch_server", "--enable-deterministic-inference"]
        command += ["--tp", str(tp_size), "--mem-fraction-static", str(config.memory_fraction)]
        if config.shares_gpus:
            command += ["--enable-memory-saver", "--enable-weights-cpu-backup"]
        return [*command, "--base-gpu-id", str(config.first_gpu + replica * tp_size)]
    if config.tensor_parallel_size > 1:
        raise UserError("server.tensor_parallel_size: a server on a CPU is one process: set it to 1")
    return [str(python), "-P", str(CPU_LAUNCHER)]


def _has_gpu(config: ServerConfig) -> bool:
    """Ask nvidia-smi, as tools/setup_environment.sh does to choose which SGLang to install.

    `--device cpu` in extra_arguments overrules it.
    """
    flags = " ".join(config.extra_arguments).replace("=", " ")
    if (
        "--device cpu" in flags
        or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        or not shutil.which("nvidia-smi")
    ):
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def sglang_python(config: ServerConfig) -> Path:
    """Return the Python interpreter of SGLang's environment. Raises UserError if there is none."""
    named = config.python or os.environ.get("SGLANG_PYTHON")
    python = Path(named).absolute() if named else REPOSITORY / ".venv-sglang" / "bin" / "python"
    if not python.is_file():
        raise UserError(
            f"{python}: no such Python for SGLang: run bash tools/setup_environment.sh, or set server.python or"
            " $SGLANG_PYTHON"
        )
    return python


def free_port(host: str, port: int) -> int:
    """Return the given port if it can be had; for 0 a free one.

    A free port is chosen, if possible, from those that the system does not give to outgoing connections meanwhile.
    """
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

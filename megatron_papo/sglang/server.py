"""SGLang servers: start them, find them again, stop them. They outlive the stage that started them; iterations load
their weights into them.

A server directory holds server.json (url, key, process, what it was started with) and server.log; those of further
replicas are in replica_1, replica_2, ... below it. A server runs in SGLang's own Python environment, detached, on the
loopback interface unless the configuration says otherwise, with a random key. Processes are ended by their number,
which must still have its time of creation.
"""

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from megatron_papo.config import ServerConfig
from megatron_papo.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
CPU_LAUNCHER = Path(__file__).resolve().parent / "cpu_launcher.py"
HEALTH_TIMEOUT_SECONDS = 30.0
"""/health generates a token, which takes about a second; SGLang itself gives up after 20."""
STOP_SECONDS = 20.0
PORT_ATTEMPTS = 3
MEMORY_TIMEOUT_SECONDS = 300.0
"""For a server to give up its GPU memory, or to get it back: some gigabytes are copied."""
LOG_LINES = 30
NOT_OF_ONE_SERVER = {
    "start_timeout_seconds", "replicas", "health_interval_seconds", "health_timeout_seconds", "max_restarts",
}  # fmt: skip
"""Fields of ServerConfig that a running server need not have been started with."""


@dataclass(frozen=True)
class Server:
    url: str
    api_key: str | None = None
    directory: Path | None = None
    """Where server.json and server.log are; None for a server given by its URL."""
    replica: int = 0

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def open_servers(where: str, model: Path, server: ServerConfig, dtype: str) -> list[Server]:
    """What --server names: URLs (http..., separated by commas) of running servers, or a server directory, in which they
    are started."""
    if where.startswith(("http://", "https://")):
        if server.shares_gpus:
            raise UserError(
                "server.shares_gpus: is for servers that the stages start (--server DIR): whoever starts others"
                " manages their memory"
            )
        return [connect(url, os.environ.get("SGLANG_API_KEY"), dtype) for url in where.split(",")]
    return connect_or_start_all(Path(where), model, server, dtype)


def connect(url: str, api_key: str | None, dtype: str | None = None) -> Server:
    """A server that somebody else started. Raises UserError if it does not answer, refuses the key or computes in
    another dtype."""
    server = Server(url.strip().rstrip("/"), api_key)
    problem = _problem(server)
    if problem:
        raise UserError(
            f"{server.url}: {problem}: start SGLang there, set SGLANG_API_KEY if it has a key, or give --server a"
            " directory"
        )
    with _client(server, HEALTH_TIMEOUT_SECONDS) as client:
        check_settings(server.url, client.get("/server_info").json(), dtype)
    return server


def check_settings(url: str, info: dict, dtype: str | None) -> None:
    """Settings of a foreign server, from its /server_info, that rollouts depend on. UserError for the dtype; the others
    are said aloud."""
    if dtype is not None and info.get("dtype") not in (dtype, "auto"):
        raise UserError(
            f"{url}: computes in {info.get('dtype')}, model.dtype is {dtype}: start that server with --dtype {dtype}"
        )
    if not info.get("enable_deterministic_inference"):
        print(
            f"{url}: runs without --enable-deterministic-inference: it ignores seeds, so its rollouts cannot be made"
            " again",
            flush=True,
        )


def connect_or_start_all(server_dir: Path, model: Path, server: ServerConfig, dtype: str) -> list[Server]:
    """server.replicas servers, all at once; further ones of a former configuration are stopped."""
    for directory in _replica_dirs(server_dir):
        if directory not in [replica_dir(server_dir, number) for number in range(server.replicas)]:
            stop(directory)
    with ThreadPoolExecutor(server.replicas) as threads:
        started = [
            threads.submit(connect_or_start, server_dir, model, server, dtype, number)
            for number in range(server.replicas)
        ]
        return [one.result() for one in started]


def replica_dir(server_dir: Path, number: int) -> Path:
    """Of the replica with this number, from 0."""
    return Path(server_dir) if number == 0 else Path(server_dir) / f"replica_{number}"


def _replica_dirs(server_dir: Path) -> list[Path]:
    return [Path(server_dir), *sorted(Path(server_dir).glob("replica_*"))]


def connect_or_start(server_dir: Path, model: Path, server: ServerConfig, dtype: str, replica: int = 0) -> Server:
    """The server of server_dir if it is alive, answers and was started with the same settings; else a new one, loaded
    with `model`."""
    directory = replica_dir(Path(server_dir).resolve(), replica)
    settings = {"dtype": dtype, **server.model_dump(exclude=NOT_OF_ONE_SERVER)}
    record = _read_record(directory)
    process = _process_of(record)
    if process is not None and record["settings"] == settings:
        running = Server(record["url"], record["api_key"], directory, replica)
        if record.get("released"):
            _call_memory(running, record, "resume_memory_occupation", released=False)
        problem = None if not record["ready"] else _problem(running)
        if problem is None:
            return (
                running
                if record["ready"]
                else _wait_until_ready(running, process, record, server.start_timeout_seconds)
            )
        print(f"{running.url}: {problem}: starting a new server", flush=True)
    if process is not None:
        stop(directory)
    return _start(directory, Path(model).resolve(), server, dtype, settings, replica)


def release_memory(servers: list[Server]) -> None:
    """Has servers that the pipeline started give up their GPU memory, until connect_or_start finds them again. They
    must be idle."""
    for server in servers:
        _call_memory(server, _read_record(server.directory), "release_memory_occupation", released=True)


def _call_memory(server: Server, record: dict, call: str, released: bool) -> None:
    """server.json says first what is going to hold, so that a server whose state nobody knows (a killed stage) counts
    as released."""
    try:
        if released:
            _write_record(server.directory, {**record, "released": True})
        with _client(server, MEMORY_TIMEOUT_SECONDS) as client:
            client.post(f"/{call}", json={}).raise_for_status()
    except httpx.HTTPError as error:
        stop(server.directory)
        raise UserError(
            f"{server.url}: /{call} failed ({type(error).__name__}: {error}): the server was stopped; run the stage"
            " again"
        )
    if not released:
        _write_record(server.directory, {**record, "released": False})


def restart(lost: Server, model: Path, server: ServerConfig, dtype: str) -> Server:
    """A new server in the place of one that died or hangs; what is left of it is killed without asking."""
    process = _process_of(_read_record(lost.directory))
    if process is not None:
        group = _group(process)
        _signal_group(process.pid, signal.SIGKILL)
        psutil.wait_procs(group, timeout=STOP_SECONDS)
    settings = {"dtype": dtype, **server.model_dump(exclude=NOT_OF_ONE_SERVER)}
    return _start(lost.directory, Path(model).resolve(), server, dtype, settings, lost.replica)


def process_is_gone(server: Server) -> bool:
    """Whether a server that this pipeline started has died; False for one given by its URL, of which nobody knows."""
    if server.directory is None:
        return False
    record = _read_record(server.directory)
    return record is None or record["url"] != server.url or _process_of(record) is None


def stop_all(server_dir: Path) -> int:
    """Ends all replicas of server_dir. -> how many were running."""
    return sum(stop(directory) for directory in _replica_dirs(server_dir))


def stop(server_dir: Path) -> bool:
    """Ends the server of server_dir: SIGTERM, after 20 s SIGKILL, to its process group only. False if none was
    running."""
    server_dir = Path(server_dir)
    process = _process_of(_read_record(server_dir))
    if process is not None:
        group = _group(process)
        _signal_group(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(group, timeout=STOP_SECONDS)
        if alive:
            _signal_group(process.pid, signal.SIGKILL)
            psutil.wait_procs(alive, timeout=STOP_SECONDS)
    (server_dir / "server.json").unlink(missing_ok=True)
    return process is not None


def status(server_dir: Path) -> list[tuple[bool, str]]:
    """(usable, one line that says so) for each replica of server_dir."""
    return [_status(directory) for directory in _replica_dirs(server_dir)]


def _status(server_dir: Path) -> tuple[bool, str]:
    record = _read_record(Path(server_dir))
    process = _process_of(record)
    if process is None:
        return False, f"{server_dir}: no server is running"
    if record.get("released"):
        return (
            True,
            f"{server_dir}: process {process.pid} at {record['url']} has given up its GPU memory until a stage wants"
            " it",
        )
    problem = _problem(Server(record["url"], record["api_key"]))
    if problem:
        return False, f"{server_dir}: process {process.pid} at {record['url']}: {problem}"
    return True, f"{server_dir}: process {process.pid} at {record['url']} is healthy"


def log_tail(server_dir: Path, lines: int = LOG_LINES) -> str:
    """The last lines of server.log, indented; empty if there is none."""
    try:
        text = (Path(server_dir) / "server.log").read_bytes()[-65536:].decode(errors="replace")
    except OSError:
        return ""
    return "\n".join("  " + line for line in text.splitlines()[-lines:])


class _PortTaken(UserError):
    """Somebody took the port between our choice and the moment, some seconds later, at which the server wanted it."""


def _start(server_dir: Path, model: Path, server: ServerConfig, dtype: str, settings: dict, replica: int) -> Server:
    for _ in range(PORT_ATTEMPTS - 1 if server.port == 0 else 0):
        try:
            return _start_once(server_dir, model, server, dtype, settings, replica)
        except _PortTaken as error:
            print(f"{error}: trying another", flush=True)
    return _start_once(server_dir, model, server, dtype, settings, replica)


def _start_once(
    server_dir: Path, model: Path, server: ServerConfig, dtype: str, settings: dict, replica: int
) -> Server:
    python = _python(server)
    port = _port(server.host, server.port + replica if server.port else 0)
    api_key = secrets.token_hex(16)
    command = [*_launcher(python, server, replica), "--model-path", str(model), "--dtype", dtype]
    command += ["--host", server.host, "--port", str(port), "--api-key", api_key]
    if server.max_total_tokens is not None:
        command += ["--max-total-tokens", str(server.max_total_tokens)]
    command += server.extra_arguments
    server_dir.mkdir(parents=True, exist_ok=True)
    log_file = server_dir / "server.log"
    if log_file.exists():
        log_file.replace(server_dir / "server.log.previous")
    log_descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT, 0o600)
    environment = {
        **os.environ,
        "SGLANG_VLM_CACHE_SIZE_MB": "0",
    }  # cached ViT outputs survive a weight update (sglang#36468)
    with os.fdopen(log_descriptor, "w") as log:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=server_dir,
            env=environment,
            start_new_session=True,
        )
    process = psutil.Process(popen.pid)
    host = "127.0.0.1" if server.host == "0.0.0.0" else server.host
    record = {
        "url": f"http://{host}:{port}",
        "api_key": api_key,
        "pid": process.pid,
        "create_time": process.create_time(),
        "ready": False,
        "model": str(model),
        "settings": settings,
        "command": command,
    }
    _write_record(server_dir, record)
    return _wait_until_ready(
        Server(record["url"], api_key, server_dir, replica), process, record, server.start_timeout_seconds
    )


def _launcher(python: Path, server: ServerConfig, replica: int) -> list[str]:
    if _has_gpu(server):
        tp = server.tensor_parallel_size
        command = [str(python), "-m", "sglang.launch_server", "--enable-deterministic-inference"]
        command += ["--tp", str(tp), "--mem-fraction-static", str(server.memory_fraction)]
        if server.shares_gpus:
            command += ["--enable-memory-saver", "--enable-weights-cpu-backup"]
        return command + ["--base-gpu-id", str(server.first_gpu + replica * tp)]
    if server.tensor_parallel_size > 1:
        raise UserError("server.tensor_parallel_size: a server on a CPU is one process: set it to 1")
    return [str(python), "-P", str(CPU_LAUNCHER)]


def _has_gpu(server: ServerConfig) -> bool:
    """By nvidia-smi, as tools/setup_environment.sh decides which SGLang to install; `--device cpu` in extra_arguments
    overrules."""
    flags = " ".join(server.extra_arguments).replace("=", " ")
    if (
        "--device cpu" in flags
        or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        or not shutil.which("nvidia-smi")
    ):
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def _python(server: ServerConfig) -> Path:
    named = server.python or os.environ.get("SGLANG_PYTHON")
    python = Path(named).absolute() if named else REPOSITORY / ".venv-sglang" / "bin" / "python"
    if not python.is_file():
        raise UserError(
            f"{python}: no such Python for SGLang: run bash tools/setup_environment.sh, or set server.python or"
            " $SGLANG_PYTHON"
        )
    return python


def _port(host: str, port: int) -> int:
    """The given port if it can be had. 0: a free one, if possible none that the system gives to outgoing connections in
    the meantime."""
    if port == 0:
        below = list(range(20000, _first_ephemeral_port()))
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


def _first_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768


def _wait_until_ready(server: Server, process: psutil.Process, record: dict, timeout: float) -> Server:
    """Polls until the server answers, showing seconds and the last log line. If it cannot be had, it is stopped."""
    from tqdm import tqdm

    started = time.monotonic()
    try:
        name = "SGLang server" if server.replica == 0 else f"SGLang replica {server.replica}"
        with tqdm(
            desc=f"{name} starting",
            position=server.replica,
            bar_format="{desc}: {elapsed} {postfix}",
            mininterval=1,
            leave=False,
        ) as bar:
            while True:
                if not _is_running(process):
                    tail = f"{server.directory}/server.log ends:\n{log_tail(server.directory)}"
                    raise UserError(f"the SGLang server died while starting; {tail}")
                if _problem(server, timeout=5.0) is None:
                    break
                if "address already in use" in log_tail(server.directory):  # SGLang says so and stays, without an ear
                    raise _PortTaken(f"{server.url}: the port was taken while SGLang started")
                if time.monotonic() - started > timeout:
                    raise UserError(
                        f"the SGLang server did not answer within server.start_timeout_seconds = {timeout:g}: raise it;"
                        f" {server.directory}/server.log ends:\n{log_tail(server.directory)}"
                    )
                bar.set_postfix_str(log_tail(server.directory, 1).strip()[:100])
                time.sleep(0.5)
    except BaseException:
        stop(server.directory)
        raise
    _write_record(server.directory, {**record, "ready": True})
    print(
        f"SGLang server ready at {server.url} after {time.monotonic() - started:.0f} s, log:"
        f" {server.directory}/server.log",
        flush=True,
    )
    return server


def _problem(server: Server, timeout: float = HEALTH_TIMEOUT_SECONDS) -> str | None:
    """Why the server cannot be used; None if it can."""
    try:
        with _client(server, timeout) as client:
            key = client.get("/model_info").status_code
            if key in (401, 403):
                return "refuses the API key"
            health = client.get("/health").status_code if key == 200 else key
    except httpx.HTTPError as error:
        return f"does not answer ({type(error).__name__})"
    return None if health == 200 else f"is not healthy (HTTP {health})"


def _client(server: Server, timeout: float) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers=server.headers, timeout=timeout, trust_env=False)


def _read_record(server_dir: Path) -> dict | None:
    path = server_dir / "server.json"
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}): stop its server by hand if one runs, and remove the file")
    return record


def _write_record(server_dir: Path, record: dict) -> None:
    """Atomically, readable by the owner only: it holds the key."""
    temporary = server_dir / "server.json.new"
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600), "w") as stream:
        json.dump(record, stream, indent=1)
    os.replace(temporary, server_dir / "server.json")


def _process_of(record: dict | None) -> psutil.Process | None:
    """The recorded process if it still runs; a process number that was given to another program since does not
    count."""
    if record is None:
        return None
    try:
        process = psutil.Process(record["pid"])
        same = abs(process.create_time() - record["create_time"]) < 0.01
    except psutil.NoSuchProcess:
        return None
    return process if same and _is_running(process) else None


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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

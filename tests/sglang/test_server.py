"""Starting, finding and stopping servers: the real one, and programs that die or hang in its place."""

import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from megatron_papo.config import ServerConfig
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.sglang import server as sglang_server
from megatron_papo.sglang import server_process, server_record, server_start
from megatron_papo.sglang.answers import ServerInfo
from megatron_papo.sglang.server_record import Server
from tests.helpers import DEMO_CONFIG, run_module


def record(directory):
    return json.loads((directory / "server.json").read_text())


def test_running_server_is_found_again(server, server_dir, checkpoints, monkeypatch):
    config = load_config(DEMO_CONFIG)
    pid = record(server_dir)["pid"]
    again = sglang_server.connect_or_start(server_dir, checkpoints.second, config.server, config.model.dtype)
    assert again == server and record(server_dir)["pid"] == pid
    assert (server_dir / "server.json").stat().st_mode & 0o077 == 0  # it holds the key
    assert server.url.startswith("http://127.0.0.1:")
    group = server_process.group_of(psutil.Process(pid))
    listening = [one.laddr.ip for process in group for one in process.net_connections() if one.status == "LISTEN"]
    assert set(listening) == {"127.0.0.1"} and len(listening) > 1  # the scheduler's, too
    everybody = [(server_dir / "server.log").read_text(), *(f"{p.cmdline()} {p.environ()}" for p in group)]
    assert not any(server.api_key in text for text in everybody) and "server_args=" in everybody[0]
    monkeypatch.setenv("SGLANG_API_KEY", server.api_key)
    [found] = sglang_server.open_servers(server.url, checkpoints.first, config.server, "float32")
    assert found == Server(server.url, server.api_key)
    for key in ("wrong", ""):  # another one, and none
        monkeypatch.setenv("SGLANG_API_KEY", key)
        with pytest.raises(UserError, match="refuses the API key: .*set SGLANG_API_KEY if it has a key"):
            sglang_server.open_servers(server.url, checkpoints.first, config.server, "float32")


def test_memory_is_given_up_and_taken_back(server, server_dir, client, checkpoints, prompts, pictures):
    """On a CPU SGLang accepts the calls and has nothing to give; what holds is remembered, and the answers are the
    same."""
    from tokenizers import Tokenizer

    from megatron_papo.data.response_tokens import response_tokens
    from megatron_papo.sglang.requests import Sampling
    from tests.sglang_server import request_for

    config = load_config(DEMO_CONFIG)
    tokens = response_tokens(
        checkpoints.first, Tokenizer.from_file(str(checkpoints.first / "tokenizer.json")).get_vocab()
    )
    requests, sampling = [request_for(prompts["plain"], pictures, 1)], Sampling(1.0, 1.0, -1, 12, tokens)
    before = client.sample(requests, sampling, "first")
    sglang_server.release_memory([server])
    assert record(server_dir)["released"] is True
    assert sglang_server.status(server_dir)[0] == (True, sglang_server.status(server_dir)[0][1])
    assert "has given up its GPU memory" in sglang_server.status(server_dir)[0][1]
    again = sglang_server.connect_or_start(server_dir, checkpoints.first, config.server, config.model.dtype)
    assert again == server and record(server_dir)["released"] is False
    assert client.sample(requests, sampling, "first") == before
    log = (server_dir / "server.log").read_text()
    assert log.count("/release_memory_occupation") == log.count("/resume_memory_occupation") == 1
    with pytest.raises(UserError, match="server.shares_gpus: is for servers that the stages start"):
        sglang_server.open_servers(
            server.url, checkpoints.first, config.server.model_copy(update={"shares_gpus": True}), "float32"
        )


def test_memory_is_given_up_while_requests_are_under_way(server, server_dir, client, checkpoints, prompts):
    """What a stage leaves behind may still run: SGLang's scheduler ends where it is asked to release meanwhile."""
    body = {
        "input_ids": prompts["text"].token_ids,
        "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True, "temperature": 1.0},
        "rid": "left behind",
    }
    request = urllib.request.Request(
        server.url + "/generate", json.dumps(body).encode(), {**server.headers, "Content-Type": "application/json"}
    )

    def generate() -> dict:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
            return json.loads(answer.read())

    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(generate)
        time.sleep(1.0)
        assert not answer.done()
        sglang_server.release_memory([server])
        assert answer.result()["meta_info"]["finish_reason"]["type"] == "abort"
    sglang_server.release_memory([server])  # released already: nothing happens
    config = load_config(DEMO_CONFIG)
    again = sglang_server.connect_or_start(server_dir, checkpoints.first, config.server, config.model.dtype)
    assert again == server and client.weight_versions() == ["first"]


def test_a_server_whose_memory_nobody_knows_about_is_started_again(tmp_path):
    """A stage that is killed between asking and the answer: SGLang does not say what it holds."""
    config = ServerConfig(python=stand_in(tmp_path / "python", ANSWERING))
    where = tmp_path / "server"
    try:
        first = sglang_server.connect_or_start(where, tmp_path, config, "float32")
        known = server_record.read_record(where)
        assert (
            sglang_server.connect_or_start(where, tmp_path, config, "float32") == first
        )  # control: known, found again
        server_record.write_record(where, known.but(releasing=True))
        assert sglang_server.status(where)[0][0] is False
        assert "gave up or took back" in sglang_server.status(where)[0][1]
        again = sglang_server.connect_or_start(where, tmp_path, config, "float32")
        assert again.url != first.url and not psutil.pid_exists(known.pid)
        assert not server_record.read_record(where).releasing
    finally:
        sglang_server.stop(where)


def test_url_where_nothing_listens():
    with pytest.raises(UserError, match="http://127.0.0.1:9: does not answer"):
        sglang_server.connect("http://127.0.0.1:9", None)


def server_info(server) -> dict:
    request = urllib.request.Request(server.url + "/server_info", headers=server.headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return json.loads(answer.read())


def test_server_flags(server, server_dir):
    """The settings that results depend on reached SGLang."""
    info = server_info(server)
    assert (info["dtype"], info["enable_deterministic_inference"], info["chunked_prefill_size"]) == (
        "float32",
        True,
        -1,
    )
    assert info["max_total_tokens"] == load_config(DEMO_CONFIG).server.max_total_tokens


def stand_in(path, body):
    """A program that is given as the Python of SGLang's environment."""
    path.write_text(f"#!{sys.executable}\nimport sys, time\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_server_that_dies_shows_its_log(tmp_path, capsys):
    python = stand_in(
        tmp_path / "python", "print(*(f'line {i}' for i in range(50)), sep='\\n'); print('no such model'); sys.exit(1)"
    )
    with pytest.raises(UserError, match="died while starting") as caught:
        sglang_server.connect_or_start(tmp_path / "server", tmp_path, ServerConfig(python=python), "float32")
    [line] = str(caught.value).splitlines()
    assert line.endswith("server.log ends: no such model")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "no such model" and lines[-2] == "line 49" and len(lines) == server_record.LOG_LINES
    assert not (tmp_path / "server" / "server.json").exists()


def test_server_that_hangs_is_given_up_and_ended(tmp_path):
    python = stand_in(tmp_path / "python", "print(f'pid {__import__(\"os\").getpid()}', flush=True); time.sleep(600)")
    with pytest.raises(UserError, match="did not answer within server.start_timeout_seconds = 1.5") as caught:
        sglang_server.connect_or_start(
            tmp_path / "server", tmp_path, ServerConfig(python=python, start_timeout_seconds=1.5), "float32"
        )
    pid = int(str(caught.value).rpartition("pid ")[2])
    assert not psutil.pid_exists(pid)


def test_server_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(server_process, "STOP_SECONDS", 1.0)
    body = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    python = stand_in(tmp_path / "python", body)
    with pytest.raises(UserError, match="did not answer"):
        sglang_server.connect_or_start(
            tmp_path / "server", tmp_path, ServerConfig(python=python, start_timeout_seconds=1.5), "float32"
        )
    assert not [p for p in psutil.process_iter(["cmdline"]) if python in (p.info["cmdline"] or [])]


DEAF = """
print("ERROR: [Errno 98] error while attempting to bind on address: address already in use", flush=True)
time.sleep(600)
"""
"""What SGLang does when its port is taken."""


def test_a_port_taken_meanwhile_is_no_hang(tmp_path, capsys):
    once = (
        f"if not os.path.exists('{tmp_path}/second'):\n    open('{tmp_path}/second', 'w')"
        + DEAF.replace("\n", "\n    ")
        + ANSWERING
    )
    python = stand_in(tmp_path / "python", "import os\n" + once)
    sglang_server.connect_or_start(tmp_path / "server", tmp_path, ServerConfig(python=python), "float32")
    sglang_server.stop(tmp_path / "server")
    assert "the port was taken while SGLang started: trying another" in capsys.readouterr().out
    python = stand_in(tmp_path / "python", DEAF)
    for port in (0, two_free_ports()):  # given up after some attempts; at once if the user wants this port
        with pytest.raises(UserError, match="the port was taken while SGLang started"):
            sglang_server.connect_or_start(
                tmp_path / "server", tmp_path, ServerConfig(python=python, port=port), "float32"
            )
        assert capsys.readouterr().out.count("trying another") == (2 if port == 0 else 0)


def test_free_ports_are_not_those_of_outgoing_connections():
    assert all(20000 <= server_start.free_port("127.0.0.1", 0) < server_start.first_ephemeral_port() for _ in range(50))


ANSWERING = """
import http.server, json
port = int(sys.argv[sys.argv.index('--port') + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{}')
http.server.ThreadingHTTPServer(('127.0.0.1', port), Handler).serve_forever()
"""


def test_replicas_are_started_found_and_stopped_together(tmp_path, monkeypatch):
    """Programs that only answer, on a machine that seems to have GPUs."""
    (tmp_path / "bin").mkdir()
    stand_in(tmp_path / "bin" / "nvidia-smi", "print('GPU 0: NVIDIA H100')")
    for program in ("nvcc", "ninja", "c++", "gcc"):
        stand_in(tmp_path / "bin" / program, "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH", "CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    config = ServerConfig(
        python=stand_in(tmp_path / "python", ANSWERING), replicas=3, tensor_parallel_size=2, first_gpu=4
    )
    where = tmp_path / "server"
    servers = sglang_server.open_servers(str(where), tmp_path, config, "bfloat16")
    directories = [where, where / "replica_1", where / "replica_2"]
    assert [server.directory for server in servers] == directories and len({server.url for server in servers}) == 3
    commands = [record(directory)["command"] for directory in directories]
    assert [command[command.index("--base-gpu-id") + 1] for command in commands] == ["4", "6", "8"]
    assert all(command[command.index("--tp") + 1] == "2" for command in commands)
    assert not any("--enable-memory-saver" in command for command in commands)
    with monkeypatch.context() as elsewhere, pytest.raises(UserError, match="^no nvcc "):
        elsewhere.setenv("CUDA_HOME", str(tmp_path / "gone"))
        sglang_server.open_servers(str(tmp_path / "other"), tmp_path, config, "bfloat16")
    sharing = server_start.launcher(tmp_path, config.model_copy(update={"shares_gpus": True}), 0)
    assert "--enable-memory-saver" in sharing and "--enable-weights-cpu-backup" in sharing
    free = server_start.launcher(tmp_path, config.model_copy(update={"deterministic": False}), 0)
    assert "--enable-deterministic-inference" not in free
    assert all("--enable-deterministic-inference" in command for command in [*commands, sharing])
    assert len({record(directory)["api_key"] for directory in directories}) == 3
    pids = [record(directory)["pid"] for directory in directories]
    assert sglang_server.open_servers(str(where), tmp_path, config, "bfloat16") == servers  # found again
    # one of them dies: it alone is started again
    psutil.Process(pids[1]).kill()
    sglang_server.open_servers(str(where), tmp_path, config, "bfloat16")
    assert [record(directory)["pid"] == pid for directory, pid in zip(directories, pids)] == [True, False, True]
    # fewer replicas: the last one is stopped
    sglang_server.open_servers(str(where), tmp_path, config.model_copy(update={"replicas": 2}), "bfloat16")
    assert not psutil.pid_exists(pids[2]) and psutil.pid_exists(pids[0])
    status = sglang_server.status(where)
    assert [usable for usable, _ in status] == [True, True, False]
    assert sglang_server.stop_all(where) == 2 and not psutil.pid_exists(pids[0])


def two_free_ports() -> int:
    """The first of two neighbours, below the range from which the system gives ports to outgoing connections."""
    for port in random.sample(range(20000, 30000, 2), 100):
        try:
            with socket.socket() as first, socket.socket() as second:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            return port
        except OSError:
            continue
    raise AssertionError("no two free ports")


def test_ports_of_replicas_count_on(tmp_path):
    port = two_free_ports()
    config = ServerConfig(python=stand_in(tmp_path / "python", ANSWERING), replicas=2, port=port)
    try:
        servers = sglang_server.open_servers(str(tmp_path / "server"), tmp_path, config, "float32")
        assert [server.url for server in servers] == [f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"]
    finally:
        sglang_server.stop_all(tmp_path / "server")


def test_settings_of_a_foreign_server(server, capsys):
    """By the real server's own account of itself, and with what would be wrong changed in it."""
    info = ServerInfo.model_validate(server_info(server))
    sglang_server.check_settings("URL", info, "float32")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="computes in float32, model.dtype is bfloat16"):
        sglang_server.check_settings("URL", info, "bfloat16")
    sglang_server.check_settings("URL", info.model_copy(update={"enable_deterministic_inference": False}), "float32")
    assert "ignores seeds" in capsys.readouterr().out


def test_port_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"server.port {port} on 127.0.0.1: .*choose another") as caught:
            config = ServerConfig(port=port, python=sys.executable)
            sglang_server.connect_or_start(tmp_path, tmp_path, config, "float32")
    assert len(str(caught.value).splitlines()) == 1


def test_no_python_for_sglang(tmp_path):
    with pytest.raises(UserError, match="tools/setup_environment.sh"):
        sglang_server.connect_or_start(tmp_path, tmp_path, ServerConfig(python=str(tmp_path / "none")), "float32")


def test_tensor_parallel_cpu_server_is_refused(tmp_path):
    config = ServerConfig(tensor_parallel_size=2, python=sys.executable, extra_arguments=["--device", "cpu"])
    with pytest.raises(UserError, match="server.tensor_parallel_size"):
        sglang_server.connect_or_start(tmp_path, tmp_path, config, "float32")


RECORD = {
    "url": "http://127.0.0.1:9",
    "api_key": "k",
    "pid": 1,
    "process": "boot 17",
    "create_time": 1.5,
    "ready": True,
    "released": False,
    "releasing": False,
    "lost": False,
    "model": "/m",
    "settings": {"dtype": "float32"},
    "command": ["python", "-m", "sglang"],
    "temporary": "/nowhere/tmp",
    "shared_memory": [],
}


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "EOF"),
        ("\xff", "expected value"),
        ("[1, 2]", "should be an object"),
        (json.dumps({**RECORD, "pid": "1"}), "pid: "),
        (json.dumps({**RECORD, "pid": 1 << 40}), "pid: "),
        (json.dumps({**RECORD, "pid": -1}), "pid: "),
        (json.dumps({**RECORD, "settings": None}), "settings: "),
        (json.dumps({**RECORD, "extra": 1}), "extra: "),
        (json.dumps({name: value for name, value in RECORD.items() if name != "command"}), "command: "),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path, text, problem):
    server_record.read_record(tmp_path)
    (tmp_path / "server.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=problem) as caught:
        server_record.read_record(tmp_path)
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path}/server.json: ") and line.endswith("and remove the file")
    result = run_module("tools.sglang_server", "status", "--server", tmp_path) if text == "[1, 2]" else None
    assert result is None or (result.returncode == 2 and result.stderr.strip() == f"error: {line}")


def test_records_are_read_as_they_were_written(tmp_path):
    assert server_record.read_record(tmp_path) is None
    (tmp_path / "server.json").write_text(json.dumps(RECORD))
    record = server_record.read_record(tmp_path)
    server_record.write_record(tmp_path, record)
    assert json.loads((tmp_path / "server.json").read_text()) == RECORD
    assert server_record.read_record(tmp_path) == record and record.settings == {"dtype": "float32"}


def test_a_server_that_takes_long_is_spoken_of_in_whole_lines(tmp_path, monkeypatch, capfd):
    """No carriage returns: the log of a run is a file. Control: one that answers at once is spoken of once."""
    monkeypatch.setattr(server_start, "REPORT_SECONDS", 0.4)
    monkeypatch.setattr(server_start, "POLL_SECONDS", 0.1)
    slow = "print('loading weights', flush=True); time.sleep(1.5)\n" + ANSWERING
    for body, lines in ((slow, range(3, 9)), (ANSWERING, range(1, 4))):
        python = stand_in(tmp_path / "python", body)
        sglang_server.connect_or_start(tmp_path / "server", tmp_path, ServerConfig(python=python), "float32")
        sglang_server.stop(tmp_path / "server")
        out, err = capfd.readouterr()
        assert "\r" not in out + err and err == "" and len(out.splitlines()) in lines, out
        assert ("SGLang server is starting, 1 s: loading weights" in out) == (body is slow)
        assert "SGLang server ready at http://" in out


def test_stop_leaves_a_process_that_inherited_the_number_alone(tmp_path):
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        started = server_process.identity_of(other.pid)
        stale = {**RECORD, "pid": other.pid, "process": started + "1"}
        (tmp_path / "server.json").write_text(json.dumps(stale))
        assert sglang_server.stop(tmp_path) is False
        time.sleep(0.2)
        assert other.poll() is None
        # control: with its own start it is ended, whatever the clock says now
        (tmp_path / "server.json").write_text(json.dumps({**stale, "process": started, "create_time": 0.0}))
        assert sglang_server.stop(tmp_path) is True
        assert not psutil.pid_exists(other.pid)
    result = run_module("tools.sglang_server", "stop", "--server", tmp_path)
    assert result.returncode == 0 and "no server was running" in result.stdout

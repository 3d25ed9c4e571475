"""Servers on several nodes: two names and two loopback addresses of this machine are two nodes here.

Programs that only answer stand in for SGLang, but for the nightly test.
"""

import json
import os
import signal
import time

import psutil
import pytest

from megatron_papo.config import ServerConfig
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.sglang import nodes
from megatron_papo.sglang import server as sglang_server
from megatron_papo.sglang.addresses import NodeReport, address_for_others, own_address
from megatron_papo.sglang.client import SglangClient
from tests.helpers import DEMO_CONFIG, run_module
from tests.sglang.test_server import ANSWERING, stand_in

LAUNCHER = """#!/bin/bash
nodes=$1; shift
for node in ${nodes//,/ }; do SLURMD_NODENAME=$node "$@" & done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
"""
TWO = "127.0.0.2,127.0.0.3"
ANSWERING_THERE = ANSWERING.replace("'127.0.0.1'", "sys.argv[sys.argv.index('--host') + 1]")
FAILING_ON_ONE = "if '127.0.0.3' in sys.argv: sys.exit('no such GPU')\n" + ANSWERING_THERE


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Sets SERVER_LAUNCHER to one that reaches these nodes."""
    (tmp_path / "launcher").write_text(LAUNCHER)
    (tmp_path / "launcher").chmod(0o755)

    def set_nodes(names: str) -> None:
        monkeypatch.setenv("SERVER_LAUNCHER", f"{tmp_path}/launcher {names}")

    return set_nodes


@pytest.fixture
def where(tmp_path):
    """The server directory; whatever was started is stopped."""
    yield tmp_path / "server"
    sglang_server.stop_all(tmp_path / "server")
    assert processes_of(tmp_path) == []


def processes_of(path) -> list[str]:
    """The command lines of processes that name a path: launchers, keepers, servers."""
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(path) in line]


def config_of(tmp_path, body=ANSWERING_THERE, **values) -> ServerConfig:
    return ServerConfig(python=stand_in(tmp_path / "python", body), **values)


def open_servers(where, tmp_path, config):
    return sglang_server.open_servers(str(where), tmp_path, config, "float32")


def test_servers_of_two_nodes_are_started_found_restarted_and_stopped_together(launch, where, tmp_path, monkeypatch):
    launch(TWO)
    config = config_of(tmp_path, replicas=2)
    servers = open_servers(where, tmp_path, config)
    assert [server.url.rpartition(":")[0] for server in servers] == ["http://127.0.0.2"] * 2 + ["http://127.0.0.3"] * 2
    assert [server.node for server in servers] == ["127.0.0.2"] * 2 + ["127.0.0.3"] * 2
    assert len({server.url for server in servers}) == len({server.api_key for server in servers}) == 4
    of_node = where.resolve() / "node_127.0.0.3"
    assert [server.directory for server in servers][2:] == [of_node, of_node / "replica_1"]
    assert all((server.directory / "server.json").stat().st_mode & 0o077 == 0 for server in servers)
    assert open_servers(where, tmp_path, config) == servers  # found again
    assert [usable for usable, _ in sglang_server.status(where)] == [True] * 4
    # one dies, and its node starts it again, with the checkpoint of now
    pid = json.loads((of_node / "replica_1" / "server.json").read_text())["pid"]
    psutil.Process(pid).kill()
    new = sglang_server.restart(servers[3], tmp_path / "later", config, "float32")
    record = json.loads((of_node / "replica_1" / "server.json").read_text())
    assert new.node == "127.0.0.3" and record["pid"] != pid and record["model"] == str(tmp_path / "later")
    assert open_servers(where, tmp_path, config) == [*servers[:3], new]
    # without the variable it is servers of this machine that are wanted
    monkeypatch.delenv("SERVER_LAUNCHER")
    assert sglang_server.stop_all(where) == 4 and processes_of(tmp_path) == []
    assert [usable for usable, _ in sglang_server.status(where)] == [False]
    assert not list(where.rglob("server.json")) and not list(where.rglob("tmp"))


def test_a_node_on_which_no_server_starts_is_named_and_nothing_stays(launch, where, tmp_path):
    launch(TWO)
    with pytest.raises(UserError, match="^node 127.0.0.3: the SGLang server died while starting: .*no such GPU$"):
        open_servers(where, tmp_path, config_of(tmp_path, FAILING_ON_ONE))
    assert processes_of(tmp_path) == [] and not list(where.rglob("server.json"))
    assert len(open_servers(where, tmp_path, config_of(tmp_path))) == 2  # and it can be started again


@pytest.mark.parametrize("what", ["launcher", "keeper"])
def test_what_was_killed_is_started_again(launch, where, tmp_path, what, monkeypatch, capsys):
    launch(TWO)
    config = config_of(tmp_path)
    before = open_servers(where, tmp_path, config)
    launcher = psutil.Process(json.loads((where / "nodes.json").read_text())["pid"])
    victim = launcher if what == "launcher" else launcher.children()[1]
    victim.send_signal(signal.SIGKILL)
    if what == "launcher":  # upon which the keepers end their servers
        deadline = time.monotonic() + 30
        while processes_of(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_of(tmp_path) == []
    else:
        with monkeypatch.context() as patience:
            patience.setattr(nodes, "WORD_SECONDS", 2.0)
            with pytest.raises(UserError, match="^node 127.0.0.3: the keeper of its servers does not answer"):
                sglang_server.restart(before[1], tmp_path, config, "float32")
        assert sglang_server.stop_all(where) == 2 and processes_of(tmp_path) == []  # its servers, too
        before = open_servers(where, tmp_path, config)
        launcher = psutil.Process(json.loads((where / "nodes.json").read_text())["pid"])
        launcher.children()[1].kill()
        sglang_server.restart(before[0], tmp_path, config, "float32")  # the other keeper does its work
        psutil.Process(json.loads((before[1].directory / "server.json").read_text())["pid"]).kill()
    after = open_servers(where, tmp_path, config)
    assert {server.api_key for server in after}.isdisjoint(server.api_key for server in before)
    assert "node 127.0.0.3: its server http://" in capsys.readouterr().out or what == "launcher"


@pytest.mark.parametrize(
    "launcher, line",
    [
        ("{launcher} 127.0.0.2,127.0.0.2", "runs more than once on 127.0.0.2: once on each node is wanted"),
        (
            "/no/such/srun -N 2",
            "/no/such/srun -N 2: cannot be run \\(No such file or directory\\): see that it reaches",
        ),
        ("false", "false: ended with status 1: it said nothing: see that it reaches every node"),
        ("{srun}", "ended with status 1: srun: error: Unable to create step for job 7: Requested nodes are busy: see"),
        ("true", "true: does not run the command that follows it"),
        ("srun 'open", "No closing quotation: give a command"),
    ],
)
def test_a_launcher_that_does_not_reach_the_nodes_is_one_line(launch, where, tmp_path, monkeypatch, launcher, line):
    launch(TWO)
    srun = (
        "import sys; print('srun: error: Unable to create step for job 7: Requested nodes are busy', file=sys.stderr)"
    )
    script = stand_in(tmp_path / "srun", f"{srun}\nprint('slurmd: bye', file=sys.stderr); sys.exit(1)")
    monkeypatch.setenv("SERVER_LAUNCHER", launcher.format(launcher=tmp_path / "launcher", srun=script))
    with pytest.raises(UserError, match=line) as caught:
        open_servers(where, tmp_path, config_of(tmp_path))
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).startswith("SERVER_LAUNCHER=")


def test_shared_gpus_and_what_is_no_interface_are_refused_on_one_line(launch, where, tmp_path):
    launch(TWO)
    with pytest.raises(UserError, match="server.shares_gpus: is for one machine"):
        open_servers(where, tmp_path, config_of(tmp_path, shares_gpus=True))
    with pytest.raises(UserError, match="server.host ib7: node 127.0.0.2 has no such network interface \\(.*lo.*\\)"):
        open_servers(where, tmp_path, config_of(tmp_path, host="ib7"))
    [one, other] = open_servers(where, tmp_path, config_of(tmp_path, host="lo"))  # control: this one they have
    assert {one.url.rpartition(":")[0], other.url.rpartition(":")[0]} == {"http://127.0.0.1"}


def report(resolved: str | None, **interfaces: str) -> NodeReport:
    return NodeReport(node="n1", machine="m", resolved=resolved, interfaces={"lo": "127.0.0.1", **interfaces})


def test_the_address_of_a_node_is_one_that_others_reach():
    two = {"eth0": "10.0.0.5", "ib0": "10.1.0.5"}
    assert address_for_others(report("10.0.0.5", **two), "127.0.0.1", False) == "10.0.0.5"
    assert address_for_others(report("10.0.0.5", **two), "ib0", False) == "10.1.0.5"
    # Debian's /etc/hosts: the name is 127.0.1.1 on the node itself
    assert address_for_others(report("127.0.1.1", eth0="10.0.0.5"), "127.0.0.1", False) == "10.0.0.5"
    for resolved, what in (("127.0.1.1", "127.0.1.1"), (None, "no address")):
        with pytest.raises(UserError, match=f"node n1: its name has {what} there, .* one of eth0, ib0"):
            address_for_others(report(resolved, **two), "127.0.0.1", False)
    with pytest.raises(UserError, match="server.host 0.0.0.0: node n1 has no such network interface"):
        address_for_others(report("10.0.0.5", **two), "0.0.0.0", False)
    # several nodes that are one machine
    assert address_for_others(report("127.0.1.1", **two), "127.0.0.1", True) == "127.0.1.1"
    assert address_for_others(report(None, **two), "127.0.0.1", True) == "127.0.0.1"


def test_a_server_of_one_machine_may_be_given_an_interface(tmp_path):
    assert own_address("lo") == own_address("127.0.0.1") == own_address("localhost") == "127.0.0.1"
    with pytest.raises(UserError, match="server.host ib7: neither an address nor a network interface of this machine"):
        open_servers(tmp_path / "server", tmp_path, config_of(tmp_path, host="ib7"))


def test_a_keeper_is_told_what_it_keeps():
    result = run_module("megatron_papo.sglang.node_keeper")
    assert result.returncode == 2 and "give --server with --attempt or --end, or --list" in result.stderr
    [line] = run_module("megatron_papo.sglang.node_keeper", "--list", env={"SLURMD_NODENAME": "n7"}).stdout.splitlines()
    assert NodeReport.model_validate_json(line).node == "n7"


def test_rollouts_go_to_the_servers_of_all_nodes(launch, where, checkpoints, prompts, pictures, tmp_path):
    """SGLang itself on both, one of them killed in the middle: the same tokens as by one server, each once."""
    from tests.sglang.test_faults import IMPATIENT, Seen, each_once, same, sampling_of
    from tests.sglang_server import request_for

    config = load_config(DEMO_CONFIG)
    sampling = sampling_of(checkpoints)
    requests = [request_for(prompts["plain"], pictures, seed, group=str(seed // 4)) for seed in range(32)]

    def client_of(servers, **more) -> SglangClient:
        client = SglangClient(servers, 16, 60, limits=IMPATIENT, **more)
        assert client.update_weights(checkpoints.second, "second") == len(servers)
        return client

    [alone] = sglang_server.open_servers(str(tmp_path / "alone"), checkpoints.first, config.server, "float32")
    expected = client_of([alone]).sample(requests, sampling, "second")
    sglang_server.stop_all(tmp_path / "alone")

    launch(TWO)
    servers = sglang_server.open_servers(str(where), checkpoints.first, config.server, "float32")
    for server in servers:
        assert f"'{server.api_key}'" not in (server.directory / "server.log").read_text()
        with pytest.raises(UserError, match="refuses the API key"):
            sglang_server.connect(server.url, None)

    def kill() -> None:
        os.kill(json.loads((servers[1].directory / "server.json").read_text())["pid"], signal.SIGKILL)

    seen = Seen(after=6, do=kill)
    client = client_of(
        servers, restart=lambda lost: sglang_server.restart(lost, checkpoints.first, config.server, "float32")
    )
    assert same(client.sample(requests, sampling, "second", seen), expected) and each_once(seen, requests)
    assert client.traffic.servers_lost == client.traffic.servers_restarted == 1
    assert [server.node for server in client.servers] == ["127.0.0.2", "127.0.0.3"]
    assert client.weight_versions() == ["second", "second"]
    logs = [(server.directory / "server.log").read_text() for server in client.servers]
    previous = (servers[1].directory / "server.log.previous").read_text()
    assert "/generate" in logs[0] and "/generate" in previous

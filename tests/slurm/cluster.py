"""A SLURM cluster of three nodes on this machine: Debian's slurmctld, three slurmd and munged, each node with a name of
its own (a UTS namespace), an /etc/hosts that knows the others (a mount namespace), and GPUs that are only names.

    .venv/bin/python -m tests.slurm.cluster      says, as one line, what is missing here; exit status 2

Partition all has every node; small has the first, large the other two. Nothing outside its directory is written, and
its daemons end with it.
"""

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")
NODES = {"n1": "127.0.0.11", "n2": "127.0.0.12", "n3": "127.0.0.13"}
GPUS, CPUS = 4, 4
"""Of each node, whatever the machine has."""
FIRST_PORT = 17817
START_SECONDS, PATH = 60.0, f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing() -> str | None:
    """Return what keeps a cluster from being started here, with what to do; None where nothing does."""
    gone = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if gone:
        return f"no {', '.join(gone)} here: apt-get install slurmctld slurmd slurm-client munge util-linux"
    if os.geteuid() != 0:
        return "a cluster's nodes need names of their own, which only root can give them: start it as root"
    done = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True, text=True)
    return (
        f"no namespaces here ({done.stderr.strip()}): start it in a container that may make them" * done.returncode
        or None
    )


class Cluster:
    """Started by `with`; the commands are told where it is by their environment."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(directory / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        self.directory.mkdir(mode=0o755)
        (self.directory / "slurm.conf").write_text(self._configuration())
        (self.directory / "gres.conf").write_text(f"Name=gpu File={self.directory}/gpu[0-{GPUS - 1}]\n")
        (self.directory / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{NODES[n]} {n}\n" for n in NODES))
        (self.directory / "munge.key").write_bytes(os.urandom(128))
        (self.directory / "munge.key").chmod(0o400)
        for number in range(GPUS):
            os.mknod(self.directory / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        try:
            self._start_munge()
            (self.directory / "slurmctld").mkdir()
            self._start("slurmctld", "n1")
            for node in NODES:
                self.start_node(node)
            self._wait_for(lambda: self.run("sinfo", "-h", "-p", "all", "-o", "%D %t").split() == ["3", "idle"])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self._daemons)):
            self._end(name)

    def start_node(self, node: str) -> None:
        (self.directory / node).mkdir(exist_ok=True)
        self._start("slurmd", node)

    def end_node(self, node: str) -> None:
        """Kill a node's daemon: the node cannot be reached any more."""
        self._end(f"slurmd {node}")

    def run(self, *command: str) -> str:
        """Return what one of SLURM's commands prints; it fails the test where the command fails."""
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def _start_munge(self) -> None:
        paths = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        paths |= {"seed-file": "munge.seed"}
        options = [f"--{name}={self.directory / file}" for name, file in paths.items()]
        self._daemons["munged"] = self._popen(["munged", "--foreground", "--force", *options], "munged")
        self._wait_for((self.directory / "munge.socket").exists)

    def _start(self, program: str, node: str) -> None:
        hosts, name = self.directory / "hosts", program if program == "slurmctld" else f"{program} {node}"
        words = f"hostname {node}; mount --bind {hosts} /etc/hosts; exec {program} -D"
        self._daemons[name] = self._popen(["unshare", "--mount", "--uts", "bash", "-c", words], name)

    def _popen(self, command: list[str], name: str) -> subprocess.Popen:
        with open(self.directory / f"{name}.out", "ab") as out:
            return subprocess.Popen(command, env=self.environment, stdout=out, stderr=out)

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _wait_for(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_so():
            said = "".join(path.read_text(errors="replace")[-500:] for path in self.directory.glob("*.out"))
            assert time.monotonic() < deadline, f"the cluster does not start: {said}"
            time.sleep(0.2)

    def _configuration(self) -> str:
        here = self.directory
        lines = [
            "ClusterName=test",
            "SlurmctldHost=n1(127.0.0.1)",
            f"SlurmctldPort={FIRST_PORT}",
            "SlurmUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={here}/munge.socket",
            "CredType=cred/munge",
            f"StateSaveLocation={here}/slurmctld",
            f"SlurmdSpoolDir={here}/%n",
            f"SlurmctldPidFile={here}/slurmctld.pid",
            f"SlurmdPidFile={here}/%n.pid",
            f"SlurmctldLogFile={here}/slurmctld.log",
            f"SlurmdLogFile={here}/%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SlurmdParameters=config_overrides",  # as many processors as said here, not as there are
            "ReturnToService=2",
            "MpiDefault=none",
            "GresTypes=gpu",
        ]
        for number, node in enumerate(NODES, start=1):
            lines.append(f"NodeName={node} NodeAddr=127.0.0.1 Port={FIRST_PORT + number} CPUs={CPUS} Gres=gpu:{GPUS}")
        for partition, nodes in (("all", "n[1-3] Default=YES"), ("small", "n1"), ("large", "n[2-3]")):
            lines.append(f"PartitionName={partition} Nodes={nodes} MaxTime=INFINITE State=UP")
        return "\n".join(lines) + "\n"


if __name__ == "__main__":
    problem = missing()
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)

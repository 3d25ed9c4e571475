"""What stages/submit.slurm asks inside its job: which nodes serve, which train, and what starts processes there.

    .venv/bin/python -m tools.slurm_job [arguments of run_all.sh]
    .venv/bin/python -m tools.slurm_job STAGE [arguments of the stage]      STAGE is stage1_prepare_data, ...

Prints assignments for bash: COMMAND; where the job has several nodes TRAIN_LAUNCHER, SFT_LAUNCHER and SERVER_LAUNCHER
(command prefixes, see run_all.sh); where COMMAND is a single stage, END_REQUEST, the file that asks training to end, or
SERVER, the directory of the servers to stop. The first $SERVER_NODES nodes (1) serve and the others train; a job of one
node does both, as its configuration says.

Every node is reached once beforehand. One that does not answer, fewer nodes or GPUs than the layout needs: one line.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ValidationError

from megatron_papo.config import Config
from megatron_papo.distributed.gpus import count_gpus, wanted_device
from megatron_papo.errors import UserError
from megatron_papo.reading import shown
from megatron_papo.run.command_line import StageParser, launcher, run
from megatron_papo.run.run_config import settle_run
from megatron_papo.run.stages import STAGES
from megatron_papo.sglang.server_start import free_port
from tools.start_checks import found_by
from tools.start_run import DEFAULT_CONFIG
from tools.start_run import parse as parse_run

PYTHON = ".venv/bin/python"
ANSWER_SECONDS = 180.0
"""How long nodes may take to answer: SLURM gives up on one after a minute or so, and Python may be on a slow disk."""
LAYOUT = "parallel: tensor * pipeline * data"
NODE = "--this-node"
"""What the nodes are asked with."""


class Node(BaseModel):
    """What a node answers."""

    name: str
    gpus: int
    """Of the job."""
    port: int
    """One that was free on the node."""

    @classmethod
    def this(cls) -> "Node":
        """Return the node that this process runs on."""
        of_job = os.environ.get("SLURM_GPUS_ON_NODE", "")
        gpus = int(of_job) if of_job.isascii() and of_job.isdigit() else count_gpus()
        return cls(name=os.environ.get("SLURMD_NODENAME", ""), gpus=gpus, port=free_port("0.0.0.0", 0))


@dataclass(frozen=True)
class Job:
    """The job that this process runs in."""

    number: str
    nodes: list[Node]
    """In SLURM's order; the first one runs this."""
    cpus: int
    """That every node has for the job."""

    @classmethod
    def this(cls) -> "Job":
        """Return the job, all of whose nodes have answered. Raises UserError outside of a job."""
        missing = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if not os.environ.get(name)]
        if missing:
            raise UserError(f"{missing[0]} is not set: this is for a job: sbatch stages/submit.slurm ...")
        listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
        nodes = [Node.this()] if len(names) == 1 else _ask(names)
        return cls(os.environ["SLURM_JOB_ID"], nodes, _fewest_cpus(os.environ.get("SLURM_JOB_CPUS_PER_NODE", "1")))

    def used_by(self, config: Config) -> "Job":
        """Return the job with the GPUs that a run uses: none where it computes on the CPUs (distributed/gpus.py)."""
        device = wanted_device() or ("cpu" if config.model.path is None else "cuda")
        nodes = [node if device == "cuda" else node.model_copy(update={"gpus": 0}) for node in self.nodes]
        return replace(self, nodes=nodes)


def _ask(names: list[str]) -> list[Node]:
    """Return what the nodes answer, in the order of their names. Raises UserError, naming those that do not."""
    command = [*_srun(names, 1), "--overlap", PYTHON, "-m", "tools.slurm_job", NODE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, stdin=subprocess.DEVNULL)
        answers, said = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        answers, said = ((words or b"").decode(errors="replace") for words in (late.stdout, late.stderr))
    nodes: dict[str, Node] = {}
    for line in answers.splitlines():
        try:
            node = Node.model_validate_json(line)
        except ValidationError:
            continue  # what else the node's shell prints
        nodes[node.name] = node
    silent = [name for name in names if name not in nodes]
    if silent:
        words = [line.strip() for line in said.splitlines() if line.strip()] or ["srun says nothing of it"]
        about = next((line for name in silent for line in words if name in line), words[0])
        raise UserError(
            f"node {', '.join(silent)}: cannot be reached, or does not see {Path.cwd()}, which must be on a file system"
            f" of all nodes ({shown(about)}): submit again with --exclude={','.join(silent)}"
        )
    return [nodes[name] for name in names]


def _fewest_cpus(text: str) -> int:
    """Return the smallest number of SLURM_JOB_CPUS_PER_NODE, e.g. 4 of "8(x2),4"."""
    return min(int(part) for part in re.findall(r"(?:^|,)(\d+)", text))


def _srun(names: Sequence[str], cpus: int) -> list[str]:
    """Return the prefix that runs what follows once on each of these nodes, whatever the job itself was given."""
    number = len(names)
    return [
        "srun", f"--nodes={number}", f"--ntasks={number}", "--ntasks-per-node=1", f"--nodelist={','.join(names)}",
        f"--cpus-per-task={cpus}", "--cpu-bind=none",
    ]  # fmt: skip


def torchrun(job: Job, nodes: Sequence[Node], processes: int) -> list[str]:
    """Return the launcher of so many processes, spread evenly over nodes of the job."""
    names = [node.name for node in nodes]
    started = [*_srun(names, job.cpus), "--kill-on-bad-exit=1", PYTHON, "-m", "tools.torchrun"]
    started += ["--nproc-per-node", str(processes // len(nodes))]
    if len(nodes) == 1:
        return [*started, "--standalone"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{names[0]}:{nodes[0].port}", "--rdzv-id", job.number]
    return [*started, "--nnodes", str(len(nodes)), *meeting]


def require_nodes(what: str, processes: int, nodes: Sequence[Node], others: int) -> None:
    """Raise UserError where processes do not spread evenly over nodes, one for each GPU at most.

    Args:
        what: They are, by the names of keys.
        processes: How many.
        nodes: Where they are to run.
        others: How many nodes the job has besides.
    """
    gpus = min(node.gpus for node in nodes)
    fitting = [
        number
        for number in range(1, processes + 1)
        if processes % number == 0 and (not gpus or processes // number <= gpus)
    ]
    if len(nodes) not in fitting:
        number = next((number for number in fitting if number > len(nodes)), fitting[-1])
        there = f"{len(nodes)} node{'s' * (len(nodes) > 1)} for them" + f" with {gpus} GPUs each" * (gpus > 0)
        raise UserError(f"{what} = {processes} processes, {there}: --nodes {number + others}, or other sizes")


def require_gpus_of_servers(config: Config, nodes: Sequence[Node]) -> None:
    """Raise UserError where a node has GPUs, but fewer than its servers take."""
    server, gpus = config.server, min(node.gpus for node in nodes)
    last = server.first_gpu + server.replicas * server.tensor_parallel_size
    if gpus and last > gpus:
        raise UserError(
            f"server: GPUs {server.first_gpu} to {last - 1} (first_gpu, replicas * tensor_parallel_size) of {gpus}:"
            " lower --set server.replicas=, or --set server.first_gpu="
        )


def require_sizes(config: Config, servers: Sequence[Node], trainers: Sequence[Node], others: int) -> None:
    """Raise UserError where servers or training do not fit their nodes, a line for each; others: see require_nodes."""
    lines = found_by(
        [
            lambda: require_nodes(LAYOUT, config.parallel.world_size, trainers, others),
            lambda: require_gpus_of_servers(config, servers),
        ]
    )
    if lines:
        raise UserError(*lines)


def nodes_of_run(config: Config, job: Job) -> tuple[list[Node], list[Node]]:
    """Return the nodes that serve and those that train, of a job of several. Raises UserError where they do not fit."""
    text = os.environ.get("SERVER_NODES", "1")
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise UserError(f"SERVER_NODES={text}: expected how many nodes run SGLang servers, from 1")
    servers, trainers = job.nodes[: int(text)], job.nodes[int(text) :]
    if config.server.shares_gpus:
        raise UserError(
            f"server.shares_gpus: servers and training share the GPUs of one node, this job has {len(job.nodes)}:"
            " --nodes 1, or --set server.shares_gpus=false"
        )
    if not trainers:
        raise UserError(
            f"SERVER_NODES={text}: the job has {len(job.nodes)} nodes, none is left to train: --nodes {int(text) + 1}"
        )
    require_sizes(config, servers, trainers, len(servers))
    return servers, trainers


def serve_on(job: Job, nodes: Sequence[Node]) -> dict[str, str]:
    """Return SERVER_LAUNCHER; nothing where the one node that serves is this one."""
    if len(nodes) == 1:
        return {}
    return {"SERVER_LAUNCHER": " ".join([*_srun([node.name for node in nodes], job.cpus), "--overlap"])}


def around_run(arguments: Sequence[str], job: Job) -> tuple[list[str], dict[str, str]]:
    """Return the command and the variables of a job around run_all.sh."""
    args = parse_run(arguments)
    directory, _ = settle_run(Path("runs") / args.name, DEFAULT_CONFIG, args.config, args.overrides, Path.cwd())
    config, command = directory.config, ["bash", "run_all.sh", *arguments]
    job = job.used_by(config)
    if len(job.nodes) == 1:
        require_sizes(config, job.nodes, job.nodes, 1)
        return command, {}
    servers, trainers = nodes_of_run(config, job)
    variables = {"TRAIN_LAUNCHER": " ".join(torchrun(job, trainers, config.parallel.world_size))}
    if config.sft is not None:
        nodes = trainers if config.sft.processes % len(trainers) == 0 else trainers[:1]
        require_nodes("sft.processes", config.sft.processes, nodes, len(job.nodes) - len(nodes))
        variables["SFT_LAUNCHER"] = " ".join(torchrun(job, nodes, config.sft.processes))
    return command, variables | serve_on(job, servers)


def around_stage(name: str, arguments: Sequence[str], job: Job) -> tuple[list[str], dict[str, str]]:
    """Return the command and the variables of a job that is one stage of a run."""
    stage = STAGES[name]
    args, tasks = StageParser(name, "").parse(arguments)
    config, run_directory = tasks[0].whole_config, tasks[0].run
    if run_directory is None:
        raise UserError("--run: missing: a stage that is a job of its own belongs to a run that run_all.sh has started")
    job = job.used_by(config)
    variables: dict[str, str] = {}
    start = launcher(stage, config)
    if stage.processes is not None:
        what = LAYOUT if stage.number == 5 else "sft.processes"
        require_nodes(what, stage.processes(config), job.nodes, 0)
        variables = {"END_REQUEST": str(run_directory.end_request)} if stage.number == 5 else {}
        start = start if len(job.nodes) == 1 else torchrun(job, job.nodes, stage.processes(config))
    elif stage.number in (4, 7):
        variables = {"SERVER": str(run_directory.server), **serve_on(job, job.nodes)}
    elif len(job.nodes) > 1:
        raise UserError(f"{name} is one process, this job has {len(job.nodes)} nodes: --nodes 1")
    return [*start, "-m", f"stages.{name}", *arguments], variables


def main() -> None:
    arguments = sys.argv[1:]
    if arguments == [NODE]:
        print(Node.this().model_dump_json(), flush=True)
        return
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    job = Job.this()
    if arguments and arguments[0] in STAGES:
        command, variables = around_stage(arguments[0], arguments[1:], job)
    else:
        command, variables = around_run(arguments, job)
    print(f"COMMAND=({shlex.join(command)})")
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    run(main)

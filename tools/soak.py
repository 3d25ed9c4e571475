"""Kills a small run of the demo at random until it is done, again and again, and compares its bits with those of a run
that nobody disturbed.

    .venv/bin/python -m tools.soak --minutes 30 --seed 1 [--json] [--undisturbed runs/NAME] [--set KEY=VALUE]

Every run is started with one command and, when that has ended, with the same command again. In between a signal
(SIGKILL, SIGTERM, SIGINT, or SIGSTOP and some seconds later SIGCONT) goes to the whole group, or to one of its
processes: any one, a rank of torchrun, the SGLang server, a grader; or SIGUSR1 goes to run_all.sh, which asks training
to save and end. Runs alternate between stage by stage and --resident. When the minutes are over the last run may finish
in peace.

Reported: `kills`, `restarts`, `runs`, `same` (every record, checkpoint and export of every run has the bits of the
undisturbed one), `leftovers` (processes, locks, ports, unfinished outputs, shared memory and temporary files that are
there when a run is done), `seconds`. The exit status is 1 if bits differ or anything is left over. Runs are made in
runs/soak-*; those without a finding are removed.
"""

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run as run_command
from megatron_papo.run.manifest import MANIFEST
from megatron_papo.run.run_config import open_run
from megatron_papo.run.stage_output import read_manifest
from megatron_papo.run.stages import all_turns
from megatron_papo.sglang.leftovers import shared_memory_of
from megatron_papo.sglang.server_record import read_record

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "data.train.count=32",
    "data.sft.count=64",
    "data.evaluation.count=8",
    "sft.steps=4",
    "rollout.rollout_batch_size=16",
    "evaluation.samples_per_prompt=2",
    "iterations=2",
)
"""What is run: configs/demo.yaml, made small. Two iterations, so that something is resumed from."""
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)
TARGETS = ("group", "child", "rank", "server", "grader", "request")
LONGEST_WAIT, LONGEST_STOP = 30.0, 8.0
"""Seconds before the next signal, and between SIGSTOP and SIGCONT; uniform from nearly 0. After a start that finished
no stage the first grows by a half, so that a run gets on where a stage takes longer than that."""
END_SECONDS = 60.0
"""Within this time everything of a run that has ended must be gone."""
HUNG_SECONDS = 900.0
"""A command that runs longer without a kill hangs."""
BITS = (".jsonl", ".safetensors", ".distcp", ".metadata", ".png", "metrics.json")
TIMED = "metrics.jsonl"
"""Endings of the files that must be the same; the others, and metrics.jsonl of training, hold times and places."""
CACHE = "torchinductor_"
"""Begins the name of a directory of compiled kernels, which torch keeps on purpose."""
LOOKS_PER_MAP = 10
"""How many looks at the processes go by between two at the memory that they share."""


@dataclass
class Report:
    """What --json prints."""

    seed: int
    kills: int = 0
    restarts: int = 0
    runs: int = 0
    same: bool = True
    differences: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    by_kind: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        return self.same and not self.leftovers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="go on with runs and kills for so long")
    parser.add_argument("--seed", type=int, default=1, help="of when and what is killed (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    undisturbed_help = "compare with this finished run, and take its configuration (default: one is made)"
    parser.add_argument("--undisturbed", type=Path, metavar="RUN", help=undisturbed_help)
    set_help = "a key of the disturbed runs alone that changes no bit, e.g. save_while_sampling=true (repeatable)"
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help=set_help)
    args = parser.parse_args()
    if args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes}: expected more than 0")
    report = soak(args.minutes, args.seed, args.undisturbed, args.settings)
    print(json.dumps(asdict(report)) if args.json else in_words(report), flush=True)
    if not report.is_clean:
        sys.exit(1)


def in_words(report: Report) -> str:
    found = [*report.differences, *report.leftovers]
    return "\n".join(
        [
            f"{report.runs} runs, {report.kills} kills, {report.restarts} restarts in {report.seconds:.0f} s: "
            + ("the same bits" if report.same else "OTHER BITS")
            + (", nothing left over" if not report.leftovers else ""),
            *(f"  {line}" for line in found),
        ]
    )


def soak(minutes: float, seed: int, undisturbed: Path | None = None, settings: Sequence[str] = ()) -> Report:
    """Disturb runs for some minutes. Raises UserError where the undisturbed run fails or is not finished.

    Args:
        minutes: To go on with runs and kills.
        seed: Of when and what is killed.
        undisturbed: A finished run to compare with, whose configuration is taken; None: one is made.
        settings: KEY=VALUE of the disturbed runs alone.
    """
    report, draw = Report(seed), random.Random(seed)
    started = time.monotonic()
    name = f"soak-{os.getpid()}"
    overrides = [f"--set={value}" for value in SMALL] if undisturbed is None else list(settings_of(undisturbed))
    whole = undisturbed or make_undisturbed(f"{name}-undisturbed", overrides)
    bits = bits_of(whole)
    until = time.monotonic() + 60 * minutes
    while not report.runs or time.monotonic() < until:
        resident = report.runs % 2 == 1
        run = ROOT / "runs" / f"{name}-{report.runs + 1}"
        own = [f"--set={setting}" for setting in settings]
        arguments = [*overrides, *own, *(["--resident"] if resident else [])]
        say(f"run {report.runs + 1}, {'resident' if resident else 'stage by stage'}")
        with Disturbed(run, arguments, draw, report) as disturbed:
            disturbed.until_done(lambda: time.monotonic() < until)
        differences = compared(bits, run)
        report.differences += differences
        report.same = not report.differences
        report.runs += 1
        if report.is_clean:
            shutil.rmtree(run, ignore_errors=True)
            disturbed.said.unlink()
    if undisturbed is None and report.is_clean:
        shutil.rmtree(whole, ignore_errors=True)
    report.seconds = round(time.monotonic() - started, 1)
    return report


def say(line: str) -> None:
    print(f"soak: {line}", file=sys.stderr, flush=True)


def settings_of(run: Path) -> Iterator[str]:
    """Yield the arguments that give a new run the configuration of a finished one."""
    directory = open_run(run)
    yield f"--config={directory.root / 'config.yaml'}"


def make_undisturbed(name: str, overrides: list[str]) -> Path:
    say("the undisturbed run")
    done = subprocess.run(command(name, overrides), cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise UserError(f"the undisturbed run failed ({''.join(last)}): see runs/{name}/log.txt")
    return ROOT / "runs" / name


def command(name: str, arguments: list[str]) -> list[str]:
    """Return the one command of a run, the same each time."""
    return ["bash", "run_all.sh", "--name", name, *arguments]


def bits_of(run: Path) -> dict[str, str]:
    """Return the sha256 of every file of a finished run that must be the same in another one, by its place there.

    Raises UserError where an output is missing.
    """
    directory = open_run(run)
    hashes: dict[str, str] = {}
    for stage, turn in all_turns(directory):
        output = stage.output(directory, turn)
        manifest = read_manifest(output)
        if manifest is None:
            raise UserError(f"{output}: not there: the run is not finished: bash run_all.sh --name {run.name}")
        place = output.relative_to(directory.root).as_posix()
        files = {f"{place}/{name}": entry.sha256 for name, entry in manifest.files.items()}
        hashes |= {file: sha for file, sha in files.items() if file.endswith(BITS) and not file.endswith(TIMED)}
    return hashes


def compared(expected: dict[str, str], run: Path) -> list[str]:
    """Return the files of a disturbed run that differ, or are missing."""
    try:
        found = bits_of(run)
    except UserError as error:
        return [str(error)]
    return [f"{run}/{name}: other bits" for name in sorted(expected) if found.get(name) != expected[name]]


class Disturbed:
    """One run that is started again until it is done, and killed in between.

    All its temporary files go to a directory of their own, so that what is left there is its own.
    """

    def __init__(self, run: Path, arguments: list[str], draw: random.Random, report: Report):
        self.run, self.draw, self.report = run, draw, report
        self.command = command(run.name, arguments)
        self.said = run.with_name(f"{run.name}.said.txt")
        """What its commands print."""
        self.longest_wait = LONGEST_WAIT
        self.looks = 0
        self.seen: dict[int, float] = {}
        """Every process that ever belonged to the run: number and time of creation."""

    def __enter__(self) -> "Disturbed":
        self.temporary = Path("/tmp") / self.run.name
        self.temporary.mkdir()
        self.shared: set[str] = set()
        """Every file in /dev/shm that one of them ever had mapped, or that has its number in its name."""
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def until_done(self, disturbs: Callable[[], bool]) -> None:
        """Start the command until it ends well; send signals while `disturbs`."""
        finished = 0
        while (status := self.once(disturbs)) != 0:
            finished, before = len(list(self.run.rglob(MANIFEST))), finished
            self.longest_wait = LONGEST_WAIT if finished > before else 1.5 * self.longest_wait
            if status is None:
                self.report.leftovers.append(f"{self.run}: hangs: killed after {HUNG_SECONDS:.0f} s without a signal")
                return
            self.report.restarts += 1
            self.wait_for_lock()
        self.report.leftovers += self.left()

    def once(self, disturbs: Callable[[], bool]) -> int | None:
        """Run the command with kills. Returns its exit status, None where it hung."""
        started = time.monotonic()
        with open(self.said, "ab") as said:
            process = subprocess.Popen(
                self.command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True,
                env={**os.environ, "TMPDIR": str(self.temporary)},
            )  # fmt: skip
        next_kill = started + self.draw.uniform(0.2, self.longest_wait)
        last_kill = started
        while process.poll() is None:
            self.look()
            now = time.monotonic()
            if now > next_kill and disturbs():
                self.kill_something(process)
                last_kill = now
                next_kill = time.monotonic() + self.draw.uniform(0.2, self.longest_wait)
            if now - last_kill > HUNG_SECONDS:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None
            time.sleep(0.1)
        return process.returncode

    def look(self) -> None:
        """Remember the processes that are there now: those of the session, and the servers."""
        for process in self._now():
            self.seen[process.pid] = process.create_time()
        self.looks += 1
        if self.looks % LOOKS_PER_MAP == 0:
            self.shared |= set(shared_memory_of(self.seen))

    def _now(self) -> Iterator[psutil.Process]:
        place = str(self.run.relative_to(ROOT))
        for process in psutil.process_iter(["cmdline", "ppid", "create_time"]):
            try:
                words = process.info["cmdline"] or []
                parent = process.info["ppid"]
                if any(place in word for word in words) or self.seen.get(parent) is not None:
                    yield process
            except psutil.NoSuchProcess:
                continue

    def processes(self) -> list[psutil.Process]:
        """Return what is still alive of all that belonged to the run."""
        self.look()
        alive = []
        for number, created in self.seen.items():
            try:
                process = psutil.Process(number)
                if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
            except psutil.NoSuchProcess:
                continue
        return alive

    def kill_something(self, leader: subprocess.Popen) -> None:
        there = {target: victims for target in TARGETS if (victims := self.victims(target, leader))}
        if not there:
            return
        target, number = self.draw.choice(sorted(there)), self.draw.choice(SIGNALS)
        number = signal.SIGUSR1 if target == "request" else number
        victim = self.draw.choice(there[target])
        name = f"{signal.Signals(number).name} {target}"
        say(f"{name}, {victim.pid}: {shown(victim)}")
        send(victim, number, whole_group=target == "group")
        if number == signal.SIGSTOP:
            time.sleep(self.draw.uniform(0.5, LONGEST_STOP))
            send(victim, signal.SIGCONT, whole_group=target == "group")
        self.report.kills += 1
        self.report.by_kind[name] = self.report.by_kind.get(name, 0) + 1

    def victims(self, target: str, leader: subprocess.Popen) -> list[psutil.Process]:
        """Return the processes that a target may mean now, in the order of their numbers."""
        alive = sorted(self.processes(), key=lambda process: process.pid)
        if target in ("group", "request"):
            return [process for process in alive if process.pid == leader.pid]
        if target == "server":
            record = read_record(self.run / "server")
            return [process for process in alive if record is not None and process.pid == record.pid]
        words = {"rank": "--run", "grader": "rollout.grading"}.get(target, "")
        chosen = [process for process in alive if words in shown(process)]
        if target == "rank":
            parents = {process.pid for process in alive if "tools.torchrun" in shown(process)}
            chosen = [process for process in chosen if parent_of(process) in parents]
        return chosen

    def wait_for_lock(self) -> None:
        """A run whose leader was killed may still have a stage that ends; the next start would be refused."""
        until = time.monotonic() + END_SECONDS
        while (self.run / ".lock").exists() and is_locked(self.run / ".lock"):
            if time.monotonic() > until:
                holders = ", ".join(f"{process.pid} {shown(process)}" for process in self.processes())
                self.report.leftovers.append(f"{self.run}/.lock: held after {END_SECONDS:.0f} s ({holders})")
                for process in self.processes():
                    process.kill()
                return
            time.sleep(0.2)

    def left(self) -> list[str]:
        """Return what a finished run has left behind, after a while."""
        until = time.monotonic() + END_SECONDS
        while (found := self._left()) and time.monotonic() < until:
            time.sleep(1.0)
        return found

    def _left(self) -> list[str]:
        found = [f"process {process.pid}: {shown(process)}" for process in self.processes()]
        found += [f"{path}: unfinished" for kind in ("partial", "interim") for path in self.run.rglob(f"*.{kind}")]
        found += [f"{path}: left" for path in self.run.glob("*.end")]
        found += [f"{path}: locked" for path in self.run.rglob("*.lock") if is_locked(path)]
        found += [f"{path}: a lock of nobody" for path in self.run.rglob("?*.lock") if path.name != ".lock"]
        found += [f"{path}: left" for path in (self.run / "server").glob("server.json*")]
        found += [f"{self.temporary / name}: left" for name in self._temporary()]
        found += [f"{path}: left" for path in self._shared()]
        return found

    def _temporary(self) -> list[str]:
        return sorted(name for name in os.listdir(self.temporary) if not name.startswith(CACHE))

    def _shared(self) -> list[str]:
        """Return the run's shared memory that is still there and that no process uses."""
        return sorted(path for path in self.shared if not in_use(path))


def send(victim: psutil.Process, number: signal.Signals, whole_group: bool) -> None:
    try:
        if whole_group:
            os.killpg(victim.pid, number)
        else:
            os.kill(victim.pid, number)
    except ProcessLookupError:
        pass


def shown(process: psutil.Process) -> str:
    """Return the command line of a process, cut."""
    try:
        return " ".join(process.cmdline())[:200] or process.name()
    except psutil.NoSuchProcess:
        return "gone"


def parent_of(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def is_locked(path: Path) -> bool:
    """Say whether somebody holds the lock of a file."""
    try:
        with open(path) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def in_use(path: str) -> bool:
    """Say whether a living process has a file of /dev/shm open or mapped, or it is gone."""
    if not os.path.exists(path):
        return True
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if path in (process / "maps").read_text(errors="replace"):
                return True
            if any(os.readlink(link) == path for link in (process / "fd").iterdir()):
                return True
        except OSError:
            continue
    return False


if __name__ == "__main__":
    run_command(main)

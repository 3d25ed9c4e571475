"""Does it work on this machine? What the first person with a GPU types.

    .venv/bin/python -m tools.gpu_acceptance --output DIR [--quick] [--device cpu] [--sections A,B]

environment     versions, GPUs, driver, compilers
communication   NCCL's collective operations, exact, and their speed
parity          the model in bfloat16 against transformers: log-probs and every gradient
kernels         the attention kernels that torch chooses
checkpoint      save, resume, export
iteration       one iteration of PAPO on the geometry of 3B with random weights: seconds, tokens/s, MFU, memory
server          SGLang starts, its log-probs are Megatron's and transformers', its pictures follow a weight update
hand_over       SGLang gives up the memory of its GPU, a trainer uses it, SGLang takes it back

Nothing is downloaded: models are random, pictures are made. Each section is a process of its own and is ended after 9
minutes. Type the command again after an interruption: sections that have passed are kept in DIR, others run again (all
of them where the code, the packages or the GPUs have changed). DIR/report.md has a table to paste, DIR/report.json the
same for programs, DIR/SECTION.log what a section printed.

Each check is pass, fail or not possible, with what was measured and its limit; checks called control make a fault on
purpose, which must be noticed. What a machine lacks makes its checks not possible, with the reason, and is no failure:
without SGLang's environment the training part runs alone, with any Python from 3.11 on that has torch, megatron-core
and transformers. --device cpu runs all of it at tiny sizes with gloo, on a machine without GPUs.

Exit status 0: nothing failed; 1: a check failed; 2: it could not run.
"""

import argparse
import hashlib
import importlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from tools.gpu_acceptance.report import Line, Section, write_report
from tools.gpu_acceptance.task import Task

ROOT = Path(__file__).resolve().parents[2]
TRAINING = (
    "torch", "megatron.core", "transformers", "tokenizers", "safetensors", "numpy", "PIL", "pydantic", "yaml", "xxhash",
    "psutil", "tqdm",
)  # fmt: skip
SECTIONS = {
    "environment": (),
    "communication": ("torch", "pydantic", "yaml", "tqdm"),
    "parity": TRAINING,
    "kernels": TRAINING,
    "checkpoint": TRAINING,
    "iteration": TRAINING,
    "server": (*TRAINING, "aiohttp"),
    "hand_over": (*TRAINING, "aiohttp"),
}
"""By name, in their order: the modules that each imports, some of which a borrowed machine may lack."""
LIMIT_SECONDS = 9 * 60
END_SECONDS = 30
"""How long a section that is told to end may take, to stop its server."""
DEVICE_FILE = Path("/dev/nvidia0")
VERSIONS = ("torch", "megatron-core", "transformers", "triton")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=".venv/bin/python -m tools.gpu_acceptance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="directory for the report and what it needs")
    add("--quick", action="store_true", help="smaller measurements, fewer controls: for a first look")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: at tiny sizes, without GPUs (default cuda)")
    add("--sections", metavar="A,B", default=",".join(SECTIONS), help="only these (default: all)")
    add("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # of the processes that this one starts
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.sections.split(",")]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        return refuse(f"--sections {unknown[0]!r}: there is no such section: {', '.join(SECTIONS)}")
    output = arguments.output.expanduser().resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return refuse(f"--output {output}: cannot be made ({error.strerror}): choose another")
    task = Task(output, arguments.device, arguments.quick)
    if arguments.section:
        leave_after(task, arguments.section)
    if task.device == "cuda" and shutil.which("nvidia-smi") is None and not DEVICE_FILE.exists():
        return refuse("no GPU here (no nvidia-smi, no /dev/nvidia0): run it where one is, or give --device cpu")
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    return run_all(task, [name for name in SECTIONS if name in names])


def refuse(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 2


def run_all(task: Task, names: list[str]) -> int:
    """Run sections that have not passed yet, write the report after each, and return the exit status."""
    settings = settings_of(task)
    sections: list[Section] = []
    for name in names:
        kept = Section.read(task.output, name)
        if kept is not None and kept.settings == settings and not kept.failed:
            print(f"{name}: passed before, kept", flush=True)
            sections.append(kept)
        else:
            print(f"{name} ...", flush=True)
            sections.append(run_in_process(task, name, settings))
            print_section(sections[-1])
        write_report(task.output, sections, settings)
    failed = [section.name for section in sections if section.failed]
    print(f"failed: {', '.join(failed)}" if failed else "passed", f"({task.output}/report.md)", flush=True)
    return 1 if failed else 0


def settings_of(task: Task) -> dict[str, Any]:
    """Return what a section's result holds for: with anything else it runs again."""
    code = hashlib.sha256()
    for file in sorted(path for room in ("megatron_papo", "tools") for path in (ROOT / room).rglob("*.py")):
        code.update(file.read_bytes())
    return {
        "device": task.device,
        "quick": task.quick,
        "gpus": gpus() if task.device == "cuda" else [],
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in VERSIONS},
        "code": code.hexdigest()[:16],
    }


def gpus() -> list[str]:
    """Return what nvidia-smi calls the GPUs."""
    if shutil.which("nvidia-smi") is None:
        return []
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return [line.partition(" (UUID")[0] for line in said.stdout.splitlines()]


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def run_in_process(task: Task, name: str, settings: dict[str, Any]) -> Section:
    """Run one section in a process of its own, which is ended after LIMIT_SECONDS, and return what it found."""
    Section(name, settings).write(task.output)
    command = [sys.executable, "-m", "tools.gpu_acceptance", "--output", str(task.output), "--device", task.device]
    command += ["--section", name, *(["--quick"] if task.quick else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"  # ninja
    if task.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    log = task.output / f"{name}.log"
    started = time.monotonic()
    problem = None
    with open(log, "w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            if status := process.wait(LIMIT_SECONDS):
                problem = f"ended with status {status}: {last_line(log)}"
        except subprocess.TimeoutExpired:
            problem = f"ended after {LIMIT_SECONDS} s, the time for one section: {last_line(log)}"
        finally:
            end(process)
    section = Section.read(task.output, name) or Section(name, settings)
    section.seconds = time.monotonic() - started
    if problem is not None:
        section.add(Line("the section runs to its end", "fail", f"{problem}; the whole log: {log}"))
    section.finished = problem is None
    section.write(task.output)
    return section


def end(process: subprocess.Popen[bytes]) -> None:
    """End a section that still runs, and what it has started: first so that it can clear up, then at once."""
    for number, seconds in ((signal.SIGINT, END_SECONDS), (signal.SIGKILL, END_SECONDS)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it printed nothing"


def print_section(section: Section) -> None:
    for line in section.lines:
        print(f"  {line.result:12} {line.what}: {line.found}", flush=True)
    for fact in section.facts:
        print(f"  {'':12} {fact.name}: {fact.value}", flush=True)
    print(f"  {section.seconds:.0f} s", flush=True)


def leave_after(task: Task, name: str) -> NoReturn:
    """Run one section and end this process at once: a library's thread may still hold a process group."""
    status = 1
    try:
        run_section(task, name)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_section(task: Task, name: str) -> None:
    """Run one section in this process. Its file says after each check what has been found so far."""
    section = Section.read(task.output, name)
    assert section is not None  # who starts this process has written it
    missing = [needed for needed in SECTIONS[name] if not is_there(needed)]
    if missing:
        reason = f"{', '.join(missing)} missing: pip install -r requirements.txt"
        section.add(Line("the section", "not possible", reason))
        section.write(task.output)
        return
    if task.device == "cuda" and name != "environment" and not sees_gpu():
        section.add(Line("the section", "not possible", "torch sees no GPU: see section environment"))
        section.write(task.output)
        return
    module = importlib.import_module(f"tools.gpu_acceptance.{name}")
    with closing(module.run(task)) as entries:  # an interruption, too, lets it stop its server
        for entry in entries:
            section.add(entry)
            section.write(task.output)


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

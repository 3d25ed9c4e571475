"""Conversions that are killed, run out of disk, or meet another one on the same output. Forks, so that imports are paid
for once.

    python tests/workers/convert_faults.py HF MEGATRON DIRECTORY

HF and MEGATRON hold the same weights. Prints one JSON object for the test to judge.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

KILLS = 8


def main() -> None:
    hf, megatron, root = map(Path, sys.argv[1:])
    from megatron_papo.checkpoint import conversion_output, convert, model_card  # noqa: F401

    directions = {
        "megatron": lambda output: conversion_output.to_megatron(hf, output, {}),
        "hf": lambda output: conversion_output.to_hf(megatron, output, {}),
    }
    results = {}
    for name, work in directions.items():
        started = time.perf_counter()
        first = child(work, root / name / "whole")
        seconds = time.perf_counter() - started
        results[name] = {
            "first": first,
            "killed": [kill(work, root / name / "killed", seconds * part / KILLS) for part in range(KILLS + 1)]
            + [kill(work, root / name / "killed", None) for _ in range(2)],
            "after": child(work, root / name / "killed"),
            "full": full_disk(work, root / name / "full", 150_001),
            "no limit": full_disk(work, root / name / "full", resource.RLIM_INFINITY),
            "together": together(work, root / name / "together"),
        }
    print(json.dumps(results))


def child(work, output: Path, before=lambda: None) -> dict:
    """The work in a process of its own, to its end."""
    return finish(start(work, output, before), output)


def start(work, output: Path, before=lambda: None) -> tuple[int, int]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    before()
    from megatron_papo.errors import UserError

    message = ""
    try:
        work(output)
    except UserError as error:
        message = str(error)
    except BaseException as error:
        message = f"unexpected {error!r}"
    os.write(writing, message.encode())
    os._exit(0)


def finish(started: tuple[int, int], output: Path) -> dict:
    """What it said, and what is there now."""
    pid, reading = started
    with os.fdopen(reading, "rb") as stream:
        message = stream.read().decode()
    os.waitpid(pid, 0)
    left = sorted(path.name for path in output.parent.iterdir() if path != output and path.name.startswith(output.name))
    return {"message": message, "output": complete(output), "left": left}


def complete(output: Path) -> bool | None:
    """None where there is no output."""
    if not output.exists():
        return None
    from megatron_papo.checkpoint.proof import require_proof
    from megatron_papo.run.stage_output import read_manifest, verify_files

    verify_files(output)
    require_proof(output)
    return read_manifest(output) is not None


def kill(work, output: Path, after: float | None) -> dict:
    """after: seconds; None: as soon as it has begun to write."""
    shutil.rmtree(output, ignore_errors=True)
    started = start(work, output)
    if after is None:
        partial, deadline = output.with_name(output.name + ".partial"), time.monotonic() + 60
        while not (partial.is_dir() and any(partial.iterdir())) and not output.exists() and time.monotonic() < deadline:
            pass
    else:
        time.sleep(after)
    os.kill(started[0], signal.SIGKILL)
    return finish(started, output)


def full_disk(work, output: Path, limit: int) -> dict:
    """No file may become larger than `limit` bytes."""
    return child(work, output, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))


def together(work, output: Path) -> list[dict]:
    """Two at once."""
    both = [start(work, output) for _ in range(2)]
    messages = [finish(each, output)["message"] for each in both]
    return [{"message": message} for message in messages] + [finish(start(lambda _: None, output), output)]


if __name__ == "__main__":
    main()

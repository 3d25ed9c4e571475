"""The parent's side of a grading process: start it with an empty environment, ask it, replace it."""

import json
import os
import select
import subprocess
import sys
from contextlib import suppress

from megatron_papo.errors import UserError
from megatron_papo.reading import shown
from megatron_papo.rollout.grading import LATE, READY, RIGHT, WRONG

PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; from megatron_papo.rollout.grading import serve; serve(float(sys.argv[1]))"
)
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
"""All that a grading process is given: the same order of sympy's terms, hence the same grade, in each."""
LIBRARY_PATH = "LD_LIBRARY_PATH"
"""Given too where it is set: without it some machines' Python does not start."""
START_SECONDS = 300.0
PATIENCE_SECONDS = 120.0
"""For a process that does not compute: it was stopped, or the machine is. Computing has its own, shorter limit."""


class GraderDied(Exception):
    """The process ended, or was ended, before it answered; not necessarily the answer's fault."""


class GraderProcess:
    """A process that grades one answer after another. Raises UserError if it does not start."""

    def __init__(self, time_limit_seconds: float):
        word = self._start(time_limit_seconds)
        if word != READY:  # somebody else may have ended it
            self.stop()
            word = self._start(time_limit_seconds)
        if word != READY:
            self.stop()
            assert self._process.stderr
            said = self._process.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
            raise UserError(
                f"reward: a grading process does not start ({shown(said[0]) if said else 'it says nothing'}): run"
                " bash tools/setup_environment.sh again"
            )

    def _start(self, time_limit_seconds: float) -> str:
        """Start the process and return its first word."""
        library_path = {name: value for name, value in os.environ.items() if name == LIBRARY_PATH}
        paths = [os.path.abspath(path) for path in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-c", PROGRAM, str(time_limit_seconds), *paths],
            env=ENVIRONMENT | library_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdin and self._process.stdout
        self._requests, self._replies = self._process.stdin, self._process.stdout
        word, _, lacking = self._receive(START_SECONDS).partition(" ")
        self.lacking = lacking.split()
        """The layers of the sandbox that this machine does not have: see sandbox.confine."""
        return word

    def ask(self, content: str, answer: str) -> str:
        """Return RIGHT, WRONG or LATE. Raises GraderDied."""
        try:
            self._requests.write(json.dumps([content, answer]).encode() + b"\n")
            self._requests.flush()
        except OSError:
            raise GraderDied
        word = self._receive(PATIENCE_SECONDS)
        if word not in (RIGHT, WRONG, LATE):
            raise GraderDied
        return word

    def stop(self) -> None:
        """End the process and its child: at the end of their input, or else by force."""
        with suppress(OSError):
            self._requests.close()
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self, seconds: float) -> str:
        """Return the next word; an empty one where the process has ended, or is ended because it took too long."""
        watched = select.poll()  # a thread that waits in its place costs more than most answers do
        watched.register(self._replies, select.POLLIN)
        if not watched.poll(seconds * 1000):
            self._process.kill()
        return os.read(self._replies.fileno(), 256).decode(errors="replace").strip()

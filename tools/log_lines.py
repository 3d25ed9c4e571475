"""Passes a command's output on, and writes it into a log as lines with time and name. Standard library only: it starts
fast.

    COMMAND 2>&1 | python3 tools/log_lines.py LOG NAME

A progress bar, which redraws its line with carriage returns, is in the log as its last state, and every minute.
Control characters of a terminal stay out of the log. The log describes the command and never ends it: where the disk is
full or the terminal is gone, the command goes on without.
"""

import codecs
import os
import re
import signal
import sys
import time
from contextlib import suppress

SECONDS_BETWEEN_STATES = 60.0
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


def main() -> None:
    path, name = sys.argv[1:3]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command it listens to ends first, and has a last word
    terminal = sys.stdout.isatty() or os.environ.get("PAPO_TERMINAL") == "1"
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    pending, last_state = "", time.monotonic()

    def write(line: str) -> None:
        states = [state for state in line.split("\r") if state.strip()]
        text = CONTROL.sub("", states[-1]) if states else ""
        append(path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name}: {text.removeprefix(f'{name}: ')}\n")
        if not terminal:
            pass_on(f"{text}\n")

    while raw := os.read(0, 1 << 16):
        piece = decode(raw)
        if terminal:
            pass_on(piece)
        *lines, pending = (pending + piece).split("\n")
        for line in lines:
            write(line)
        if "\r" in pending and time.monotonic() - last_state > SECONDS_BETWEEN_STATES:
            write(pending)
            pending, last_state = "", time.monotonic()
    if pending.strip():
        write(pending)


def append(path: str, text: str) -> None:
    """Add text to the log, if it can be written."""
    with suppress(OSError):
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(log, text.encode("utf-8", "replace"))
        finally:
            os.close(log)


def pass_on(text: str) -> None:
    """Show text to whoever looks, if there is anybody."""
    with suppress(OSError):
        data = text.encode("utf-8", "replace")
        while data:
            data = data[os.write(1, data) :]


if __name__ == "__main__":
    main()

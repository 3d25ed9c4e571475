"""Passes a command's output on, and writes it into a log as lines with time and name. Standard library only: it starts
fast.

    COMMAND 2>&1 | python3 tools/log_lines.py LOG NAME

A progress bar, which redraws its line with carriage returns, is in the log as its last state, and every minute.
Control characters of a terminal stay out of the log.
"""

import os
import re
import signal
import sys
import time

SECONDS_BETWEEN_STATES = 60.0
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


def main() -> None:
    path, name = sys.argv[1:3]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command it listens to ends first, and has a last word
    terminal = sys.stdout.isatty() or os.environ.get("PAPO_TERMINAL") == "1"
    pending, last_state = "", time.monotonic()
    with open(path, "a", encoding="utf-8") as log:

        def write(line: str) -> None:
            states = [state for state in line.split("\r") if state.strip()]
            text = CONTROL.sub("", states[-1]) if states else ""
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name}: {text}\n")
            log.flush()
            if not terminal:
                print(text, flush=True)

        while piece := os.read(0, 1 << 16).decode("utf-8", errors="replace"):
            if terminal:
                sys.stdout.write(piece)
                sys.stdout.flush()
            *lines, pending = (pending + piece).split("\n")
            for line in lines:
                write(line)
            if "\r" in pending and time.monotonic() - last_state > SECONDS_BETWEEN_STATES:
                write(pending)
                pending, last_state = "", time.monotonic()
        if pending.strip():
            write(pending)


if __name__ == "__main__":
    main()

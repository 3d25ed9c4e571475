"""Shows where a run stands: every output of every stage, done, stale (and which key or input says so), missing or
running.

    .venv/bin/python -m tools.status --run runs/demo [--json] [--all]

Finished iterations but the last are left out; --all shows each output. Nothing is hashed and nothing is written.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_papo.reading import shown
from megatron_papo.run.command_line import run
from megatron_papo.run.run_config import open_run
from megatron_papo.run.state import State, states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory, e.g. runs/demo")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--all", action="store_true", help="a line for every output, finished iterations included")
    args = parser.parse_args()
    rows = states(open_run(args.run))
    if args.json:
        print(json.dumps({"run": str(args.run), "outputs": [as_json(row) for row in rows]}, indent=1))
    else:
        show(rows if args.all else shortened(rows))


def as_json(state: State) -> dict[str, object]:
    return {
        "stage": state.stage.name,
        "iteration": state.turn.iteration,
        "evaluation_set": state.turn.evaluation_set,
        "state": state.word,
        "reason": state.reason,
        "bytes": state.bytes,
        "seconds": state.seconds,
        "output": str(state.output),
    }


def shortened(rows: Sequence[State]) -> list[State]:
    """Leave out the iterations of which everything is done, but for the last of them."""
    done = {
        number
        for number in {row.turn.iteration for row in rows if row.turn.iteration}
        if all(row.word == "done" for row in rows if row.turn.iteration == number)
    }
    return [row for row in rows if row.turn.iteration not in done - {max(done, default=None)}]


def show(rows: Sequence[State]) -> None:
    table = Table()
    for column in ("stage", "turn", "state", "size", "seconds", "output"):
        table.add_column(column, justify="right" if column in ("size", "seconds") else "left")
    colors = {"done": "green", "stale": "red", "running": "yellow", "missing": "dim"}
    for row in rows:
        words = Text(row.word, colors[row.word]).append(f" ({shown(row.reason)})" if row.reason else "", "default")
        size = f"{row.bytes / 1e6:,.1f} MB" if row.bytes else ""
        seconds = f"{row.seconds:,.0f}" if row.seconds else ""
        turn = str(row.turn).replace("--", "").replace("evaluation-set", "set")
        table.add_row(row.stage.name, turn, words, size, seconds, Text(shown(row.output, limit=0)))
    console = Console()
    # Whoever reads it through a pipe wants every path whole.
    (console if console.is_terminal else Console(width=10_000)).print(table)


if __name__ == "__main__":
    run(main)

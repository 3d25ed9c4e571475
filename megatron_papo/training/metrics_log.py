"""What a training stage writes about its optimizer steps: metrics.jsonl and guard.jsonl."""

import json
from dataclasses import asdict
from pathlib import Path

from megatron_papo.training.guard import Decision

METRICS, DECISIONS = "metrics.jsonl", "guard.jsonl"


class MetricsLog:
    """One entry per optimizer step. A step that the hacking guard has undone stays, under its `attempt`: the last one
    counts. Lines that are there stay: those of an iteration that goes on."""

    def __init__(self, directory: Path, iteration: int):
        self.directory, self.iteration = directory, iteration

    def __enter__(self) -> "MetricsLog":
        self.lines = open(self.directory / METRICS, "a")
        self.decisions = open(self.directory / DECISIONS, "a")
        return self

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.write(json.dumps({"step": step, "iteration": self.iteration} | metrics) + "\n")
        self.lines.flush()

    def write_decision(self, decision: Decision) -> None:
        self.decisions.write(json.dumps({"iteration": self.iteration} | asdict(decision)) + "\n")
        self.decisions.flush()

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.decisions.close()


def read_metrics(path: Path) -> list[dict]:
    """The steps of a metrics.jsonl that count, in order: of each step number the last attempt."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return list({row["step"]: row for row in rows}.values())

"""Plot what the hacking guard saw, and did, in one or several runs: one colour per run, a dotted line per decision.

    .venv/bin/python -m tools.plot.guard --run runs/demo
    .venv/bin/python -m tools.plot.guard --run "no guard=runs/gamma02" --run guard=runs/guarded --output guard.png

Each RUN is a run directory of run_all.sh, or `label=directory`. Accuracy of the rollouts (what the policy of each
iteration got right), KL_prcp and its variance over tokens, the clip-high fraction, both entropies and the gamma in use,
per optimizer step. Steps that a rollback has undone are thin. Prints the decisions.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run
from megatron_papo.training.metrics_log import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    "accuracy": ("accuracy of the rollouts", "linear"),
    "kl_prcp_mean": ("KL_prcp (nats per token)", "log"),
    "kl_prcp_variance": ("variance of KL_prcp over tokens", "log"),
    "clip_fraction_high": ("clipped from above (share of tokens)", "linear"),
    "entropy": ("entropy (nats)", "linear"),
    "masked_image_entropy": ("entropy, masked picture (nats)", "linear"),
    "kl_prcp_coef": ("gamma in use", "log"),
}


@dataclass(frozen=True)
class GuardedRun:
    """What the plot shows of a run."""

    counted: list[list[dict]]
    """Metrics of the optimizer steps that count, by iteration."""
    undone: list[list[dict]]
    """Metrics of the steps that a rollback has undone, by iteration."""
    decisions: list[dict]


def labelled(text: str) -> tuple[str, Path]:
    """Return label and directory of `directory` or `label=directory`. Raises UserError if it is not there."""
    if Path(text).is_dir():
        return Path(text).resolve().name, Path(text)
    label, equals, path = text.partition("=")
    if not equals or not Path(path).is_dir():
        raise UserError(f"--run {text}: no such directory: give a run directory, or label=directory")
    return label, Path(path)


def read_run(directory: Path) -> GuardedRun:
    """Read metrics and decisions of a run. Raises UserError if it has not trained."""
    files = sorted(directory.glob("iterations/*/megatron/metrics.jsonl"))
    if not files:
        raise UserError(
            f"{directory}: holds no iterations/*/megatron/metrics.jsonl: give a run directory of run_all.sh"
        )
    read = GuardedRun([], [], [])
    for file in files:
        read.counted.append(read_metrics(file))
        last = {row["step"]: row["attempt"] for row in read.counted[-1]}
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        read.undone.append([row for row in rows if row["attempt"] < last.get(row["step"], 0)])
        read.decisions.extend(json.loads(line) for line in (file.parent / "guard.jsonl").read_text().splitlines())
    return read


def smooth(values: list[float], weight: float = 0.25) -> list[float]:
    """Return the exponential mean of values, like the guard's own recent value."""
    means: list[float] = []
    for value in values:
        means.append(value if not means else means[-1] + weight * (value - means[-1]))
    return means


def values_of(name: str, iterations: list[list[dict]]) -> list[float]:
    """Return what a panel shows at each step: the metric, smooth but for the accuracy and the gamma in use."""
    if name == "accuracy":  # one policy made all rollouts of an iteration
        means = [(sum(row["accuracy"] for row in rows) / len(rows), len(rows)) for rows in iterations]
        return [mean for mean, steps in means for _ in range(steps)]
    values = [row[name] for rows in iterations for row in rows]
    return values if name == "kl_prcp_coef" else smooth(values)


def draw_run(panels: Iterable["Axes"], run: GuardedRun, label: str, colour: str) -> None:
    """Draw a run into all panels."""
    steps = [row["step"] for rows in run.counted for row in rows]
    for axis, (name, (title, scale)) in zip(panels, PANELS.items()):
        axis.set_title(title, fontsize=10)
        axis.set_yscale(scale)
        axis.plot(steps, values_of(name, run.counted), color=colour, label=label)
        for rows in run.undone:
            if name != "accuracy" and rows:
                thin = smooth([row[name] for row in rows])
                axis.plot([row["step"] for row in rows], thin, color=colour, linewidth=0.7, alpha=0.6)
        for decision in run.decisions:
            if decision["action"] != "warn":
                axis.axvline(decision["step"], color=colour, linestyle=":")


def plot(runs: dict[str, GuardedRun], output: Path) -> None:
    """Draw runs, by their labels, into one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 2, figsize=(11, 11), sharex=True)
    panels = axes.flatten()
    for colour, (label, run_read) in zip(pyplot.rcParams["axes.prop_cycle"].by_key()["color"], runs.items()):
        draw_run(panels, run_read, label, colour)
    panels[0].legend()
    panels[-1].axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    panels[5].set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def in_words(label: str, decision: dict) -> str:
    """Return the line that says what the guard decided."""
    signs = ", ".join(f"{name} x {decision['ratios'][name]:.1f}" for name in decision["signs"])
    gamma = f"gamma x {decision['kl_prcp_scale']:g} from then on"
    return f"{label}: step {decision['step']}: {decision['action']}: {signs}; {gamma}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run_help = "run directory, or LABEL=DIR; may be repeated"
    parser.add_argument("--run", dest="runs", action="append", required=True, metavar="DIR", help=run_help)
    output_help = "picture to write (default: guard.png in the first run directory)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output_help)
    arguments = parser.parse_args()
    named = [labelled(text) for text in arguments.runs]
    runs = {label: read_run(directory) for label, directory in named}
    if len(runs) < len(named):
        raise UserError("--run: two runs have the same label: give --run LABEL=DIR")
    output = arguments.output or named[0][1] / "guard.png"
    plot(runs, output)
    for label, run_read in runs.items():
        for decision in run_read.decisions:
            print(in_words(label, decision))
    print(output)


if __name__ == "__main__":
    run(main)

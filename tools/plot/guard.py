"""Plot what the hacking guard saw, and did, in one or several runs: one colour per run, a dotted line per decision.

    python -m tools.plot.guard "no guard=runs/gamma02" "guard=runs/gamma02_guarded" --output docs/hacking_guard.png

Each RUN is `label=directory`, a run directory of run_all.sh. Accuracy of the rollouts (what the policy of each
iteration got right), KL_prcp and its variance over tokens, the clip-high fraction, both entropies and the gamma in use,
per optimizer step. Steps that a rollback has undone are thin. Prints the decisions.
"""

import argparse
import json
from pathlib import Path

from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run
from megatron_papo.training.metrics_log import read_metrics

PANELS = {
    "accuracy": ("accuracy of the rollouts", "linear"),
    "kl_prcp_mean": ("KL_prcp (nats per token)", "log"),
    "kl_prcp_variance": ("variance of KL_prcp over tokens", "log"),
    "clip_fraction_high": ("clipped from above (share of tokens)", "linear"),
    "entropy": ("entropy (nats)", "linear"),
    "masked_image_entropy": ("entropy, masked picture (nats)", "linear"),
    "kl_prcp_coef": ("gamma in use", "log"),
}


def labelled(text: str) -> tuple[str, Path]:
    label, equals, path = text.partition("=")
    if not equals:
        raise UserError(f"{text}: expected label=directory, e.g. guard=runs/demo")
    return label, Path(path)


def read_run(directory: Path) -> tuple[list[list[dict]], list[list[dict]], list[dict]]:
    """-> the steps of each iteration that count, those that were undone, the guard's decisions."""
    files = sorted(directory.glob("iterations/*/megatron/metrics.jsonl"))
    if not files:
        raise UserError(
            f"{directory}: holds no iterations/*/megatron/metrics.jsonl: give a run directory of run_all.sh"
        )
    counted, undone, decisions = [], [], []
    for file in files:
        counted.append(read_metrics(file))
        last = {row["step"]: row["attempt"] for row in counted[-1]}
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        undone.append([row for row in rows if row["attempt"] < last.get(row["step"], 0)])
        decisions += [json.loads(line) for line in (file.parent / "guard.jsonl").read_text().splitlines()]
    return counted, undone, decisions


def smooth(values: list[float], weight: float = 0.25) -> list[float]:
    """Exponential mean, as the guard's own recent value."""
    means = []
    for value in values:
        means.append(value if not means else means[-1] + weight * (value - means[-1]))
    return means


def plot(runs: dict[str, Path], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 2, figsize=(11, 11), sharex=True)
    panels = axes.flatten()
    for colour, (label, directory) in zip(pyplot.rcParams["axes.prop_cycle"].by_key()["color"], runs.items()):
        counted, undone, decisions = read_run(directory)
        for axis, (name, (title, scale)) in zip(panels, PANELS.items()):
            axis.set_title(title, fontsize=10)
            axis.set_yscale(scale)
            rows = [row for iteration in counted for row in iteration]
            steps = [row["step"] for row in rows]
            values = [row[name] for row in rows]
            if name == "accuracy":  # one policy made all rollouts of an iteration
                values = [
                    sum(r["accuracy"] for r in iteration) / len(iteration) for iteration in counted for _ in iteration
                ]
            axis.plot(
                steps, values if name in ("accuracy", "kl_prcp_coef") else smooth(values), color=colour, label=label
            )
            for iteration in undone:
                if name != "accuracy" and iteration:
                    axis.plot(
                        [r["step"] for r in iteration],
                        smooth([r[name] for r in iteration]),
                        color=colour,
                        linewidth=0.7,
                        alpha=0.6,
                    )
            for decision in decisions:
                if decision["action"] != "warn":
                    axis.axvline(decision["step"], color=colour, linestyle=":")
        for decision in decisions:
            signs = ", ".join(f"{name} x {decision['ratios'][name]:.1f}" for name in decision["signs"])
            print(
                f"{label}: step {decision['step']}: {decision['action']}: {signs}; gamma x"
                f" {decision['kl_prcp_scale']:g} from then on"
            )
    panels[0].legend()
    panels[-1].axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    panels[5].set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="picture to write, e.g. guard.png")
    args = parser.parse_args()
    plot(dict(map(labelled, args.runs)), args.output)
    print(args.output)


if __name__ == "__main__":
    run(main)

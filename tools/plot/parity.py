"""How far SGLang's log-probs were from Megatron's in each iteration of a run, as a picture.

    .venv/bin/python -m tools.plot.parity --run runs/NAME [--output FILE.png]

Reads the first line of iterations/*/megatron/metrics.jsonl: the comparison before the iteration's first optimizer step.
A line that rises over the iterations says that the rollouts come less and less from the policy that is trained
(docs/rollouts.md).
"""

import argparse
from pathlib import Path

from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run
from megatron_papo.training.metrics_log import read_metrics

LINES = (
    ("parity_log_prob_difference_mean", "mean, over the allowed tokens", "C0-o"),
    ("parity_log_prob_difference_max", "largest, over the allowed tokens", "C0--o"),
    ("rollout_log_prob_difference_mean", "mean, over the whole vocabulary", "C1-s"),
    ("rollout_log_prob_difference_max", "largest, over the whole vocabulary", "C1--s"),
    ("rollout_kl_k3", "KL (k3)", "C2-^"),
)
"""Metric, name in the legend, matplotlib format."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory")
    parser.add_argument("--output", type=Path, metavar="FILE", help="picture to write (default: DIR/parity.png)")
    arguments = parser.parse_args()
    drift = read_drift(arguments.run)
    output = arguments.output or arguments.run / "parity.png"
    draw(drift, output)
    last = drift[max(drift)]
    name, value = next((name, last[name]) for name, *_ in LINES if name in last)
    print(f"{output}: {len(drift)} iterations; {name} of the last one: {value:.3g} nats")


def read_drift(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return the first metrics of each iteration, by its number. Raises UserError if there are none."""
    drift = {}
    for file in sorted(run_dir.glob("iterations/*/megatron/metrics.jsonl")):
        drift[int(file.parts[-3])] = read_metrics(file)[0]
    if not drift:
        raise UserError(
            f"{run_dir}: no iterations/*/megatron/metrics.jsonl: give the directory of a run that has trained"
        )
    return drift


def draw(drift: dict[int, dict[str, float]], output: Path) -> None:
    """Draw the metrics of all iterations into a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, label, style in LINES:
        points = [(iteration, metrics[name]) for iteration, metrics in drift.items() if name in metrics]
        if points:
            axes.plot(*zip(*points), style, label=label)
    axes.set(yscale="log", xlabel="iteration", ylabel="nats per token", title="|log-prob by SGLang - by Megatron|")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    run(main)

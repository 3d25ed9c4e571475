"""Writes RUN/summary.json and prints its table: accuracy before and after PAPO, with and without the picture, and
seconds per stage.

reads   stage 7's outputs before training and after the last iteration; the manifests of every stage below --run
writes  RUN/summary.json; brings RUN/metrics.jsonl and RUN/tensorboard up to date
"""

import argparse
import json
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from megatron_papo.checkpoint.keep import best_iterations
from megatron_papo.reading import read_record
from megatron_papo.run.command_line import run
from megatron_papo.run.curves import collect
from megatron_papo.run.manifest import MANIFEST, read_manifest
from megatron_papo.run.records import Metrics
from megatron_papo.run.room import replace_file
from megatron_papo.run.run_config import open_run
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stage_output import require_input


def seconds_per_stage(directory: Path) -> dict[str, float]:
    """Summed over every output below the run directory, from process start to publication."""
    seconds: dict[str, float] = {}
    for path in sorted(directory.rglob(MANIFEST)):
        manifest = read_manifest(path.parent)
        if manifest is not None:
            seconds[manifest.stage] = seconds.get(manifest.stage, 0.0) + manifest.seconds
    return {stage: round(seconds[stage], 1) for stage in sorted(seconds)}


def seconds_per_iteration(directory: Path) -> float | None:
    """Median of what passed between one iteration's export and the next one's, by the clock; None where there are not
    two."""
    times = sorted(path.stat().st_mtime for path in (directory / "iterations").glob(f"*/hf/{MANIFEST}"))
    return round(median(later - earlier for earlier, later in zip(times, times[1:])), 1) if len(times) > 1 else None


def summarize(run: RunDirectory) -> dict:
    """Return what summary.json holds."""
    last, name = run.config.iterations, run.config.evaluation.validation
    metrics: dict[str, float | None] = {}
    for key, number in (("cold_start", 0), ("papo", last)):
        path = run.evaluated(number, name)
        require_input(path, ("stage7_evaluate",), f"bash run_all.sh --name {run.root.name}")
        measured = read_record(path / "metrics.json", Metrics, f"remove {path} and evaluate again")
        metrics[f"accuracy_{key}"] = measured.accuracy
        metrics[f"accuracy_{key}_masked"] = measured.accuracy_masked
    paths = {
        "model": str(run.exported(last)),
        "predictions_cold_start": str(run.evaluated(0, name) / "predictions.jsonl"),
        "predictions_papo": str(run.evaluated(last, name) / "predictions.jsonl"),
        "training_metrics": str(run.metrics),
        "tensorboard": str(run.tensorboard),
        "log": str(run.log),
    }
    best = sorted(best_iterations(run))
    if best:
        paths["best"] = ", ".join(str(run.exported(number)) for number in best)
    seconds = seconds_per_stage(run.root)
    return metrics | {
        "seconds": seconds,
        "seconds_total": round(sum(seconds.values()), 1),
        "seconds_per_iteration": seconds_per_iteration(run.root),
        "evaluation_set": name,
        "chosen_on_the_reported_set": bool(best),
        "paths": paths,
    }


def show(summary: dict) -> None:
    console = Console(width=120)
    table = Table(title="Held-out accuracy, sampled (mean over prompts of the mean over samples)")
    for column in ("", "with the picture", "picture masked"):
        table.add_column(column, justify="right")
    for title, name in (("cold start", "cold_start"), ("after PAPO", "papo")):
        values = (summary[f"accuracy_{name}"], summary[f"accuracy_{name}_masked"])
        table.add_row(title, *("-" if value is None else f"{100 * value:.1f} %" for value in values))
    console.print(table)
    times = Table(title="Seconds")
    times.add_column("stage")
    times.add_column("seconds", justify="right")
    for stage, seconds in summary["seconds"].items():
        times.add_row(stage, f"{seconds:.0f}")
    times.add_row("all stages", f"{summary['seconds_total']:.0f}")
    if summary["seconds_per_iteration"] is not None:
        times.add_row("from one iteration to the next", f"{summary['seconds_per_iteration']:.1f}")
    console.print(times)
    for name, path in summary["paths"].items():
        console.print(f"{name.replace('_', ' ')}: {path}", highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory, e.g. runs/demo")
    directory = open_run(parser.parse_args().run)
    collect(directory)
    summary = summarize(directory)
    replace_file(directory.summary, json.dumps(summary, indent=1) + "\n")
    show(summary)
    if summary["chosen_on_the_reported_set"]:
        print(f"keep_best chose checkpoints by this very set, {summary['evaluation_set']}: of those it is no measure")
    if len(directory.config.evaluation_sets) > 1:
        root = directory.root
        print(f"all sets: .venv/bin/python -m tools.compare {root}@0 {root} --baseline {root}@0")
    print(f"summary: {directory.summary}")


if __name__ == "__main__":
    run(main)

"""One metrics.jsonl and one TensorBoard directory per run, collected from what the stages have published.

They describe the run and decide nothing: what goes wrong here is said and ends nothing.
"""

import json
from pathlib import Path
from typing import Any

from megatron_papo.run.describing import describes
from megatron_papo.run.manifest import read_manifest
from megatron_papo.run.run_directory import RunDirectory

COLLECTED = "collected.json"
ROLLOUT_CURVES = ("accuracy_sampled", "format_sampled", "mean_reward_sampled", "mean_response_tokens_sampled",
                  "cut_off_share_sampled", "groups_all_right", "groups_all_wrong", "tokens_per_second")  # fmt: skip


def collect(run: RunDirectory) -> None:
    """Bring metrics.jsonl and tensorboard/ of a run up to date with its iterations and evaluations."""
    for file, write in ((run.metrics, _write_metrics), (run.tensorboard, _write_board)):
        with describes(file):
            write(run)


def finished_iterations(run: RunDirectory) -> list[int]:
    """Return the numbers of the iterations that stage 5 has published."""
    numbers = (int(path.name) for path in run.iterations.glob("[0-9]*") if path.name.isdigit())
    return sorted(number for number in numbers if read_manifest(run.trained(number)) is not None)


def _write_metrics(run: RunDirectory) -> None:
    lines = [
        line
        for number in finished_iterations(run)
        for line in (run.trained(number) / "metrics.jsonl").read_text().splitlines(keepends=True)
    ]
    partial = run.metrics.with_name(run.metrics.name + ".partial")
    partial.write_text("".join(lines))
    partial.replace(run.metrics)


def _write_board(run: RunDirectory) -> None:
    """Write the curves that are not in tensorboard/ yet: what is there is kept in collected.json."""
    memory = run.tensorboard / COLLECTED
    done = set(json.loads(memory.read_text())) if memory.exists() else set()
    scalars: list[tuple[str, float, int]] = []
    new: set[str] = set()
    for number in finished_iterations(run):
        if f"train {number}" not in done:
            new.add(f"train {number}")
            rows = [json.loads(line) for line in (run.trained(number) / "metrics.jsonl").read_text().splitlines()]
            last_attempts = {row["step"]: row for row in rows}
            scalars += [
                (f"train/{name}", value, step)
                for step, row in last_attempts.items()
                for name, value in row.items()
                if name not in ("step", "iteration")
            ]
        counts = _counts(run.rollouts(number))
        if f"rollout {number}" not in done and counts:
            new.add(f"rollout {number}")
            scalars += [(f"rollout/{name}", counts[name], number) for name in ROLLOUT_CURVES if name in counts]
    for path in sorted(run.root.glob("evaluation/iteration_*/*/metrics.json")):
        key = f"evaluation {path.parent.relative_to(run.root)}"
        if key not in done:
            new.add(key)
            number = int(path.parent.parent.name.removeprefix("iteration_"))
            metrics = json.loads(path.read_text())
            scalars += [(f"evaluation/{path.parent.name}/{name}", value, number) for name, value in metrics.items()]
    if not new:
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.tensorboard)) as board:
        for name, value, step in scalars:
            board.add_scalar(name, value, step)
    memory.write_text(json.dumps(sorted(done | new)))


def _counts(directory: Path) -> dict[str, Any]:
    manifest = read_manifest(directory)
    return {} if manifest is None else manifest.counts

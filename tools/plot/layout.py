"""How much the group layout saves as groups, prompts and responses grow: measured, and what the token counts allow.

    .venv/bin/python -m tools.plot.layout --output docs/performance.png
    .venv/bin/python -m tools.plot.layout --from docs/performance.json --output docs/performance.png  # draws again

Runs tools.benchmark.layout (a whole training step in both layouts, in turns, best of --repeat, CPU seconds; the
gradients must agree) at a base point, and with one of group size, prompt length and response length changed at a time;
a few minutes on two cores. Each panel shows plain / group against one of the three:

    time, whole step            what a run gains
    time, without the pictures  the vision tower sees each picture once in both layouts and its part, measured alone,
                                is taken off
    tokens                      the count of real tokens: G (P + R) over P + G R
    tokens, with padding        what the plain layout computes: every row as long as the longest of its group
    peak memory                 of the step

Writes the numbers as JSON beside the picture (same name, .json): one object per point, as tools.benchmark.layout prints
it. A wider spread of response lengths lifts "with padding" and the measured times with it, so that times may lie above
the count of real tokens.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run

ROOT = Path(__file__).resolve().parents[2]
BASE = {"group_size": 4, "prompt_tokens": 500, "response_tokens": 125}
AXES = {
    "group_size": ((2, 4, 8), "responses per prompt"),
    "prompt_tokens": ((250, 500, 1000), "tokens of a prompt"),
    "response_tokens": ((60, 125, 250), "tokens of a response, on average"),
}
LARGEST_DIFFERENCE = 1e-5
"""Of a gradient, relative to the largest: the two layouts must have done the same work."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="picture to write, e.g. docs/performance.png"
    )
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="JSON", help="draw these numbers instead of measuring"
    )
    parser.add_argument("--groups", type=int, default=1, help="in a step (default 1)")
    parser.add_argument("--hidden", type=int, default=256, help="width of the decoder (default 256)")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder (default 4)")
    parser.add_argument(
        "--repeat", type=int, default=3, help="measurements of each layout, the best counts (default 3)"
    )
    return parser.parse_args(arguments)


def grid() -> list[dict[str, int]]:
    """Return the base point and its neighbours along each axis, without repetition."""
    points = [BASE]
    for axis, (values, _) in AXES.items():
        points += [{**BASE, axis: value} for value in values if value != BASE[axis]]
    return points


def measure(point: dict[str, int], args: argparse.Namespace) -> dict:
    """Return the point with what tools.benchmark.layout measured.

    Raises UserError if it failed or if the gradients of the two layouts differ.
    """
    settings = {**point, "groups": args.groups, "hidden": args.hidden, "layers": args.layers, "repeat": args.repeat}
    options = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "tools.benchmark.layout", *options]
    done = subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[1:])} failed:\n{done.stderr.strip()}")
    measured = json.loads(done.stdout.splitlines()[-1])
    if not measured["max_abs_gradient_difference"] <= LARGEST_DIFFERENCE * measured["max_abs_gradient"]:
        raise UserError(
            f"{point}: gradients of the layouts differ by {measured['max_abs_gradient_difference']:.1e}: the times are"
            " worth nothing"
        )
    return {**settings, **measured}


def ratios(measured: dict) -> dict[str, float]:
    """Return plain / group of a point, by the name in the legend."""
    plain, group = (measured[f"seconds_{layout}"] - measured["seconds_pictures"] for layout in ("plain", "group"))
    return {
        "time, whole step": measured["ratio"],
        "time, without the pictures": plain / group,
        "tokens": measured["token_ratio"],
        "tokens, with padding": measured["padded_token_ratio"],
        "peak memory": measured["peak_bytes_plain"] / measured["peak_bytes_group"],
    }


STYLES = {
    "time, whole step": "C0-o",
    "time, without the pictures": "C0--o",
    "tokens": "k-",
    "tokens, with padding": "k--",
    "peak memory": "C1-s",
}
"""matplotlib formats."""


def draw(points: list[dict], output: Path) -> None:
    """Draw the ratios along each axis into a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(12, 4), sharey=True)
    for panel, (axis, (_, label)) in zip(panels, AXES.items()):
        others = [name for name in BASE if name != axis]
        line = sorted((p for p in points if all(p[name] == BASE[name] for name in others)), key=lambda p: p[axis])
        for name, style in STYLES.items():
            panel.plot([p[axis] for p in line], [ratios(p)[name] for p in line], style, label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks([p[axis] for p in line], [str(p[axis]) for p in line])
        panel.minorticks_off()
        panel.set(xlabel=label, ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("plain / group")
    panels[0].legend(fontsize=8)
    settings = f"G {BASE['group_size']}, P {BASE['prompt_tokens']}, R {BASE['response_tokens']} where not varied"
    figure.suptitle(f"One training step in the plain layout over the group layout; {settings}", fontsize=11)
    figure.tight_layout()
    figure.savefig(output, dpi=90)
    pyplot.close(figure)


def show(measured: dict) -> None:
    """Print a point."""
    shape = f"G {measured['group_size']}, P {measured['prompt_tokens']:4}, R {measured['response_tokens']:3}"
    print(f"{shape}: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios(measured).items()), flush=True)


def read(source: Path) -> list[dict]:
    """Read the numbers of an earlier run. Raises UserError if the file is not what this tool wrote."""
    try:
        points = json.loads(source.read_text())
        for point in points:
            ratios(point)
        missing = [point for point in grid() if not any(point.items() <= measured.items() for measured in points)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{source}: not the numbers of an earlier run ({error!r}): measure again, without --from"
        ) from None
    if missing:
        raise UserError(f"{source}: lacks {missing[0]}: measure again, without --from")
    return points


def main() -> None:
    args = parse()
    if args.source:
        points = read(args.source)
        for measured in points:
            show(measured)
    else:
        points = []
        for point in grid():
            points.append(measure(point, args))
            show(points[-1])
        numbers = args.output.with_suffix(".json")
        numbers.write_text("[\n" + ",\n".join(map(json.dumps, points)) + "\n]\n")
        print(numbers)
    draw(points, args.output)
    print(args.output)


if __name__ == "__main__":
    run(main)

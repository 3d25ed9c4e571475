"""The pictures of rollouts as training sees them, original and masked, drawn again from rollouts.jsonl.

    python -m tools.masked_images --run runs/demo --iteration 1 --line 1 --line 9 --output /tmp/masked
    python -m tools.masked_images --config configs/demo.yaml --data DIR --rollouts DIR --output /tmp/masked

Nothing is stored of a masked picture but its seed, which is in the rollout. Without --run give the configuration, with
the same --set, that the rollouts were trained with. Writes lineNNNNNN_imageM_original.png and
lineNNNNNN_imageM_masked.png (after the resize, as cut into ViT patches) and prints a line per masked picture: its path
and the share of its squares that are black. A group shares its pictures, so without --line only the first rollout of
each group is drawn.
"""

import argparse
import os
import shutil
from pathlib import Path

from megatron_papo.config import Config
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.pictures.preprocess import load_images, load_masked_images
from megatron_papo.run.command_line import python_command, run
from megatron_papo.run.records import Rollout, read_jsonl
from megatron_papo.run.run_config import open_run
from megatron_papo.run.stage_output import require_input


def parse() -> argparse.Namespace:
    """Return the arguments; data, rollouts and config are there, the run's own where it is a run that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, metavar="DIR", help="run directory, e.g. runs/demo, for configuration, data and rollouts")
    add("--iteration", type=int, metavar="N", help="the iteration of --run")
    add("--config", type=Path, metavar="FILE", help="YAML configuration, where there is no --run")
    set_help = "override one value (may be repeated)"
    add("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help=set_help)
    add("--data", type=Path, metavar="DIR", help="output of stage 1 (default: the run's)")
    add("--rollouts", type=Path, metavar="DIR", help="output of stage 4 (default: the iteration's)")
    line_help = "line of rollouts.jsonl, from 1 (may be repeated)"
    add("--line", dest="lines", type=int, action="append", metavar="N", help=line_help)
    add("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    args = parser.parse_args()
    if (args.run is None) == (args.config is None):
        parser.error("give --run DIR with --iteration N, or --config FILE with --data and --rollouts")
    if (args.iteration if args.run else args.data and args.rollouts) is None:
        parser.error("--run needs --iteration N" if args.run else "--config needs --data and --rollouts")
    return args


def read_inputs(args: argparse.Namespace) -> tuple[Config, Path, Path]:
    """Return the configuration, the data directory and the directory of the rollouts."""
    if args.run is None:
        return load_config(args.config, args.overrides), args.data, args.rollouts
    run_directory = open_run(args.run, args.overrides)
    rollouts = args.rollouts or run_directory.rollouts(args.iteration)
    return run_directory.config, args.data or run_directory.data, rollouts


def chosen_lines(rollouts: list[Rollout], lines: list[int] | None, file: Path) -> list[int]:
    """Line numbers from 1: those asked for, else the first of each group. Raises UserError for one that is not
    there."""
    if lines is None:
        return [number for number, rollout in enumerate(rollouts, 1) if rollout.sample == 0]
    for number in lines:
        if not 1 <= number <= len(rollouts):
            raise UserError(f"--line {number}: {file} has lines 1 to {len(rollouts)}")
    return lines


def draw(rollout: Rollout, line: int, data: Path, config: Config, output: Path) -> list[tuple[str, float]]:
    """Writes a rollout's pictures; -> (name of the file, share of black squares) of each masked one."""
    limits = config.data.min_pixels, config.data.max_pixels
    originals = load_images(data, rollout.images, *limits)
    masked = load_masked_images(
        data, rollout.images, *limits, config.masked_image, rollout.masked_image_seed, rollout.saliency
    )
    drawn = []
    for number, (original, (picture, squares)) in enumerate(zip(originals, masked)):
        stem = f"line{line:06}_image{number}"
        original.save(output / f"{stem}_original.png")
        picture.save(output / f"{stem}_masked.png")
        drawn.append((f"{stem}_masked.png", float(squares.mean())))
    return drawn


def main() -> None:
    """Draw the pictures into a directory that appears whole."""
    args = parse()
    config, data, directory = read_inputs(args)
    python = python_command()
    require_input(data, ("stage1_prepare_data",), f"{python} -m stages.stage1_prepare_data --run RUN")
    require_input(directory, ("stage4_rollout",), f"{python} -m stages.stage4_rollout --run RUN --iteration N")
    if args.output.exists():
        raise UserError(f"{args.output}: is there already: remove it or choose another --output")
    file = directory / "rollouts.jsonl"
    rollouts = read_jsonl(file, Rollout)
    lines = chosen_lines(rollouts, args.lines, file)
    partial = args.output.with_name(args.output.name + ".partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial}: cannot create: {error.strerror}")
    try:
        drawn = [row for line in lines for row in draw(rollouts[line - 1], line, data, config, partial)]
        os.rename(partial, args.output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for name, share in drawn:
        print(f"{args.output / name}: {share:.4f} of the squares are black")
    if not drawn:
        print(f"{file}: no pictures in {len(lines)} rollouts")


if __name__ == "__main__":
    run(main)

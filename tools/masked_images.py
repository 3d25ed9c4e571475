"""The pictures of rollouts as training sees them, original and masked, drawn again from rollouts.jsonl.

    .venv/bin/python -m tools.masked_images --run runs/demo --iteration 1 --line 1 --line 9 --output /tmp/masked
    .venv/bin/python -m tools.masked_images --config FILE [--set KEY=VALUE] --data DIR --rollouts DIR --output DIR

Nothing is stored of a masked picture but its seed, which is in the rollout; how it is masked is in the configuration of
the run that trained on it. Writes lineNNNNNN_imageM_original.png and lineNNNNNN_imageM_masked.png (after the resize, as
cut into ViT patches) and prints a line per masked picture: its path and the share of its squares that are black, or by
how many grey levels it differs. A group shares its pictures (with masked_image.per response not the masked ones), so
without --line only the first rollout of each group is drawn. Where there is a kept_image, _kept.png is drawn, too.
"""

import argparse
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_papo.config import Config
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.pictures.masking import seed_of_kept, seed_of_response
from megatron_papo.pictures.preprocess import PictureSettings, load_images, load_masked_images
from megatron_papo.run.command_line import run
from megatron_papo.run.records import Rollout, read_jsonl
from megatron_papo.run.run_config import open_run
from megatron_papo.run.stage_output import require_input


@dataclass(frozen=True)
class Source:
    """What is drawn, and how it was masked."""

    config: Config
    data: Path
    """Output of stage 1."""
    rollouts: Path
    """Output of stage 4."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, metavar="DIR", help="run directory, with --iteration; or give --config, --data, --rollouts")
    add("--iteration", type=int, metavar="N", help="number of the iteration, from 1")
    add("--config", type=Path, metavar="FILE", help="YAML configuration that the rollouts are trained with")
    add("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value")
    add("--data", type=Path, metavar="DIR", help="output of stage 1")
    add("--rollouts", type=Path, metavar="DIR", help="output of stage 4")
    add(
        "--line",
        dest="lines",
        type=int,
        action="append",
        metavar="N",
        help="line of rollouts.jsonl, from 1; repeatable",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    arguments = parser.parse_args()
    whole_run = (arguments.run, arguments.iteration)
    by_hand = (arguments.config, arguments.data, arguments.rollouts)
    if not (None not in whole_run and by_hand == (None,) * 3 or None not in by_hand and whole_run == (None,) * 2):
        parser.error("give --run and --iteration, or --config, --data and --rollouts")
    return arguments


def source_of(arguments: argparse.Namespace) -> Source:
    """Return what the command line names. Raises UserError, naming the stage to run, if it is not there."""
    if arguments.run is None:
        source = Source(load_config(arguments.config, arguments.overrides), arguments.data, arguments.rollouts)
        stage1, stage4 = ".venv/bin/python -m stages.stage1_prepare_data", ".venv/bin/python -m stages.stage4_rollout"
    else:
        named = open_run(arguments.run, arguments.overrides)
        source = Source(named.config, named.data, named.rollouts(arguments.iteration))
        stage1 = f".venv/bin/python -m stages.stage1_prepare_data --run {arguments.run}"
        stage4 = f".venv/bin/python -m stages.stage4_rollout --run {arguments.run} --iteration {arguments.iteration}"
    require_input(source.data, ("stage1_prepare_data",), stage1)
    require_input(source.rollouts, ("stage4_rollout",), stage4)
    return source


def chosen_lines(rollouts: list[Rollout], lines: list[int] | None, file: Path) -> list[int]:
    """Return line numbers from 1: those asked for, else the first of each group.

    Raises UserError for a line that is not there.
    """
    if lines is None:
        return [number for number, rollout in enumerate(rollouts, 1) if rollout.sample == 0]
    for number in lines:
        if not 1 <= number <= len(rollouts):
            raise UserError(f"--line {number}: {file} has lines 1 to {len(rollouts)}")
    return lines


def draw(rollout: Rollout, line: int, source: Source, output: Path) -> list[tuple[str, str]]:
    """Write the pictures of a rollout. Returns for each corrupted picture its file name and what was done to it.

    Args:
        rollout: whose pictures.
        line: its number, for the file names.
        source: where its pictures are, and how they are masked.
        output: directory to write to.
    """
    config, data = source.config, source.data
    settings = PictureSettings.of(config.data)
    originals = load_images(data, rollout.images, settings)
    for number, original in enumerate(originals):
        original.save(output / f"line{line:06}_image{number}_original.png")
    drawn = []
    for kind, masking in (("masked", config.masked_image), ("kept", config.kept_image)):
        if masking is None:
            continue
        if masking.strategy == "none":
            drawn += [(f"line{line:06}", "no picture")]
            continue
        seed = rollout.masked_image_seed
        if kind == "kept":
            seed = seed_of_kept(seed)
        elif masking.per == "response":
            seed = seed_of_response(seed, rollout.sample)
        pictures = load_masked_images(data, rollout.images, settings, masking, seed, rollout.saliency)
        for number, (original, (picture, squares)) in enumerate(zip(originals, pictures, strict=True)):
            name = f"line{line:06}_image{number}_{kind}.png"
            picture.save(output / name)
            if squares is not None:
                drawn.append((name, f"{float(squares.mean()):.4f} of the squares are black"))
            else:
                difference = np.abs(np.asarray(picture, dtype=float) - np.asarray(original, dtype=float)).mean()
                drawn.append((name, f"{masking.strategy}, {difference:.2f} grey levels from the original"))
    return drawn


def main() -> None:
    arguments = parse()
    source, output = source_of(arguments), arguments.output
    if output.exists():
        raise UserError(f"{output}: is there already: remove it or choose another --output")
    file = source.rollouts / "rollouts.jsonl"
    rollouts = read_jsonl(file, Rollout)
    lines = chosen_lines(rollouts, arguments.lines, file)
    partial = output.with_name(output.name + ".partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial}: cannot create: {error.strerror}")
    try:
        drawn = [row for line in lines for row in draw(rollouts[line - 1], line, source, partial)]
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for name, what in drawn:
        print(f"{output / name}: {what}")
    if not drawn:
        print(f"{file}: no pictures in {len(lines)} rollouts")


if __name__ == "__main__":
    run(main)

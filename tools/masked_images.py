"""The pictures of rollouts as training sees them, original and masked, drawn again from rollouts.jsonl.

    python -m tools.masked_images --config configs/demo.yaml --data runs/demo/data \\
        --rollouts runs/demo/iterations/0001/rollouts --line 1 --line 9 --output /tmp/masked

Nothing is stored of a masked picture but its seed, which is in the rollout: give the configuration, with the same
--set, that the run was trained with. Writes lineNNNNNN_imageM_original.png and lineNNNNNN_imageM_masked.png (after the
resize, as cut into ViT patches) and prints a line per masked picture: its path and the share of its squares that are
black. A group shares its pictures, so without --line only the first rollout of each group is drawn.
"""

import os
import shutil
from pathlib import Path

from megatron_papo.config import Config
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.pictures.preprocess import load_images, load_masked_images
from megatron_papo.run.command_line import run, stage_parser
from megatron_papo.run.records import Rollout, read_jsonl
from megatron_papo.run.stage_output import require_input


def parse():
    inputs = ("data", "output of stage 1"), ("rollouts", "output of stage 4")
    parser = stage_parser(__doc__, *inputs)
    parser.add_argument(
        "--line",
        dest="lines",
        type=int,
        action="append",
        metavar="N",
        help="line of rollouts.jsonl, from 1 (may be repeated)",
    )
    return parser.parse_args()


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
    args = parse()
    config = load_config(args.config, args.overrides)
    require_input(args.data, ("stage1_prepare_data",), "python -m stages.stage1_prepare_data")
    require_input(args.rollouts, ("stage4_rollout",), "python -m stages.stage4_rollout")
    if args.output.exists():
        raise UserError(f"{args.output}: is there already: remove it or choose another --output")
    file = args.rollouts / "rollouts.jsonl"
    rollouts = read_jsonl(file, Rollout)
    lines = chosen_lines(rollouts, args.lines, file)
    partial = args.output.with_name(args.output.name + ".partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial}: cannot create: {error.strerror}")
    try:
        drawn = [row for line in lines for row in draw(rollouts[line - 1], line, args.data, config, partial)]
        os.rename(partial, args.output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for name, share in drawn:
        print(f"{args.output / name}: {share:.4f} of the squares are black")
    if not drawn:
        print(f"{file}: no pictures in {len(lines)} rollouts")


if __name__ == "__main__":
    run(main)

"""The synthetic task: how many squares are in the picture? Only the picture tells, so a model that does not look can
but guess."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_papo.config import SyntheticTaskConfig

CELL = 14
"""Pixels per grid cell: one ViT patch, so that masking a patch hides a square or nothing."""
_MARGIN = 2
_COLOURS = ((220, 30, 30), (30, 180, 30), (40, 60, 220), (230, 210, 30))
PROBLEM = "<image>How many squares are there?"


@dataclass(frozen=True)
class Sample:
    image: Image.Image
    answer: str
    target: str
    """The response that the cold start teaches."""


class GridCountTask:
    """Coloured squares on random cells of a grid over a grey background; their number is uniform over
    lowest..highest."""

    def __init__(self, config: SyntheticTaskConfig):
        self.config = config

    def render(self, seed: int) -> Sample:
        """Return the same sample for the same seed. Its picture has grid * 14 pixels a side."""
        rng = np.random.default_rng(seed)
        number = int(rng.integers(self.config.lowest, self.config.highest + 1))
        colour = _COLOURS[rng.integers(len(_COLOURS))]
        cells = rng.permutation(self.config.grid**2)[:number]
        pixels = np.full(
            (self.config.grid * CELL, self.config.grid * CELL, 3), rng.integers(200, 256), dtype=np.float32
        )
        for row, column in (divmod(int(cell), self.config.grid) for cell in cells):
            top, left = row * CELL + _MARGIN, column * CELL + _MARGIN
            pixels[top : top + CELL - 2 * _MARGIN, left : left + CELL - 2 * _MARGIN] = colour
        pixels += rng.normal(0, self.config.noise, pixels.shape)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        noun = "square" if number == 1 else "squares"
        return Sample(image, str(number), f"<think>I count {number} {noun}.</think>\\boxed{{{number}}}")

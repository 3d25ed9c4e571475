"""The masked image of PAPO's KL_prcp: the same picture with squares blackened, so that an answer that ignores the
picture stays likely."""

from typing import Literal

import numpy as np
from PIL import Image

from megatron_papo.seeds import derive_seed

Strategy = Literal["random", "semantic", "full"]
TIE_DECIMALS = 9
"""Mean saliencies that agree to so many decimals, on a scale of 0 to 1, are ties: sums of floats differ in the last
bits."""


def black_squares(
    size: tuple[int, int],
    *,
    strategy: Strategy,
    ratio: float,
    square_pixels: int,
    seed: int,
    saliency: np.ndarray | None = None,
) -> np.ndarray:
    """Return which squares of a (width, height) picture are black: bool [rows, columns], at least one of them True.

    The picture is cut into squares of square_pixels from its top left corner, the last row and column as narrow as the
    picture leaves them. Draws come from numpy.random.default_rng(seed).

    random: each square with probability ratio (independent draws, row by row); where that leaves none, one square drawn
    uniformly. semantic: the round(ratio * squares) squares, at least one, with the highest mean of `saliency` [height,
    width of any size, stretched over the picture]; ties in random order. full: all; ratio, seed and saliency play no
    part. Raises ValueError for `semantic` without saliency and for an unknown strategy.

    arXiv 2507.06448 section 3.2: random masking (ratio 0.6, 14-pixel squares; the default) and semantic-aware masking
    by the attention of DINOv2. Differs: the authors' code draws from numpy's global, unseeded generator, and leaves a
    picture of n squares as it is with probability (1 - ratio)^n: 0.4 for one no larger than a square. It has no
    semantic masking: it takes pictures masked beforehand.
    """
    rows, columns = (-(-side // square_pixels) for side in (size[1], size[0]))
    if strategy == "full":
        return np.ones((rows, columns), dtype=bool)
    generator = np.random.default_rng(seed)
    if strategy == "random":
        squares = generator.random((rows, columns)) < ratio
        if not squares.any():
            squares.flat[generator.integers(squares.size)] = True
        return squares
    if strategy != "semantic":
        raise ValueError(f"unknown masking strategy {strategy!r}")
    if saliency is None:
        raise ValueError("strategy semantic needs a saliency map")
    means = np.round(mean_saliency(size, square_pixels, saliency), TIE_DECIMALS).ravel()
    shuffled = generator.permutation(means.size)
    by_saliency = shuffled[np.argsort(-means[shuffled], kind="stable")]
    squares = np.zeros((rows, columns), dtype=bool)
    squares.flat[by_saliency[: max(1, round(ratio * means.size))]] = True
    return squares


def blacken(image: Image.Image, squares: np.ndarray, square_pixels: int) -> Image.Image:
    """Return a copy of an RGB picture that is black where squares, bool [rows, columns], says so."""
    pixels = np.array(image)
    black = squares.repeat(square_pixels, axis=0).repeat(square_pixels, axis=1)
    pixels[black[: pixels.shape[0], : pixels.shape[1]]] = 0
    return Image.fromarray(pixels)


def mean_saliency(size: tuple[int, int], square_pixels: int, saliency: np.ndarray) -> np.ndarray:
    """Return the mean of a saliency map [h, w] over each square of the picture, from 0 to 1: float64 [rows, columns].

    The map is stretched over the (width, height) of the picture: each entry covers height / h x width / w pixels; a
    square that cuts through some takes their share by area. It is scaled to 0..1 beforehand.
    """
    saliency = saliency.astype(np.float64)
    saliency = saliency - saliency.min()
    saliency /= saliency.max() or 1.0
    down, across = (_shares(pixels, square_pixels, cells) for pixels, cells in zip(reversed(size), saliency.shape))
    return down @ saliency @ across.T


def _shares(pixels: int, square_pixels: int, cells: int) -> np.ndarray:
    """Return which share of each square along one side each cell of the map covers: float64 [squares, cells], rows
    sum to 1."""
    # In units of 1 / cells of a pixel all borders are whole numbers.
    squares = np.minimum(np.arange(0, pixels + square_pixels, square_pixels), pixels) * cells
    borders = np.arange(cells + 1) * pixels
    overlap = np.minimum(squares[1:, None], borders[None, 1:]) - np.maximum(squares[:-1, None], borders[None, :-1])
    return overlap.clip(min=0) / np.diff(squares)[:, None]


def seed_of_response(seed: int, sample: int) -> int:
    """Return the seed of a rollout's own masked picture, where each response has one; seed: its group's."""
    return derive_seed(seed, "response", sample)


def seed_of_kept(seed: int) -> int:
    """Return the seed of the kept picture, the third view; seed: that of the masked picture."""
    return derive_seed(seed, "kept")

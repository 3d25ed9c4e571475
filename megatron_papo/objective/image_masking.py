"""The masked image of PAPO's KL_prcp: the same picture with squares blackened, so that an answer that ignores the picture stays likely."""

from typing import Literal

import numpy as np
from PIL import Image


def mask_image(image: Image.Image, *, strategy: Literal["random", "full"], ratio: float, square_pixels: int, seed: int) -> Image.Image:
    """A copy of an RGB picture with squares blackened; the input is left as it is.

    random: the picture is cut into squares of square_pixels from its top left corner, the last row and column as narrow as the
    picture leaves them, and each square is black with probability ratio (independent draws, row by row, from
    numpy.random.default_rng(seed)). full: all black; ratio, square_pixels and seed play no part.
    arXiv 2507.06448 section 3.2 (random masking, ratio 0.6, 14-pixel squares).
    Differs: the authors' code leaves the ragged squares at the right and lower edge untouched, hence every picture smaller than one
    square, and draws from an unseeded generator.
    """
    pixels = np.array(image)
    if strategy == "full":
        pixels[:] = 0
    elif strategy == "random":
        rows, columns = (-(-side // square_pixels) for side in pixels.shape[:2])
        squares = np.random.default_rng(seed).random((rows, columns)) < ratio
        black = squares.repeat(square_pixels, axis=0).repeat(square_pixels, axis=1)
        pixels[black[: pixels.shape[0], : pixels.shape[1]]] = 0
    else:
        raise ValueError(f"unknown masking strategy {strategy!r}")
    return Image.fromarray(pixels)

"""Other views of a picture than black squares (pictures/masking.py): pixels as a function of picture and seed."""

import numpy as np
from PIL import Image, ImageFilter

DIFFUSION_STEPS = 1000


def noisy(image: Image.Image, deviation: float, seed: int) -> Image.Image:
    """Return an RGB picture plus Gaussian noise, cut to 0..255. deviation: in grey levels."""
    noise = np.random.default_rng(seed).standard_normal((image.height, image.width, 3)) * deviation
    return _picture(np.asarray(image) + noise)


def diffused(image: Image.Image, step: int, seed: int) -> Image.Image:
    """Return an RGB picture after `step` of 1000 steps of variance-preserving diffusion.

        x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise,    a_t = product of 1 - b_1 ... 1 - b_t,    x from -1 to 1

    b rises from 1e-5 to 5e-3 along a sigmoid over -6..6 (visual contrastive decoding, arXiv 2311.16922).
    """
    steps = np.linspace(-6.0, 6.0, DIFFUSION_STEPS)
    b = 1.0 / (1.0 + np.exp(-steps)) * (5e-3 - 1e-5) + 1e-5
    a = np.cumprod(1.0 - b)[step - 1]
    noise = np.random.default_rng(seed).standard_normal((image.height, image.width, 3))
    pixels = np.sqrt(a) * (np.asarray(image) / 127.5 - 1.0) + np.sqrt(1.0 - a) * noise
    return _picture((pixels + 1.0) * 127.5)


def blurred(image: Image.Image, deviation: float) -> Image.Image:
    """Return a picture after a Gaussian blur. deviation: in pixels."""
    return image.filter(ImageFilter.GaussianBlur(deviation))


def grey(image: Image.Image) -> Image.Image:
    """Return a picture without its colours (ITU-R 601 luma), in RGB; one that has none stays as it is."""
    return image.convert("L").convert("RGB")


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))

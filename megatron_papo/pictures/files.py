"""Files that come from outside: pictures and saliency maps, read inside the data root and decoded without trust."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from megatron_papo.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow reads more, some of them (EPS) by starting other programs."""
NPY_MAGIC = b"\x93NUMPY"


def resolve_inside(root: Path, name: str, what: str = "image") -> Path:
    """Return the file of a path that must stay inside root, symbolic links followed. Raises UserError.

    Args:
        root: the data root.
        name: path from root on.
        what: to call it in messages.
    """
    root = Path(root).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise UserError(f"{what} {name}: outside the data root {root}: move it inside or set data.image_root")
    if not path.is_file():
        raise UserError(f"{what} {name}: no such file in {root}: put it there or drop the row")
    return path


def read_inside(root: Path, name: str, what: str = "image") -> bytes:
    """Return the content of resolve_inside's file. Raises UserError."""
    path = resolve_inside(root, name, what)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be read ({error.strerror}): replace it or drop the row")


def decode_image(content: bytes, shown: str) -> tuple[Image.Image, str]:
    """Return a picture as RGB, turned as its EXIF orientation says (as transformers' load_image does), and its format,
    e.g. PNG. Raises UserError; shown: what to call it there."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return ImageOps.exif_transpose(image).convert("RGB"), str(image.format)
    # Decoders meet damaged data with many kinds of exception; all mean the same to the user.
    except Exception as error:
        raise UserError(
            f"{shown}: cannot be read as a picture ({' '.join(str(error).split())}): replace it or drop the row"
        )


def decode_saliency(content: bytes, shown: str) -> tuple[np.ndarray, str]:
    """Return a saliency map and its format: float64 [height, width], finite, larger where the picture matters more.

    Args:
        content: a .npy file of a 2-D array of numbers (read without unpickling), or a picture in grey levels of any
            depth, turned upright like the pictures; one in RGB whose three channels are equal counts as grey, a
            transparency channel is left out.
        shown: what to call it in messages.

    Raises UserError for anything else.
    """
    again = "give a 2-D .npy array or a greyscale picture, or drop the row"
    try:
        if content.startswith(NPY_MAGIC):
            values, kind = np.load(io.BytesIO(content), allow_pickle=False), "NPY"
        else:
            values, kind = _grey_levels(content)
    # As in decode_image; a pickled or truncated array is a ValueError or EOFError.
    except Exception as error:
        raise UserError(f"{shown}: cannot be read as a saliency map ({' '.join(str(error).split())}): {again}")
    if values.ndim != 2 or values.size == 0:
        raise UserError(f"{shown}: an array of shape {values.shape}, expected a 2-D map: {again}")
    if values.dtype.kind not in "fiub":
        raise UserError(f"{shown}: an array of {values.dtype}, expected numbers: {again}")
    values = values.astype(np.float64)
    with np.errstate(all="ignore"):
        finite = np.isfinite(values.max() - values.min())
    if not finite:
        raise UserError(f"{shown}: holds NaN, infinity or a range beyond float64: {again}")
    return values, kind


def _grey_levels(content: bytes) -> tuple[np.ndarray, str]:
    """Return [height, width] and the format. Raises ValueError for a picture in colours."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        upright, kind = ImageOps.exif_transpose(image), str(image.format)
    if upright.mode in ("1", "L", "I", "F") or upright.mode.startswith("I;16"):
        return np.asarray(upright), kind
    if upright.mode in ("LA", "La"):
        return np.asarray(upright)[..., 0], kind
    channels = np.asarray(upright.convert("RGB"))
    if (channels != channels[..., :1]).any():
        raise ValueError("a picture in colours, whose brightness need not be saliency")
    return channels[..., 0], kind

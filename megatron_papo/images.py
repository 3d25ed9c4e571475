"""Pictures on their way to the model: opened inside the data root, resized once, cut into ViT patches.

Both sides see the same pixels: the rollout client sends the resized picture (a PNG whose size SGLang's own resize leaves alone),
the trainer cuts the same one into patches. Equal to transformers' Qwen2VLImageProcessorPil (tested).
"""

import base64
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from megatron_papo.config import MaskedImageConfig
from megatron_papo.errors import UserError
from megatron_papo.objective.image_masking import mask_image
from megatron_papo.seeds import derive_seed

PATCH = 14
MERGE = 2
TEMPORAL = 2
FACTOR = PATCH * MERGE
MAX_ASPECT = 200
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow reads more, some of them (EPS) by starting other programs."""
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def resolve_image(root: Path, name: str) -> Path:
    """The file of an image path that must stay inside root (symbolic links followed). Raises UserError."""
    root = Path(root).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise UserError(f"image {name}: outside the data root {root}: move it inside or set data.image_root")
    if not path.is_file():
        raise UserError(f"image {name}: no such file in {root}: put it there or drop the row")
    return path


def open_image(root: Path, name: str) -> Image.Image:
    """The native picture as RGB, upright. Raises UserError for a missing, outside or unreadable file."""
    path = resolve_image(root, name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"image {path}: cannot be read ({error.strerror}): replace it or drop the row")
    return decode_image(content, f"image {path}")[0]


def decode_image(content: bytes, shown: str) -> tuple[Image.Image, str]:
    """The picture as RGB, turned as its EXIF orientation says (as transformers' load_image does), and its format, e.g. PNG."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return ImageOps.exif_transpose(image).convert("RGB"), image.format
    # Decoders meet damaged data with many kinds of exception; all mean the same to the user.
    except Exception as error:
        raise UserError(f"{shown}: cannot be read as a picture ({' '.join(str(error).split())}): replace it or drop the row")


def smart_size(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) in multiples of 28 with min_pixels <= width * height <= max_pixels, aspect kept (Qwen2-VL smart_resize).

    Raises UserError for a picture over 200 times as long as wide, which transformers refuses too.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(f"image of {width} x {height} pixels: sides differ by more than {MAX_ASPECT} times: crop it or drop the row")
    w, h = round(width / FACTOR) * FACTOR, round(height / FACTOR) * FACTOR
    if w * h > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        w, h = (max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (width, height))
    elif w * h < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        w, h = (math.ceil(side * grow / FACTOR) * FACTOR for side in (width, height))
    return w, h


def resize(image: Image.Image, min_pixels: int, max_pixels: int) -> Image.Image:
    """Bicubic, to smart_size; the picture itself if it has that size."""
    size = smart_size(*image.size, min_pixels, max_pixels)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def load_images(
    root: Path, names: list[str], min_pixels: int, max_pixels: int, masking: MaskedImageConfig | None = None, seed: int | None = None
) -> list[Image.Image]:
    """A prompt's pictures, opened and resized; with `masking`, squares blackened in its space with one seed per picture."""
    images = []
    for index, name in enumerate(names):
        image = open_image(root, name)
        if masking is None:
            images.append(resize(image, min_pixels, max_pixels))
            continue
        drawn = dict(strategy=masking.strategy, ratio=masking.ratio, square_pixels=masking.square_pixels, seed=derive_seed(seed, index))
        if masking.space == "native":
            images.append(resize(mask_image(image, **drawn), min_pixels, max_pixels))
        else:
            images.append(mask_image(resize(image, min_pixels, max_pixels), **drawn))
    return images


def grid_of(image: Image.Image) -> tuple[int, int, int]:
    """(1, rows, columns) of ViT patches of a resized picture."""
    return 1, image.height // PATCH, image.width // PATCH


def grid_of_file(root: Path, name: str, min_pixels: int, max_pixels: int) -> tuple[int, int, int]:
    """The grid that a native picture will have once resized; reads only the file's header."""
    path = resolve_image(root, name)
    try:
        with Image.open(path) as image:
            width, height = smart_size(*image.size, min_pixels, max_pixels)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path}: cannot be read as a picture ({error}): replace it or drop the row")
    return 1, height // PATCH, width // PATCH


def num_image_tokens(grid: tuple[int, int, int]) -> int:
    return grid[0] * grid[1] * grid[2] // MERGE**2


def to_patches(image: Image.Image) -> np.ndarray:
    """A resized picture as float32 [rows * columns, 3 * 2 * 14 * 14], normalised, the frame repeated in time.

    Rows run over (row / 2, column / 2, 2, 2), so that four consecutive rows become one image token.
    """
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    pixels = ((pixels - MEAN) / STD).transpose(2, 0, 1)
    _, rows, columns = grid_of(image)
    blocks = pixels.reshape(3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    blocks = blocks.transpose(1, 4, 2, 5, 0, 3, 6)
    blocks = np.repeat(blocks[:, :, :, :, :, None], TEMPORAL, axis=5)
    return np.ascontiguousarray(blocks).reshape(rows * columns, 3 * TEMPORAL * PATCH * PATCH)


def to_data_uri(image: Image.Image) -> str:
    """data:image/png;base64,..."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

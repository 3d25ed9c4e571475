"""Pictures on their way to the model: opened inside the data root, resized, cut into ViT patches.

Both sides see the same pixels: the rollout client sends the resized picture (a PNG whose size SGLang's own resize
leaves alone), the trainer cuts the same one into patches. Equal to transformers' Qwen2VLImageProcessorPil (tested).
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, Self

import numpy as np
from PIL import Image

from megatron_papo.config import BenchmarkConfig, DataConfig, EvaluationConfig, MaskedImageConfig
from megatron_papo.errors import UserError
from megatron_papo.pictures.decode import Transparency, decode_image, decode_saliency
from megatron_papo.pictures.files import read_inside
from megatron_papo.pictures.masking import black_squares, blacken
from megatron_papo.pictures.views import blurred, diffused, grey, noisy
from megatron_papo.seeds import derive_seed

PATCH = 14
MERGE = 2
TEMPORAL = 2
FACTOR = PATCH * MERGE
MAX_ASPECT = 200
CUT_ASPECT = 180
"""Of a picture that is longer than MAX_ASPECT, in the authors' evaluation."""
PROCESSOR_MIN_PIXELS, PROCESSOR_MAX_PIXELS = 3136, 12845056
"""The limits of the image processor that Qwen2.5-VL is published with."""
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


@dataclass(frozen=True)
class PictureSettings:
    """What decides how a picture becomes what the model sees: keys of the configuration, read together everywhere."""

    min_pixels: int
    max_pixels: int
    resize: Literal["smart", "published", "published_evaluation"] = "smart"
    transparency: Transparency = "white"

    @classmethod
    def of(cls, data: DataConfig) -> Self:
        """Return those of training and of its prompts."""
        return cls(data.min_pixels, data.max_pixels, data.resize, data.transparency)

    @classmethod
    def of_evaluation(cls, data: DataConfig, evaluation: EvaluationConfig, of_set: BenchmarkConfig) -> Self:
        """Return those of an evaluation set: its own, else evaluation's, else those of training."""
        training = cls.of(data)
        resize = of_set.resize or evaluation.resize or data.resize
        return replace(
            training,
            min_pixels=of_set.min_pixels or evaluation.min_pixels or training.min_pixels,
            max_pixels=of_set.max_pixels or evaluation.max_pixels or training.max_pixels,
            resize="published_evaluation" if resize == "published" else resize,
        )


def open_image(root: Path, name: str, transparency: Transparency = "white") -> Image.Image:
    """Return the native picture as RGB, upright. Raises UserError for a missing, outside or unreadable file."""
    return decode_image(read_inside(root, name), f"image {name}", transparency).image


def open_saliency(root: Path, name: str) -> np.ndarray:
    """Return a saliency map, float64 [height, width]. Raises UserError for a missing, outside or unusable file."""
    return decode_saliency(read_inside(root, name, "saliency map"), f"saliency map {name}")[0]


def sizes(width: int, height: int, settings: PictureSettings) -> list[tuple[int, int]]:
    """Return the sizes (width, height) that a native picture takes, one after the other; the last is the model's.

    smart: one, see smart_size. published: first as the authors' code scales it, both sides cut to whole pixels, then as
    the model's processor rounds that, within limits of its own. published_evaluation: in between also as their
    evaluation stretches what is narrow.

    Raises UserError for a picture over 200 times as long as wide, native or in between or at the end: transformers and
    the server refuse it. Of published_evaluation only what is so at the end.
    """
    taken = [(width, height)]
    if settings.resize != "published_evaluation":
        _require_aspect(taken)
    if settings.resize == "smart":
        taken.append(smart_size(width, height, settings.min_pixels, settings.max_pixels))
    else:
        taken.append(_published_size(width, height, settings.min_pixels, settings.max_pixels))
        if settings.resize == "published_evaluation":
            taken += _stretched(*taken[-1])
        _require_aspect(taken)
        taken.append(smart_size(*taken[-1], PROCESSOR_MIN_PIXELS, PROCESSOR_MAX_PIXELS))
    _require_aspect(taken)
    return taken[1:]


def model_size(width: int, height: int, settings: PictureSettings) -> tuple[int, int]:
    """Return the (width, height) in pixels, multiples of 28, in which the model sees a native picture.

    Raises UserError as `sizes`.
    """
    return sizes(width, height, settings)[-1]


def smart_size(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return (width, height) in multiples of 28 with min_pixels <= width * height <= max_pixels, aspect kept.

    As Qwen2-VL's smart_resize.
    """
    w, h = round(width / FACTOR) * FACTOR, round(height / FACTOR) * FACTOR
    if w * h > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        w, h = (max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (width, height))
    elif w * h < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        w, h = (math.ceil(side * grow / FACTOR) * FACTOR for side in (width, height))
    return w, h


def _published_size(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return (width, height) as PAPO's process_image scales them: at most about max_pixels, then at least about
    min_pixels."""
    for limit, is_broken in ((max_pixels, int.__gt__), (min_pixels, int.__lt__)):
        if is_broken(width * height, limit):
            factor = math.sqrt(limit / (width * height))
            width, height = int(width * factor), int(height * factor)
    return width, height


def _stretched(width: int, height: int) -> list[tuple[int, int]]:
    """Return the further sizes that the authors' evaluation (LLaMA-Factory's Qwen2-VL plugin) gives a scaled picture:
    no side below 28 pixels, and no side over 200 times the other, but 180 times."""
    shapes = [(width, height)]
    if min(width, height) < FACTOR:
        shapes.append((max(width, FACTOR), max(height, FACTOR)))
    width, height = shapes[-1]
    if width > MAX_ASPECT * height:
        shapes.append((CUT_ASPECT * height, height))
    elif height > MAX_ASPECT * width:
        shapes.append((width, CUT_ASPECT * width))
    return shapes[1:]


def _require_aspect(taken: list[tuple[int, int]]) -> None:
    """Raise UserError if the last of the sizes that a picture takes is too long for its width."""
    width, height = taken[-1]
    if max(width, height) > MAX_ASPECT * min(width, height):
        native = taken[0]
        resized = "" if len(taken) == 1 else f", resized to {width} x {height}"
        raise UserError(
            f"image of {native[0]} x {native[1]} pixels{resized}: sides differ by more than {MAX_ASPECT} times: crop it"
            " or drop the row"
        )


def resize(image: Image.Image, settings: PictureSettings) -> Image.Image:
    """Return the picture in the size in which the model sees it, bicubic; itself if it has that size."""
    return _resized(image, sizes(*image.size, settings))


def _resized(image: Image.Image, steps: Sequence[tuple[int, int]]) -> Image.Image:
    for size in steps:
        image = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    return image


def load_images(
    root: Path,
    names: list[str],
    settings: PictureSettings,
    masking: MaskedImageConfig | None = None,
    seed: int | None = None,
    saliency: Sequence[str] = (),
) -> list[Image.Image]:
    """Return a prompt's pictures, opened and resized; with `masking`, which needs a seed, masked: see
    load_masked_images."""
    if masking is None:
        return [resize(open_image(root, name, settings.transparency), settings) for name in names]
    if seed is None:
        raise ValueError("masked pictures need a seed")
    return [picture for picture, _ in load_masked_images(root, names, settings, masking, seed, saliency)]


def load_masked_images(
    root: Path,
    names: list[str],
    settings: PictureSettings,
    masking: MaskedImageConfig,
    seed: int,
    saliency: Sequence[str] = (),
) -> list[tuple[Image.Image, np.ndarray | None]]:
    """Return a prompt's pictures resized and corrupted, and which squares are black, bool [rows, columns]; None where a
    strategy has no squares.

    Args:
        root: the data root.
        names: of the pictures, from root on.
        settings: how they are opened and resized.
        masking: what is done to them, and whether before or after the resize.
        seed: of this prompt; each picture's is derived from it.
        saliency: names of the pictures' saliency maps, read by strategy `semantic` only.

    Raises UserError for a picture that cannot be read, and where `semantic` lacks maps.
    """
    require_saliency(masking, names, saliency)
    pictures = []
    for index, name in enumerate(names):
        picture = open_image(root, name, settings.transparency)
        steps = sizes(*picture.size, settings)
        before = {"native": 0, "resized": max(1, len(steps) - 1), "patch": len(steps)}[masking.space]
        of_map = open_saliency(root, saliency[index]) if masking.strategy == "semantic" else None
        corrupted, squares = corrupt(_resized(picture, steps[:before]), masking, derive_seed(seed, index), of_map)
        pictures.append((_resized(corrupted, steps[before:]), squares))
    return pictures


def corrupt(
    picture: Image.Image, masking: MaskedImageConfig, seed: int, saliency: np.ndarray | None
) -> tuple[Image.Image, np.ndarray | None]:
    """Return a picture as the other branch sees it, and which of its squares are black, None without squares.

    Args:
        picture: RGB, in the space of the masking.
        masking: what is done to it; any strategy but `none`.
        seed: of this picture.
        saliency: its map, for `semantic`.
    """
    strategy = masking.strategy
    if strategy == "noise":
        return noisy(picture, masking.noise_deviation, seed), None
    if strategy == "diffusion":
        return diffused(picture, masking.diffusion_step, seed), None
    if strategy == "blur":
        return blurred(picture, masking.blur_pixels), None
    if strategy == "grey":
        return grey(picture), None
    if strategy == "none":
        raise ValueError("strategy none shows no picture")
    squares = black_squares(
        picture.size,
        strategy=strategy,
        ratio=masking.ratio,
        square_pixels=masking.square_pixels,
        seed=seed,
        saliency=saliency,
    )
    return blacken(picture, squares, masking.square_pixels), squares


def require_saliency(masking: MaskedImageConfig, names: Sequence[str], saliency: Sequence[str]) -> None:
    """Raise UserError if the strategy needs a saliency map of each of these pictures and they have none."""
    if masking.strategy == "semantic" and len(saliency) != len(names):
        raise UserError(
            f"image {names[0]}: no saliency map, which masked_image.strategy semantic needs: give the data a column of"
            " maps"
            " (data.saliency_key) and run stage 1 again, or choose another strategy"
        )


def grid_of(image: Image.Image) -> tuple[int, int, int]:
    """Return (1, rows, columns) of ViT patches of a resized picture."""
    return 1, image.height // PATCH, image.width // PATCH


def grid_of_file(root: Path, name: str, settings: PictureSettings) -> tuple[int, int, int]:
    """Return the grid that a native picture will have once upright and resized.

    The picture is opened as for its pixels: headers of turned or cut pictures tell other sizes.
    """
    width, height = model_size(*open_image(root, name, settings.transparency).size, settings)
    return 1, height // PATCH, width // PATCH


def num_image_tokens(grid: tuple[int, int, int]) -> int:
    """Return how many image tokens the model sees of a picture with this grid of patches."""
    return grid[0] * grid[1] * grid[2] // MERGE**2


def to_patches(image: Image.Image) -> np.ndarray:
    """Return a resized picture as float32 [rows * columns, 3 * 2 * 14 * 14], normalised, the frame repeated in time.

    Rows run over (row / 2, column / 2, 2, 2), so that four consecutive rows become one image token.
    """
    levels, pixels = normalised_levels(), to_patch_bytes(image).reshape(-1, 3, PATCH * PATCH)
    values = np.stack([of_channel[pixels[:, channel]] for channel, of_channel in enumerate(levels)], axis=1)
    return np.repeat(values[:, :, None], TEMPORAL, axis=2).reshape(len(pixels), -1)


def to_patch_bytes(image: Image.Image) -> np.ndarray:
    """Return a resized picture as uint8 [rows * columns, 3 * 14 * 14], rows in the order of to_patches."""
    _, rows, columns = grid_of(image)
    blocks = np.asarray(image).reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(blocks).reshape(rows * columns, 3 * PATCH * PATCH)


@cache
def normalised_levels() -> np.ndarray:
    """Return float32 [3, 256]: what the model sees of each level of red, green and blue. To be left unchanged."""
    levels = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    return np.ascontiguousarray(((levels - MEAN) / STD).T)


def to_data_uri(image: Image.Image) -> str:
    """Return a picture as data:image/png;base64,..."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

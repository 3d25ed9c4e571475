"""What the model's own image processor does, as its checkpoint says: the server runs it on every picture it is sent.

Pictures are sent in their final size, which the processor must leave alone, and it must cut and normalise as
`to_patches` does: otherwise the server would see something else than the trainer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_papo.errors import UserError
from megatron_papo.pictures.preprocess import (
    MEAN,
    MERGE,
    PATCH,
    PROCESSOR_MAX_PIXELS,
    PROCESSOR_MIN_PIXELS,
    STD,
    TEMPORAL,
    PictureSettings,
    smart_size,
)
from megatron_papo.reading import read_json, reading

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_AS_OURS = {
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": TEMPORAL,
    "image_mean": MEAN.tolist(),
    "image_std": STD.tolist(),
    "rescale_factor": 1 / 255,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
}
"""Keys that must have these values where they are given."""
_CURE = "copy the file from the model that this one was made from"


@dataclass(frozen=True)
class ModelProcessor:
    """The limits of a checkpoint's image processor."""

    file: Path
    """That says so."""
    min_pixels: int
    max_pixels: int

    def require_limits(self, used: Sequence[PictureSettings]) -> None:
        """Raise UserError where pictures may be larger than the model allows."""
        largest = max(settings.max_pixels for settings in used)
        if largest > self.max_pixels:
            raise UserError(
                f"{self.file}: the model takes pictures of at most {self.max_pixels} pixels, data.max_pixels or"
                f" evaluation.max_pixels allows {largest}:"
                f" --set data.max_pixels={self.max_pixels} --set evaluation.max_pixels={self.max_pixels}, or raise the"
                " model's"
            )

    def require_unchanged(self, width: int, height: int) -> None:
        """Raise UserError for a picture, in its final size, that the server would resize again."""
        if smart_size(width, height, self.min_pixels, self.max_pixels) != (width, height):
            raise UserError(
                f"resized to {width} x {height} pixels, and the server would resize it again: {self.file} allows"
                f" {self.min_pixels} to {self.max_pixels} pixels: bring data.min_pixels and data.max_pixels (of an"
                " evaluation set: evaluation's) inside"
            )


def read_model_processor(directory: Path) -> ModelProcessor:
    """Return the image processor of a checkpoint. Raises UserError where it has none, or one that treats pictures in
    another way than Qwen2.5-VL's."""
    file, tree = _read(Path(directory))
    with reading(file, _CURE):
        size = tree.get("size") or {}
        lowest = tree.get("min_pixels") or size.get("shortest_edge") or PROCESSOR_MIN_PIXELS
        highest = tree.get("max_pixels") or size.get("longest_edge") or PROCESSOR_MAX_PIXELS
        for key, expected in _AS_OURS.items():
            if key in tree and not _is_same(tree[key], expected):
                raise ValueError(f"{key} is {tree[key]}, Qwen2.5-VL's is {expected}")
        return ModelProcessor(file, int(lowest), int(highest))


def _read(directory: Path) -> tuple[Path, dict]:
    """Return the file and the settings in it, as transformers finds them: nested in processor_config.json first."""
    for name, nested in ((PROCESSOR, True), (PREPROCESSOR, False)):
        if (directory / name).is_file():
            tree = read_json(directory / name, _CURE)
            settings = tree.get("image_processor") if nested else tree
            if isinstance(settings, dict):
                return directory / name, settings
    raise UserError(f"{directory / PREPROCESSOR}: not there: the server cannot prepare pictures without it: {_CURE}")


def _is_same(value: object, expected: object) -> bool:
    if isinstance(expected, list):
        return isinstance(value, list) and len(value) == len(expected) and all(map(_is_same, value, expected))
    if isinstance(expected, float):
        return isinstance(value, float) and math.isclose(value, expected, rel_tol=1e-5)
    return value == expected

"""Encoded pictures as pixels: the one place where the bytes of a file become RGB, upright, whatever its mode.

What a picture looks like here is what stage 1 measures, the server is sent and the trainer cuts into patches; no size
is ever taken from a header. Of a file with several frames or pages (GIF, APNG, TIFF) the first is the picture. Colour
profiles are not applied. What has no certain look (floating-point levels, 32-bit integers) is refused.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from megatron_papo.errors import UserError
from megatron_papo.reading import reading

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow reads more, some of them (EPS) by starting other programs."""
Transparency = Literal["white", "black"]
PLAIN_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
ALPHA_MODES = ("LA", "PA", "RGBA")
GREY_BITS = {"1": 1, "L;2": 2, "L;4": 4}
"""Depth of a PNG's grey levels by Pillow's name of its raw mode, where Pillow spreads them over 0..255."""
_NPY_MAGIC = b"\x93NUMPY"
_WHITE_IS_ZERO, _YCBCR, _UNCOMPRESSED, _IN_PLANES = 0, 6, 1, 2
"""Values of TIFF tags."""
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # what is refused is twice as large


@dataclass(frozen=True)
class Decoded:
    """A picture as it is shown."""

    image: Image.Image
    """RGB, upright."""
    format: str
    """Of the file, e.g. PNG."""
    is_transparent: bool
    """Some pixels are not wholly opaque."""
    has_several_frames: bool
    """`image` is the first of them."""

    @property
    def is_one_colour(self) -> bool:
        return len(self.image.getcolors(1) or ()) == 1


def decode_image(content: bytes, shown: str, transparency: Transparency = "white") -> Decoded:
    """Return a picture as RGB, turned as its orientation says (as transformers' load_image does).

    Args:
        content: of the file.
        shown: what to call it in messages.
        transparency: what shows through transparent pixels: a white page, or (black) the colour stored under them.

    Raises UserError for one that is damaged, of another format, larger than twice Pillow's limit against decompression
    bombs (179 million pixels), or without a certain look.
    """
    with reading(shown, "it cannot be read as a picture: replace it or drop the row"):
        stored = _open(content, shown, "picture")
        colours, alpha = _colours_and_alpha(stored, shown)
        is_transparent = alpha is not None and bool((np.asarray(alpha) < 255).any())
        if alpha is not None and is_transparent and transparency == "white":
            page = Image.new("RGB", colours.size, "white")
            page.paste(colours, mask=alpha)
            colours = page
        colours.info.clear()  # a key for transparency or a profile would travel with it
        return Decoded(colours, stored.format, is_transparent, stored.has_several_frames)


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
    with reading(shown, f"it cannot be read as a saliency map: {again}"):
        if content.startswith(_NPY_MAGIC):
            values, kind = np.load(io.BytesIO(content), allow_pickle=False), "NPY"
        else:
            stored = _open(content, shown, "saliency map")
            values, kind = _grey_levels(stored, shown), stored.format
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


@dataclass(frozen=True)
class _Stored:
    """A picture in the mode that it was stored in, read and upright."""

    image: Image.Image
    format: str
    raw_mode: str
    """Pillow's name of how the pixels lie in a PNG."""
    bits: int
    """Of a deep grey level."""
    white_is_zero: bool
    """Grey levels that Pillow leaves as they are run from white to black."""
    has_several_frames: bool

    @property
    def is_deep_grey(self) -> bool:
        return self.image.mode.startswith("I;16") or (self.image.mode == "I" and self.format == "PPM")

    @property
    def deep_levels(self) -> np.ndarray:
        """Unsigned integers [height, width], 0 for black."""
        levels = np.asarray(self.image).astype(np.uint32)
        return 2**self.bits - 1 - levels if self.white_is_zero else levels


def _open(content: bytes, shown: str, kind: str) -> _Stored:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise UserError(
            f"{shown}: cannot be read as a {kind}: damaged, or none of {', '.join(FORMATS)}: replace it or drop the row"
        )
    with image:
        tags = dict(getattr(image, "tag_v2", {}))
        raw_mode = str(image.tile[0].args) if image.format == "PNG" and image.tile else ""
        photometric = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
        if (
            photometric == _YCBCR
            and tags.get(TiffImagePlugin.COMPRESSION, _UNCOMPRESSED) == _UNCOMPRESSED
            and tuple(tags.get(TiffImagePlugin.YCBCRSUBSAMPLING, (2, 2))) != (1, 1)
        ):
            raise UserError(f"{shown}: an uncompressed TIFF with fewer colours than pixels: save it as PNG")
        bits = int(tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0])
        if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == _IN_PLANES and bits != 8:
            raise UserError(f"{shown}: a TIFF with planes of {bits} bits, which Pillow misreads: save it as PNG")
        return _Stored(
            ImageOps.exif_transpose(image),
            str(image.format),
            raw_mode,
            bits=bits,
            white_is_zero=photometric == _WHITE_IS_ZERO,
            has_several_frames=getattr(image, "is_animated", False),
        )


def _colours_and_alpha(stored: _Stored, shown: str) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours that are stored, as RGB, and how opaque each pixel is (mode L; None: all of them wholly)."""
    image, mode = stored.image, stored.image.mode
    key = image.info.get("transparency")
    if stored.is_deep_grey:
        levels = stored.deep_levels
        largest = 2**stored.bits - 1
        grey = Image.fromarray(((levels * 255 + largest // 2) // largest).astype(np.uint8))
        return grey.convert("RGB"), None if key is None else _opaque(levels != key)
    if mode in ALPHA_MODES or (mode == "P" and key is not None):
        with_alpha = image.convert("RGBA")
        return with_alpha.convert("RGB"), with_alpha.getchannel("A")
    if mode not in PLAIN_MODES:
        raise UserError(
            f"{shown}: pixels of mode {mode} (floating-point or 32-bit levels), for which no scale says what is white:"
            " save it with 8 or 16 bits per channel, or drop the row"
        )
    colours = image.convert("RGB")
    if key is None:
        return colours, None
    if mode == "RGB":
        if stored.raw_mode == "RGB;16B":
            raise UserError(f"{shown}: 16-bit colours, one of them transparent: save it with an alpha channel")
        return colours, _opaque((np.asarray(colours) != np.array(key)).any(axis=-1))
    return colours, _opaque(np.asarray(colours)[..., 0] != key * 255 // (2 ** GREY_BITS.get(stored.raw_mode, 8) - 1))


def _opaque(where: np.ndarray) -> Image.Image:
    return Image.fromarray(where.astype(np.uint8) * 255)


def _grey_levels(stored: _Stored, shown: str) -> np.ndarray:
    """Return the levels [height, width] of a picture that has no colours."""
    if stored.is_deep_grey:
        return stored.deep_levels
    if stored.image.mode in ("1", "L", "I", "F"):
        return np.asarray(stored.image)
    channels = np.asarray(_colours_and_alpha(stored, shown)[0])
    if (channels != channels[..., :1]).any():
        raise UserError(
            f"{shown}: a picture in colours, whose brightness need not be saliency: give one in grey levels"
        )
    return channels[..., 0]

"""Every mode, depth, orientation and transparency of the formats that are read: the pixels of files made here byte by
byte (PNG, TIFF, PNM) or by Pillow from known pixels are those worked out by hand, or the file is refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from megatron_papo.errors import UserError
from megatron_papo.pictures.decode import decode_image, decode_saliency
from megatron_papo.pictures.preprocess import PictureSettings, grid_of, grid_of_file, load_images

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
"""Colour types of PNG."""


def packed(samples: list[list[int]], bits: int, order: str = ">") -> list[bytes]:
    """Rows of samples, as bytes; below 8 bits the first sample is in the highest bits."""
    if bits == 16:
        return [struct.pack(f"{order}{len(row)}H", *row) for row in samples]
    rows = []
    for row in samples:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows.append(bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8)))
    return rows


def png(kind: int, bits: int, samples: list[list[int]], width: int, palette=b"", transparent=b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, len(samples), bits, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", palette), (b"tRNS", transparent)]
    body = b"".join(chunk(name, content) for name, content in chunks if content)
    data = zlib.compress(b"".join(b"\0" + row for row in packed(samples, bits)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(bits: int, photometric: int, samples: list[list[int]], width: int, channels=1, more=(), order="<") -> bytes:
    """Uncompressed, one strip. more: further tags, (number, value), as 16-bit integers or a tuple."""
    data = b"".join(packed(samples, bits, order))
    tags = [(256, width), (257, len(samples)), (259, 1), (262, photometric), (277, channels), (278, len(samples))]
    tags += [(258, bits if channels == 1 else (bits,) * channels), *more]
    entries, extra, start = [], b"", 8 + 2 + 12 * (len(tags) + 2) + 4
    for number, value in tags:
        values = value if isinstance(value, tuple) else (value,)
        content = struct.pack(f"{order}{len(values)}H", *values)
        if len(content) > 4:
            content, extra = struct.pack(f"{order}I", start + len(extra)), extra + content
        entries.append(struct.pack(f"{order}HHI", number, 3, len(values)) + content.ljust(4, b"\0"))
    for number, value in ((273, start + len(extra)), (279, len(data))):
        entries.append(struct.pack(f"{order}HHII", number, 4, 1, value))
    return (
        (b"II*\0" if order == "<" else b"MM\0*")
        + struct.pack(f"{order}IH", 8, len(entries))
        + b"".join(sorted(entries))
        + bytes(4)
        + extra
        + data
    )


def saved(pixels, mode: str, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(np.array(pixels, dtype=np.uint8)) if mode != "P" else pixels
    (image if image.mode == mode else Image.frombytes(mode, image.size, image.tobytes())).save(stream, form, **options)
    return stream.getvalue()


def grey(*rows: list[int]) -> np.ndarray:
    return np.repeat(np.array(rows, dtype=np.uint8)[..., None], 3, axis=-1)


DEEP = [[0, 128, 257], [32768, 65535, 65280]]
AS_GREY = grey([0, 0, 1], [128, 255, 254])  # value / 257, rounded
RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
OPAQUE = {
    "1-bit PNG": (png(GREY, 1, [[0, 1, 0]], 3), grey([0, 255, 0])),
    "2-bit PNG": (png(GREY, 2, [[0, 1, 2, 3]], 4), grey([0, 85, 170, 255])),
    "4-bit PNG": (png(GREY, 4, [[0, 1, 15]], 3), grey([0, 17, 255])),
    "8-bit PNG": (png(GREY, 8, [[0, 1, 255]], 3), grey([0, 1, 255])),
    "16-bit grey PNG": (png(GREY, 16, DEEP, 3), AS_GREY),
    "16-bit RGB PNG": (png(RGB, 16, [[0, 32896, 65535, 257, 65535, 0]], 2), np.array([[(0, 128, 255), (1, 255, 0)]])),
    "2-bit palette PNG": (png(PALETTE, 2, [[2, 0, 1]], 3, bytes(WHITE + RED + BLUE)), np.array([[BLUE, WHITE, RED]])),
    "opaque RGBA PNG": (png(RGBA, 8, [[1, 2, 3, 255]], 1), np.array([[(1, 2, 3)]])),
    "16-bit TIFF": (tiff(16, 1, DEEP, 3), AS_GREY),
    "16-bit TIFF of the other byte order": (tiff(16, 1, DEEP, 3, order=">"), AS_GREY),
    "16-bit TIFF, white is 0": (tiff(16, 0, DEEP, 3), 255 - AS_GREY),
    "12-bit TIFF": (tiff(12, 1, [[0, 4095, 2048, 1]], 4), grey([0, 255, 128, 0])),
    "1-bit TIFF, white is 0": (tiff(1, 0, [[0, 1, 0]], 3), grey([255, 0, 255])),
    "8-bit TIFF, white is 0": (tiff(8, 0, [[0, 1, 255]], 3), grey([255, 254, 0])),
    "16-bit RGB TIFF": (tiff(16, 2, [[0, 32896, 65535]], 1, 3), np.array([[(0, 128, 255)]])),
    "CMYK TIFF": (tiff(8, 5, [[0, 255, 255, 0, 255, 255, 0, 0, 0, 0, 0, 51]], 3, 4),
                  np.array([[RED, BLUE, (204, 204, 204)]])),
    "16-bit CMYK TIFF": (tiff(16, 5, [[0, 65535, 65535, 0]], 1, 4), np.array([[RED]])),
    "YCbCr TIFF": (tiff(8, 6, [[76, 85, 255, 128, 128, 128]], 2, 3, [(530, (1, 1))]), np.array([[RED, (128,) * 3]])),
    "LAB TIFF": (tiff(8, 8, [[255, 0, 0, 138, 81, 70, 0, 0, 0]], 3, 3), np.array([[WHITE, RED, BLACK]])),
    "16-bit PGM": (b"P5 3 2 65535\n" + b"".join(packed(DEEP, 16)), AS_GREY),
    "10-bit PGM": (b"P5 3 1 1023\n" + b"".join(packed([[0, 1023, 512]], 16)), grey([0, 255, 128])),
    "16-bit PPM": (b"P6 1 1 65535\n" + b"".join(packed([[0, 32896, 65535]], 16)), np.array([[(0, 128, 255)]])),
    "PBM": (b"P4 3 1\n" + b"\x40", grey([255, 0, 255])),
    "CMYK JPEG": (saved(np.full((8, 8, 4), (0, 255, 255, 0)), "CMYK", "JPEG", quality=100), np.full((8, 8, 3), RED)),
    "grey JPEG": (saved(np.full((8, 8), 77), "L", "JPEG", quality=100), np.full((8, 8, 3), 77)),
    "YCbCr JPEG": (saved(np.full((8, 8, 3), BLUE), "RGB", "JPEG", quality=100), np.full((8, 8, 3), BLUE)),
    "BMP": (saved([[RED, BLUE]], "RGB", "BMP"), np.array([[RED, BLUE]])),
    "GIF": (saved(np.array([[0, 7]]), "L", "GIF"), grey([0, 7])),
    "WebP": (saved(np.full((8, 8, 3), RED), "RGB", "WEBP", lossless=True), np.full((8, 8, 3), RED)),
}  # fmt: skip
"""What has no transparency: content of the file, pixels."""
CLOSE = {"LAB TIFF": 5, "CMYK JPEG": 2, "YCbCr JPEG": 2, "YCbCr TIFF": 1, "12-bit TIFF": 0}
"""By how many levels conversions between colour spaces may differ; elsewhere 0."""

HALF_RED = (255, 127, 127)
TRANSPARENT = {
    "8-bit grey with alpha": (png(GREY_ALPHA, 8, [[0, 255, 0, 0, 0, 128]], 3), [0, 255, 127], [0, 0, 0]),
    "16-bit grey with alpha": (png(GREY_ALPHA, 16, [[0, 65535, 0, 0]], 2), [0, 255], [0, 0]),
    "RGBA": (png(RGBA, 8, [[*RED, 255, *RED, 128, *RED, 0]], 3), [RED, HALF_RED, WHITE], [RED] * 3),
    "16-bit RGBA": (png(RGBA, 16, [[65535, 0, 0, 65535, 65535, 0, 0, 0]], 2), [RED, WHITE], [RED] * 2),
    "palette": (png(PALETTE, 8, [[0, 1]], 2, bytes(RED + BLUE), b"\xff\x00"), [RED, WHITE], [RED, BLUE]),
    "4-bit palette": (png(PALETTE, 4, [[0, 1]], 2, bytes(RED + BLUE), b"\x80"), [HALF_RED, BLUE], [RED, BLUE]),
    "1-bit grey": (png(GREY, 1, [[0, 1]], 2, transparent=b"\0\0"), [255, 255], [0, 255]),
    "2-bit grey": (png(GREY, 2, [[0, 1, 2]], 3, transparent=b"\0\1"), [0, 255, 170], [0, 85, 170]),
    "4-bit grey": (png(GREY, 4, [[0, 1, 2]], 3, transparent=b"\0\1"), [0, 255, 34], [0, 17, 34]),
    "8-bit grey": (png(GREY, 8, [[0, 1, 2]], 3, transparent=b"\0\1"), [0, 255, 2], [0, 1, 2]),
    "16-bit grey": (png(GREY, 16, [[257, 514]], 2, transparent=b"\1\1"), [255, 2], [1, 2]),
    "RGB": (png(RGB, 8, [[*RED, *BLUE]], 2, transparent=b"\0\xff\0\0\0\0"), [WHITE, BLUE], [RED, BLUE]),
    "TIFF with alpha": (tiff(8, 2, [[*RED, 255, *RED, 0]], 2, 4, [(338, 2)]), [RED, WHITE], [RED] * 2),
    "TIFF with alpha multiplied in": (tiff(8, 2, [[128, 0, 0, 128] * 2], 2, 4, [(338, 1)]), [HALF_RED], [RED]),
    "grey TIFF with alpha": (tiff(8, 1, [[0, 255, 0, 0]], 2, 2, [(338, 2)]), [0, 255], [0, 0]),
    "WebP": (saved(np.full((8, 8, 4), (*RED, 0)), "RGBA", "WEBP", lossless=True, exact=True), [WHITE], [RED]),
    "GIF": (saved(np.array([[9, 7]]), "L", "GIF", transparency=9), [255, 7], [9, 7]),
}  # fmt: skip
"""Content, the first row on white, the first row with transparency dropped."""


@pytest.mark.parametrize("name", OPAQUE)
def test_every_mode_and_depth(name):
    content, expected = OPAQUE[name]
    decoded = decode_image(content, name)
    assert decoded.image.mode == "RGB" and not decoded.is_transparent and not decoded.has_several_frames
    difference = np.abs(np.asarray(decoded.image).astype(int) - expected)
    assert difference.shape == expected.shape and difference.max() <= CLOSE.get(name, 0), np.asarray(decoded.image)


@pytest.mark.parametrize("name", TRANSPARENT)
def test_every_transparency(name):
    content, *expected = TRANSPARENT[name]
    for transparency, row in zip(("white", "black"), expected):
        decoded = decode_image(content, name, transparency)
        assert decoded.is_transparent and not decoded.image.info
        wanted = np.array([(level,) * 3 if isinstance(level, int) else level for level in row])
        np.testing.assert_array_equal(np.asarray(decoded.image)[0, : len(row)], wanted)


def test_black_lines_on_nothing_are_seen():
    lines = np.zeros((9, 9, 4), dtype=np.uint8)
    lines[4, :, 3] = 255
    content = saved(lines, "RGBA", "PNG")
    assert not decode_image(content, "lines").is_one_colour
    assert decode_image(content, "lines", "black").is_one_colour  # control: what the published code sees


TURNED = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2), 8: np.rot90,
}  # fmt: skip
"""Orientation -> what a viewer does to the stored pixels (TIFF 6.0, tag 274)."""


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "deep TIFF"])
def test_every_orientation(tmp_path, form, orientation):
    """Upright, and of one size wherever a size is asked for."""
    stored = np.full((120, 300, 3), 255, dtype=np.uint8)
    stored[:40, :150] = (255, 0, 0) if form != "deep TIFF" else 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    if form == "deep TIFF":
        levels = (stored[..., 0].astype(int) * 257).tolist()
        content = tiff(16, 1, levels, 300, more=[(274, orientation)])
    elif form == "TIFF":
        content = saved(stored, "RGB", form, tiffinfo={0x0112: orientation})
    else:
        content = saved(stored, "RGB", form, exif=exif, **({} if form == "PNG" else {"quality": 100}))
    (tmp_path / "turned").write_bytes(content)
    expected = TURNED[orientation](stored).astype(int)
    found = np.asarray(decode_image(content, "turned").image).astype(int)
    assert found.shape == expected.shape
    assert (np.abs(found - expected).max(axis=-1) > 60).mean() < 0.02, "JPEG and WebP blur the border"
    settings = PictureSettings(3136, 50176)
    [resized] = load_images(tmp_path, ["turned"], settings)
    assert grid_of_file(tmp_path, "turned", settings) == grid_of(resized)
    assert grid_of(resized) == ((1, 22, 8) if orientation >= 5 else (1, 8, 22))


def animation(form: str) -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    frames[0].save(stream, form, save_all=True, append_images=frames[1:], **({} if form == "TIFF" else {"duration": 9}))
    return stream.getvalue()


@pytest.mark.parametrize("form", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_of_several_frames(form):
    decoded = decode_image(animation(form), form)
    assert decoded.has_several_frames and np.abs(np.asarray(decoded.image)[5, 5].astype(int) - RED).max() <= 2


def bomb() -> bytes:
    """A PNG of 400 million pixels in half a megabyte, all of one level."""
    content = png(GREY, 1, [[0]], 1)
    return content[:16] + struct.pack(">II", 20000, 20000) + content[24:]


def in_mode(mode: str, level: float) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (2, 2), level).save(stream, "TIFF")
    return stream.getvalue()


REFUSED = {
    "floating-point TIFF": in_mode("F", 0.5),
    "signed 16-bit TIFF": tiff(16, 1, DEEP, 3, more=[(339, 2)]),
    "32-bit TIFF": in_mode("I", 70000),
    "TIFF with planes of 16 bits": tiff(16, 2, [[0, 1, 2]], 1, 3, [(284, 2)]),
    "subsampled YCbCr TIFF": tiff(8, 6, [[76, 85, 255, 128, 128, 128]], 2, 3),
    "16-bit colours, one transparent": png(RGB, 16, [[0, 0, 0, 1, 1, 1]], 2, transparent=bytes(6)),
    "cut PNG": saved(np.random.default_rng(0).integers(0, 255, (64, 64, 3)), "RGB", "PNG")[:900],
    "cut JPEG": saved(np.random.default_rng(0).integers(0, 255, (64, 64, 3)), "RGB", "JPEG")[:900],
    "cut TIFF": tiff(16, 1, DEEP, 3)[:-3],
    "cut GIF": saved(np.arange(4096).reshape(64, 64) % 251, "L", "GIF")[:2000],
    "cut WebP": saved(np.random.default_rng(0).integers(0, 255, (64, 64, 3)), "RGB", "WEBP")[:900],
    "cut BMP": saved(np.zeros((64, 64, 3)), "RGB", "BMP")[:900],
    "a decompression bomb": bomb(),
    "empty": b"",
    "text": b"not a picture",
    "EPS, which Pillow would hand to another program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
    "IPTC, ICO and the like": b"\0\0\1\0" + bytes(60),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_certain_look_is_refused(name):
    with pytest.raises(UserError) as error:
        decode_image(REFUSED[name], "image of row 7")
    assert str(error.value).startswith("image of row 7: ") and "\n" not in str(error.value)
    assert "0x" not in str(error.value), "no address of an object"


def test_damaged_files_are_refused_on_one_line():
    """Whatever a decoder raises: bytes changed, left out and put in."""
    random = np.random.default_rng(0)
    whole = [content for content, *_ in (*OPAQUE.values(), *TRANSPARENT.values())] + [animation("GIF")]
    refused = 0
    for number in range(300):
        content = bytearray(whole[number % len(whole)])
        for _ in range(random.integers(1, 8)):
            place, length = random.integers(len(content)), random.integers(3)
            content[place : place + length] = random.bytes(random.integers(3))
        for decoded in (decode_image, decode_saliency):
            try:
                decoded(bytes(content), "image of row 7")
            except UserError as error:
                refused += 1
                assert str(error).startswith("image of row 7: ") and "\n" not in str(error)
    assert 150 < refused < 599, "some are refused, some are not"


def test_saliency_runs_the_same_way():
    """Whatever the picture's depth and sign; orders of magnitude stay."""
    for content, expected in (
        (tiff(16, 0, DEEP, 3), 65535 - np.array(DEEP)),
        (png(GREY, 16, DEEP, 3), np.array(DEEP)),
        (png(GREY, 2, [[0, 1, 3]], 3), np.array([[0, 85, 255]])),
        (png(GREY_ALPHA, 8, [[5, 0, 6, 255]], 2), np.array([[5, 6]])),
        (REFUSED["floating-point TIFF"], np.full((2, 2), 0.5)),
    ):
        np.testing.assert_array_equal(decode_saliency(content, "map")[0], expected)

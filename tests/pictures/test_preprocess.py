"""Pictures become the pixels that transformers' own image processor makes of them; bad files are refused by name."""

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.pictures import preprocess
from megatron_papo.pictures.preprocess import PictureSettings
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


SMALL = PictureSettings(3136, 50176)
LIMITS = [(3136, 50176), (3136, 12845056), (200704, 1003520), (784, 784), (50176, 60000)]


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), limits=st.sampled_from(LIMITS))
@example(width=42, height=14, limits=(784, 784))
@example(width=1, height=200, limits=(3136, 50176))
@example(width=1, height=201, limits=(3136, 50176))
@example(width=40, height=7990, limits=(3136, 12845056))
def test_smart_size_is_transformers(width, height, limits):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    try:
        expected = smart_resize(height, width, 28, *limits)
        smart_resize(*expected, 28, *limits)  # the server's, of what it is sent
    except ValueError:
        with pytest.raises(UserError, match="more than 200 times"):
            preprocess.model_size(width, height, PictureSettings(*limits))
        return
    assert preprocess.model_size(width, height, PictureSettings(*limits)) == expected[::-1]


PUBLISHED = PictureSettings(200704, 1003520, resize="published")


@pytest.mark.parametrize(
    "native, published, smart",
    [
        ((320, 240), (504, 392), (532, 392)),
        ((400, 300), (504, 392), (532, 392)),
        ((448, 448), (448, 448), (448, 448)),
        ((640, 480), (644, 476), (644, 476)),
        ((1920, 1080), (1344, 756), (1316, 728)),
        ((1000, 1000), (1008, 1008), (980, 980)),
        ((28, 28), (448, 448), (448, 448)),
    ],
)
def test_published_sizes(native, published, smart):
    """What the authors' process_image and the processor behind it make of these, as they were run."""
    assert preprocess.model_size(*native, PUBLISHED) == published
    assert preprocess.model_size(*native, replace(PUBLISHED, resize="smart")) == smart


def test_published_pixels_are_resized_twice(tmp_path):
    """By hand: to int() of both sides first, then to multiples of 28; every reader of a size says the same."""
    native = picture(320, 240)
    native.save(tmp_path / "picture.png")
    twice = native.resize((517, 387), Image.Resampling.BICUBIC).resize((504, 392), Image.Resampling.BICUBIC)
    [resized] = preprocess.load_images(tmp_path, ["picture.png"], PUBLISHED)
    np.testing.assert_array_equal(np.asarray(resized), np.asarray(twice))
    assert (np.asarray(resized) != np.asarray(native.resize((504, 392), Image.Resampling.BICUBIC))).any()  # control
    assert preprocess.grid_of_file(tmp_path, "picture.png", PUBLISHED) == preprocess.grid_of(resized) == (1, 28, 36)
    with pytest.raises(UserError, match="more than 200 times"):
        preprocess.model_size(201 * 5, 5, PUBLISHED)


@pytest.mark.parametrize(
    "native, tokens, sizes",
    [  # image tokens: as the authors' evaluation was run; sizes: its rules by hand
        ((480, 320), 187, [(480, 320), (476, 308)]),
        ((350, 250), 108, [(350, 250), (336, 252)]),
        ((200, 150), 35, [(200, 150), (196, 140)]),
        ((1920, 1080), 777, [(1024, 576), (1036, 588)]),
        ((20, 20), 4, [(32, 32), (56, 56)]),
        ((300, 10), 11, [(300, 10), (300, 28), (308, 28)]),
        ((5700, 14), 180, [(5700, 14), (5700, 28), (5040, 28), (5040, 28)]),
        ((14, 5700), 180, [(14, 5700), (28, 5700), (28, 5040), (28, 5040)]),
    ],
)
def test_published_evaluation_sizes(native, tokens, sizes):
    config = load_config(ROOT / "configs" / "papo_g_3b.yaml")
    published = PictureSettings.of_evaluation(config.data, config.evaluation, config.evaluation_sets["evaluation"])
    assert preprocess.sizes(*native, published) == sizes
    assert sizes[-1][0] * sizes[-1][1] == tokens * 28 * 28
    if native == (480, 320):  # the control: with the limits of training it would be half as many again
        assert preprocess.model_size(*native, replace(published, min_pixels=200704)) != sizes[-1]
        smart = config.evaluation.model_copy(update={"resize": "smart", "min_pixels": None})
        assert preprocess.model_size(
            *native, PictureSettings.of_evaluation(config.data, smart, config.evaluation_sets["evaluation"])
        ) == (560, 392)


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(2, 300), limits=st.sampled_from(LIMITS[:1] + LIMITS[3:]))
def test_patches_are_transformers(processor, width, height, limits):
    """Equal to 1e-6: the same operations in another order of broadcasting (values are about 2)."""
    if max(width, height) > 200 * min(width, height):
        return
    image = picture(width, height)
    expected = processor(min_pixels=limits[0], max_pixels=limits[1])(images=[image], return_tensors="np")
    resized = preprocess.resize(image, PictureSettings(*limits))
    patches = preprocess.to_patches(resized)
    assert preprocess.grid_of(resized) == tuple(expected["image_grid_thw"][0])
    assert patches.dtype == np.float32 and patches.shape == expected["pixel_values"].shape
    np.testing.assert_allclose(patches, expected["pixel_values"], atol=1e-6, rtol=0)
    assert preprocess.num_image_tokens(preprocess.grid_of(resized)) == len(patches) // 4


def test_several_pictures_and_negative_control(processor):
    originals = [picture(100, 57, 1), picture(31, 90, 2)]
    expected = processor(min_pixels=3136, max_pixels=50176)(images=originals, return_tensors="np")["pixel_values"]
    resized = [preprocess.resize(image, SMALL) for image in originals]
    ours = np.concatenate([preprocess.to_patches(image) for image in resized])
    np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=0)
    # A processor with another interpolation, or patches in plain row order, would be noticed.
    bilinear = np.concatenate(
        [preprocess.to_patches(o.resize(r.size, Image.Resampling.BILINEAR)) for o, r in zip(originals, resized)]
    )
    assert np.abs(bilinear - expected).max() > 0.1
    plain = preprocess.to_patches(resized[0]).reshape(-1, 2, 2, 1176)[:, [0, 0], [0, 1]].reshape(-1, 1176)
    assert np.abs(plain[:4] - expected[:4]).max() > 0.1


def test_a_picture_of_the_right_size_is_left_alone():
    image = picture(84, 56)
    assert preprocess.resize(image, SMALL) is image


def test_upright_like_transformers(tmp_path):
    from transformers.image_utils import load_image

    image = picture(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    ours = preprocess.open_image(tmp_path, "turned.png")
    assert ours.size == (20, 40)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(load_image(str(tmp_path / "turned.png"))))


def test_bad_files_are_named(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    picture(30, 30).save(tmp_path / "outside.png")
    png = io.BytesIO()
    picture(64, 64).save(png, "PNG")
    (root / "cut.png").write_bytes(png.getvalue()[:300])
    (root / "text.png").write_text("not a picture")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    for name, message in {
        "none.png": "no such file",
        "../outside.png": "outside the data root",
        "link.png": "outside the data root",
        str(tmp_path / "outside.png"): "outside the data root",
        "cut.png": "cannot be read as a picture",
        "text.png": "cannot be read as a picture",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            preprocess.open_image(root, name)
        assert name.split("/")[-1] in str(error.value)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("form", ["png", "jpg", "webp"])
def test_grid_of_file_is_that_of_the_upright_picture(tmp_path, orientation, form):
    """Read from the header alone; a photograph held sideways has its rows and columns exchanged."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    name = f"turned.{form}"
    picture(300, 100).save(tmp_path / name, exif=exif)
    resized = preprocess.load_images(tmp_path, [name], SMALL)[0]
    assert preprocess.grid_of_file(tmp_path, name, SMALL) == preprocess.grid_of(resized)
    assert preprocess.grid_of(resized) == ((1, 22, 8) if orientation in (6, 8) else (1, 8, 22))  # 308 x 112 pixels


def test_grid_of_a_bad_file_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UserError, match="text.png: cannot be read as a picture"):
        preprocess.grid_of_file(tmp_path, "text.png", SMALL)
    picture(201, 1).save(tmp_path / "narrow.png")
    with pytest.raises(UserError, match="more than 200 times"):
        preprocess.grid_of_file(tmp_path, "narrow.png", SMALL)

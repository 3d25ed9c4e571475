"""Masked images: every square is drawn, ragged ones too; at least one is black; saliency decides for `semantic`; the
same seed gives the same picture; the input stays as it is."""

import io

import numpy as np
import pytest
from PIL import Image

from megatron_papo.config import MaskedImageConfig
from megatron_papo.errors import UserError
from megatron_papo.pictures.decode import decode_saliency
from megatron_papo.pictures.masking import black_squares, blacken, mean_saliency
from megatron_papo.pictures.preprocess import PictureSettings, load_images, load_masked_images, resize, to_patches


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random, and nowhere black: a black pixel in a masked copy was masked."""
    return Image.fromarray(np.random.default_rng(seed).integers(1, 256, (height, width, 3), dtype=np.uint8))


def mask_image(image: Image.Image, **settings) -> Image.Image:
    return blacken(image, black_squares(image.size, **settings), settings["square_pixels"])


def black(image: Image.Image) -> np.ndarray:
    return (np.asarray(image) == 0).all(axis=2)


@pytest.mark.parametrize("size", [(70, 42), (45, 30), (13, 9), (1, 1), (14, 14), (200, 3)])
@pytest.mark.parametrize("square", [5, 14, 28])
def test_black_squares_on_the_grid_and_nothing_else(size, square):
    image = picture(*size)
    original = np.array(image)
    for seed in range(12):
        masked = mask_image(image, strategy="random", ratio=0.6, square_pixels=square, seed=seed)
        assert masked.size == size
        mask = black(masked)
        np.testing.assert_array_equal(np.asarray(masked)[~mask], original[~mask])
        for top in range(0, size[1], square):
            for left in range(0, size[0], square):
                cell = mask[top : top + square, left : left + square]
                assert cell.all() or not cell.any()
        assert mask.any()
    np.testing.assert_array_equal(np.asarray(image), original)


def test_ratio_and_independence_on_a_real_size():
    """1003 x 777 pixels, 72 x 56 squares: the share of black squares is within 5 standard deviations of the ratio,
    edges included."""
    image = picture(1003, 777)
    for ratio in (0.3, 0.6, 0.9):
        mask = black(mask_image(image, strategy="random", ratio=ratio, square_pixels=14, seed=7))[::14, ::14]
        assert mask.shape == (56, 72)
        assert abs(mask.mean() - ratio) < 5 * (ratio * (1 - ratio) / mask.size) ** 0.5
        edge = np.concatenate([mask[-1], mask[:, -1]])
        assert abs(edge.mean() - ratio) < 5 * (ratio * (1 - ratio) / edge.size) ** 0.5
        neighbours = (mask[:, 1:] == mask[:, :-1]).mean()
        assert abs(neighbours - (ratio**2 + (1 - ratio) ** 2)) < 0.05


def test_a_mask_always_masks():
    """A picture no larger than a square is all black; of few squares at least one is, each equally likely. Drawn 3000
    times."""
    for size in ((10, 8), (1, 1), (14, 14)):
        for seed in range(50):
            assert black(mask_image(picture(*size), strategy="random", ratio=0.01, square_pixels=14, seed=seed)).all()
    counts = np.zeros((2, 3))
    for seed in range(3000):
        squares = black_squares((40, 20), strategy="random", ratio=0.05, square_pixels=14, seed=seed)
        assert squares.any()
        counts += squares
    # P(black) = ratio + P(none drawn) / 6 = 0.05 + 0.95^6 / 6
    np.testing.assert_allclose(counts / 3000, 0.05 + 0.95**6 / 6, atol=5 * (0.17 * 0.83 / 3000) ** 0.5)
    # Negative control: without the guarantee, as in the authors' code, most draws of this ratio mask nothing.
    assert np.mean([(np.random.default_rng(seed).random((2, 3)) < 0.05).any() for seed in range(3000)]) < 0.3


def test_seed_decides():
    image = picture(210, 140)

    def masked(seed):
        return np.asarray(mask_image(image, strategy="random", ratio=0.5, square_pixels=14, seed=seed))

    np.testing.assert_array_equal(masked(3), masked(3))
    assert (masked(3) != masked(4)).any()


def test_full_is_black_and_unknown_is_refused():
    assert black(mask_image(picture(31, 17), strategy="full", ratio=0.1, square_pixels=14, seed=0)).all()
    with pytest.raises(ValueError, match="needs a saliency map"):
        mask_image(picture(31, 17), strategy="semantic", ratio=0.5, square_pixels=14, seed=0)
    with pytest.raises(ValueError, match="'attention'"):
        mask_image(picture(31, 17), strategy="attention", ratio=0.5, square_pixels=14, seed=0)


@pytest.mark.parametrize("size", [(70, 42), (45, 30), (13, 9), (1, 1), (200, 3)])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (90, 140), (7, 301)])
def test_mean_saliency_is_that_of_the_stretched_map(size, shape):
    """Against the map repeated until pixels and entries of the map divide the same fine grid: no interpolation
    involved."""
    saliency = np.random.default_rng(1).random(shape) * 7 - 2
    (width, height), (h, w), square = size, shape, 14
    scaled = (saliency - saliency.min()) / max(saliency.max() - saliency.min(), 1e-300)
    means = mean_saliency(size, square, saliency)
    assert means.shape == (-(-height // square), -(-width // square))
    for row in range(means.shape[0]):
        lines = scaled.repeat(height, axis=0)[row * square * h : min((row + 1) * square, height) * h].mean(axis=0)
        for column in range(means.shape[1]):
            expected = lines.repeat(width)[column * square * w : min((column + 1) * square, width) * w].mean()
            assert means[row, column] == pytest.approx(expected, abs=1e-12)


def test_semantic_blackens_the_most_salient_squares():
    """A map of 4 x 6 known numbers over 6 x 4 squares, the last row and column ragged, at several ratios."""
    image = picture(6 * 14 - 5, 4 * 14 - 9)
    order = np.random.default_rng(2).permutation(24)
    # Its entries are no multiple of the squares' borders, so give it at pixel resolution.
    saliency = order.reshape(4, 6).repeat(14, axis=0).repeat(14, axis=1)[: image.height, : image.width]
    for ratio, count in ((0.001, 1), (0.1, 2), (0.6, 14), (0.9, 22), (1.0, 24)):
        masked = mask_image(image, strategy="semantic", ratio=ratio, square_pixels=14, seed=0, saliency=saliency)
        np.testing.assert_array_equal(black(masked)[::14, ::14], order.reshape(4, 6) >= 24 - count)
        again = mask_image(
            image, strategy="semantic", ratio=ratio, square_pixels=14, seed=1, saliency=saliency * 0.01 + 100
        )
        np.testing.assert_array_equal(masked, again)  # neither seed nor scale matter where nothing is tied
    least = mask_image(image, strategy="semantic", ratio=0.6, square_pixels=14, seed=0, saliency=-saliency)
    np.testing.assert_array_equal(black(least)[::14, ::14], order.reshape(4, 6) < 14)  # control: the sign decides


def test_ties_are_drawn():
    """A constant map is random masking of a fixed number; a plateau below a peak is drawn from, the peak never
    spared."""
    flat = np.full((37, 53), 0.1)
    drawn = [
        black_squares((140, 84), strategy="semantic", ratio=0.6, square_pixels=14, seed=s, saliency=flat)
        for s in range(2000)
    ]
    assert {int(squares.sum()) for squares in drawn} == {36}
    np.testing.assert_allclose(np.mean(drawn, axis=0), 0.6, atol=5 * (0.24 / 2000) ** 0.5)
    again = black_squares((140, 84), strategy="semantic", ratio=0.6, square_pixels=14, seed=3, saliency=flat)
    np.testing.assert_array_equal(drawn[3], again)
    assert (drawn[3] != drawn[4]).any()
    peak = np.full((6, 10), 0.3)
    peak[2, 7], peak[4] = 0.9, 0.0
    drawn = [
        black_squares((140, 84), strategy="semantic", ratio=0.1, square_pixels=14, seed=s, saliency=peak)
        for s in range(2000)
    ]
    share = np.mean(drawn, axis=0)
    assert share[2, 7] == 1 and (share[4] == 0).all()
    others = np.delete(share, 4, axis=0).ravel()
    np.testing.assert_allclose(np.delete(others, 27), 5 / 49, atol=5 * (5 / 49 / 2000) ** 0.5)


def encoded(array: np.ndarray, form: str, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array) if form == "NPY" else Image.fromarray(array).save(stream, form, **options)
    return stream.getvalue()


def test_every_kind_of_map():
    levels = np.random.default_rng(3).integers(0, 256, (7, 11), dtype=np.uint8)
    files = {
        "npy": encoded(levels.astype(np.float32) / 3, "NPY"),
        "npy of whole numbers": encoded(levels.astype(np.int64) - 90, "NPY"),
        "PNG": encoded(levels, "PNG"),
        "16-bit PNG": encoded(levels.astype(np.uint16) * 257, "PNG"),
        "float TIFF": encoded(levels.astype(np.float32), "TIFF"),
        "grey in RGB": encoded(np.stack([levels] * 3, axis=2), "PNG"),
        "grey with transparency": encoded(np.stack([levels, 255 - levels], axis=2), "PNG"),
    }
    expected = mean_saliency((50, 40), 14, levels)
    for name, content in files.items():
        values, kind = decode_saliency(content, name)
        assert values.dtype == np.float64 and values.shape == (7, 11)
        assert kind == {"npy": "NPY", "float": "TIFF"}.get(name.split()[0], "PNG")
        np.testing.assert_allclose(mean_saliency((50, 40), 14, values), expected, atol=1e-7, err_msg=name)
    assert np.abs(mean_saliency((50, 40), 14, levels[::-1]) - expected).max() > 0.1  # control


def test_bad_maps_are_refused():
    good, image = np.ones((4, 4)), io.BytesIO()
    picture(9, 9).save(image, "PNG")
    nan, infinite = good.copy(), good.copy()
    nan[1, 2], infinite[0, 0] = np.nan, -np.inf
    objects = io.BytesIO()
    np.save(objects, np.array([[{}]], dtype=object), allow_pickle=True)
    for content, message in {
        encoded(np.ones((1, 4, 4)), "NPY"): r"shape \(1, 4, 4\), expected a 2-D map",
        encoded(np.ones(16), "NPY"): r"shape \(16,\), expected a 2-D map",
        encoded(np.ones((0, 4)), "NPY"): r"shape \(0, 4\), expected a 2-D map",
        encoded(nan, "NPY"): "holds NaN, infinity",
        encoded(infinite, "NPY"): "holds NaN, infinity",
        encoded(good * [[-1e308], [1e308], [0], [0]], "NPY"): "a range beyond float64",
        encoded(good * 1j, "NPY"): "complex128, expected numbers",
        encoded(good.astype(str), "NPY"): "expected numbers",
        objects.getvalue(): "pickle.* cannot be read as a saliency map",
        encoded(good, "NPY")[:-8]: "cannot be read as a saliency map",
        encoded(good, "NPY")[:20]: "cannot be read as a saliency map",
        image.getvalue(): "a picture in colours",
        image.getvalue()[:60]: "cannot be read as a saliency map",
        b"": "cannot be read as a saliency map",
        b"hello": "cannot be read as a saliency map",
    }.items():
        with pytest.raises(UserError, match=f"^saliency map x: .*{message}") as error:
            decode_saliency(content, "saliency map x")
        assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path):
    for index, size in enumerate([(300, 150), (61, 200), (9, 11)]):
        picture(*size, seed=index).save(tmp_path / f"{index}.png")
        np.save(tmp_path / f"{index}.npy", np.random.default_rng(index).random((50 + index, 80)))
    return tmp_path


NAMES = ["0.png", "1.png", "2.png"]
MAPS = ["0.npy", "1.npy", "2.npy"]
SMALL = PictureSettings(3136, 50176)


def test_patch_space_is_aligned_to_vit_patches(folder):
    """A ViT patch is either untouched or all black, so a row of to_patches is either the original's or constant per
    channel."""
    masking = MaskedImageConfig(space="patch", square_pixels=14, ratio=0.6)
    originals = load_images(folder, NAMES, SMALL)
    masked = load_images(folder, NAMES, SMALL, masking=masking, seed=5)
    for original, image in zip(originals, masked):
        before, after = to_patches(original), to_patches(image)
        rows = after.reshape(len(after), 3, -1)
        constant = (rows == rows[:, :, :1]).all(axis=(1, 2))
        np.testing.assert_array_equal(after[~constant], before[~constant])
        assert abs(constant.mean() - 0.6) < 0.35 and constant.any()
    # Negative control: squares of 10 pixels cut through patches, so some are neither whole nor untouched.
    crossing = load_images(folder, NAMES, SMALL, masking=masking.model_copy(update={"square_pixels": 10}), seed=5)
    before, after = to_patches(originals[0]), to_patches(crossing[0])
    rows = after.reshape(len(after), 3, -1)
    assert (~(rows == rows[:, :, :1]).all(axis=(1, 2)) & (before != after).any(axis=1)).any()


def test_native_space_masks_before_the_resize(folder):
    masking = MaskedImageConfig(space="native", ratio=0.6)
    originals = load_images(folder, NAMES, SMALL)
    masked = load_images(folder, NAMES, SMALL, masking=masking, seed=11)
    in_patch_space = load_images(folder, NAMES, SMALL, masking=masking.model_copy(update={"space": "patch"}), seed=11)
    for original, native, patch in zip(originals, masked, in_patch_space):
        assert original.size == native.size
        assert (np.asarray(native) != np.asarray(original)).any()
        assert (np.asarray(native) != np.asarray(patch)).any()


def test_a_very_long_picture_keeps_its_size(folder):
    """At 28 x 3164 pixels it is over max_pixels even after the resize, so a second resize would shrink it again."""
    picture(50, 10000).save(folder / "long.png")
    original = load_images(folder, ["long.png"], SMALL)[0]
    assert original.size == (28, 3164) != resize(original, SMALL).size
    for space in ("native", "patch"):
        masked = load_images(folder, ["long.png"], SMALL, masking=MaskedImageConfig(space=space), seed=1)[0]
        assert masked.size == original.size and (np.asarray(masked) != np.asarray(original)).any()


def test_each_picture_of_a_prompt_has_its_own_mask(folder):
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes((folder / "0.png").read_bytes())
    for space in ("native", "patch"):
        first, second = load_images(folder, ["a.png", "b.png"], SMALL, masking=MaskedImageConfig(space=space), seed=2)
        assert (np.asarray(first) != np.asarray(second)).any()
        again, _ = load_images(folder, ["a.png", "b.png"], SMALL, masking=MaskedImageConfig(space=space), seed=2)
        np.testing.assert_array_equal(np.asarray(first), np.asarray(again))


@pytest.mark.parametrize("space", ["native", "patch"])
def test_semantic_from_files(folder, space):
    """Squares of the native picture or of the resized one; the second map belongs to the second picture."""
    masking = MaskedImageConfig(strategy="semantic", space=space, ratio=0.5)
    originals = (
        [Image.open(folder / name) for name in NAMES] if space == "native" else load_images(folder, NAMES, SMALL)
    )
    drawn = load_masked_images(folder, NAMES, SMALL, masking, seed=5, saliency=MAPS)
    for index, (original, (image, squares)) in enumerate(zip(originals, drawn)):
        means = mean_saliency(original.size, 14, np.load(folder / MAPS[index]))
        assert squares.sum() == max(1, round(0.5 * means.size))
        assert means[squares].min() > means[~squares].max(initial=-1)
        assert image.size == load_images(folder, NAMES, SMALL)[index].size
    swapped = load_masked_images(folder, NAMES, SMALL, masking, seed=5, saliency=[MAPS[1], MAPS[0], MAPS[2]])
    assert (swapped[0][1] != drawn[0][1]).any() and (swapped[1][1] != drawn[1][1]).any()


def test_semantic_needs_its_maps(folder):
    masking = MaskedImageConfig(strategy="semantic")
    for saliency in ([], MAPS[:2]):
        with pytest.raises(UserError, match="image 0.png: no saliency map, .*data.saliency_key"):
            load_images(folder, NAMES, SMALL, masking=masking, seed=1, saliency=saliency)
    with pytest.raises(UserError, match="saliency map 9.npy: no such file"):
        load_images(folder, NAMES[:1], SMALL, masking=masking, seed=1, saliency=["9.npy"])
    with pytest.raises(UserError, match="saliency map ../x.npy: outside the data root"):
        load_images(folder, NAMES[:1], SMALL, masking=masking, seed=1, saliency=["../x.npy"])
    assert (
        load_images(folder, [], SMALL, masking=masking, seed=1, saliency=[]) == []
    )  # a prompt without pictures needs none
    load_images(
        folder, NAMES, SMALL, masking=MaskedImageConfig(), seed=1, saliency=["9.npy"]
    )  # nor does another strategy

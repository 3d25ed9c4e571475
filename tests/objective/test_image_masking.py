"""Masked images: every square is drawn, ragged ones too; the same seed gives the same picture; the input stays as it is."""

import numpy as np
import pytest
from PIL import Image

from megatron_papo.config import MaskedImageConfig
from megatron_papo.images import load_images, to_patches
from megatron_papo.objective.image_masking import mask_image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random, and nowhere black: a black pixel in a masked copy was masked."""
    return Image.fromarray(np.random.default_rng(seed).integers(1, 256, (height, width, 3), dtype=np.uint8))


def black(image: Image.Image) -> np.ndarray:
    return (np.asarray(image) == 0).all(axis=2)


@pytest.mark.parametrize("size", [(70, 42), (45, 30), (13, 9), (1, 1), (14, 14), (200, 3)])
@pytest.mark.parametrize("square", [5, 14, 28])
def test_black_squares_on_the_grid_and_nothing_else(size, square):
    image = picture(*size)
    original = np.array(image)
    seen_change = False
    for seed in range(12):
        masked = mask_image(image, strategy="random", ratio=0.6, square_pixels=square, seed=seed)
        assert masked.size == size
        mask = black(masked)
        np.testing.assert_array_equal(np.asarray(masked)[~mask], original[~mask])
        for top in range(0, size[1], square):
            for left in range(0, size[0], square):
                cell = mask[top : top + square, left : left + square]
                assert cell.all() or not cell.any()
        seen_change |= bool(mask.any())
    np.testing.assert_array_equal(np.asarray(image), original)
    assert seen_change


def test_ratio_and_independence_on_a_real_size():
    """1003 x 777 pixels, 72 x 56 squares: the share of black squares is within 5 standard deviations of the ratio, edges included."""
    image = picture(1003, 777)
    for ratio in (0.3, 0.6, 0.9):
        mask = black(mask_image(image, strategy="random", ratio=ratio, square_pixels=14, seed=7))[::14, ::14]
        assert mask.shape == (56, 72)
        assert abs(mask.mean() - ratio) < 5 * (ratio * (1 - ratio) / mask.size) ** 0.5
        edge = np.concatenate([mask[-1], mask[:, -1]])
        assert abs(edge.mean() - ratio) < 5 * (ratio * (1 - ratio) / edge.size) ** 0.5
        neighbours = (mask[:, 1:] == mask[:, :-1]).mean()
        assert abs(neighbours - (ratio**2 + (1 - ratio) ** 2)) < 0.05


def test_one_square_is_black_with_probability_ratio():
    """A picture smaller than a square: the authors' code never masks it."""
    hits = [black(mask_image(picture(10, 8), strategy="random", ratio=0.6, square_pixels=14, seed=s)).all() for s in range(500)]
    assert abs(np.mean(hits) - 0.6) < 0.11


def test_seed_decides():
    image = picture(210, 140)

    def masked(seed):
        return np.asarray(mask_image(image, strategy="random", ratio=0.5, square_pixels=14, seed=seed))

    np.testing.assert_array_equal(masked(3), masked(3))
    assert (masked(3) != masked(4)).any()


def test_full_is_black_and_unknown_is_refused():
    assert black(mask_image(picture(31, 17), strategy="full", ratio=0.1, square_pixels=14, seed=0)).all()
    with pytest.raises(ValueError, match="semantic"):
        mask_image(picture(31, 17), strategy="semantic", ratio=0.5, square_pixels=14, seed=0)


@pytest.fixture
def folder(tmp_path):
    for index, size in enumerate([(300, 150), (61, 200), (9, 11)]):
        picture(*size, seed=index).save(tmp_path / f"{index}.png")
    return tmp_path


NAMES = ["0.png", "1.png", "2.png"]
LIMITS = (3136, 50176)


def test_patch_space_is_aligned_to_vit_patches(folder):
    """A ViT patch is either untouched or all black, so a row of to_patches is either the original's or constant per channel."""
    masking = MaskedImageConfig(space="patch", square_pixels=14, ratio=0.6)
    originals = load_images(folder, NAMES, *LIMITS)
    masked = load_images(folder, NAMES, *LIMITS, masking=masking, seed=5)
    for original, image in zip(originals, masked):
        before, after = to_patches(original), to_patches(image)
        rows = after.reshape(len(after), 3, -1)
        constant = (rows == rows[:, :, :1]).all(axis=(1, 2))
        np.testing.assert_array_equal(after[~constant], before[~constant])
        assert abs(constant.mean() - 0.6) < 0.35 and constant.any()
    # Negative control: squares of 10 pixels cut through patches, so some are neither whole nor untouched.
    crossing = load_images(folder, NAMES, *LIMITS, masking=masking.model_copy(update={"square_pixels": 10}), seed=5)
    before, after = to_patches(originals[0]), to_patches(crossing[0])
    rows = after.reshape(len(after), 3, -1)
    assert (~(rows == rows[:, :, :1]).all(axis=(1, 2)) & (before != after).any(axis=1)).any()


def test_native_space_masks_before_the_resize(folder):
    masking = MaskedImageConfig(space="native", ratio=0.6)
    originals = load_images(folder, NAMES, *LIMITS)
    masked = load_images(folder, NAMES, *LIMITS, masking=masking, seed=11)
    in_patch_space = load_images(folder, NAMES, *LIMITS, masking=masking.model_copy(update={"space": "patch"}), seed=11)
    for original, native, patch in zip(originals, masked, in_patch_space):
        assert original.size == native.size
        # 9 x 11 pixels are a single native square, which this seed leaves alone or blackens whole.
        assert (np.asarray(native) != np.asarray(original)).any() or original is originals[2]
        assert (np.asarray(native) != np.asarray(patch)).any()


def test_each_picture_of_a_prompt_has_its_own_mask(folder):
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes((folder / "0.png").read_bytes())
    for space in ("native", "patch"):
        first, second = load_images(folder, ["a.png", "b.png"], *LIMITS, masking=MaskedImageConfig(space=space), seed=2)
        assert (np.asarray(first) != np.asarray(second)).any()
        again, _ = load_images(folder, ["a.png", "b.png"], *LIMITS, masking=MaskedImageConfig(space=space), seed=2)
        np.testing.assert_array_equal(np.asarray(first), np.asarray(again))

"""Views other than black squares: what the vision tower sees of them really differs, follows from the seed, and is the
distortion that its name says. A view of each response, and none.

NOT covered here: log-probs after them (tests/training/test_papo_step.py has squares).
"""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.pictures import preprocess, views
from megatron_papo.training.rows import make_rows
from megatron_papo.training.views import rows_as_seen
from tests.helpers import DEMO_CONFIG
from tests.pictures.test_masked_pixels import LIMITS, collate, hf_of, per_image, rollout, work  # noqa: F401

VIEWS = ("noise", "diffusion", "blur", "grey")
APART = ["objective.masked_branch=cached", "evaluation.masked_images=false"]


@pytest.mark.parametrize("strategy", VIEWS)
@pytest.mark.parametrize("space", ["native", "resized", "patch"])
def test_every_picture_differs_and_a_seed_decides_where_chance_does(work, strategy, space):  # noqa: F811
    records = [rollout(work, name) for name in ("second", "fourth")]
    overrides = [f"masked_image.strategy={strategy}", f"masked_image.space={space}"]
    original, masked = (collate(work, records, *overrides, pictures=kind) for kind in ("original", "masked"))
    again = collate(work, records, *overrides, pictures="masked")
    other = collate(work, [rollout(work, "second", 6), rollout(work, "fourth", 6)], *overrides, pictures="masked")
    assert original.image_grids == masked.image_grids and masked.pixel_values.equal(again.pixel_values)
    assert all(not a.equal(b) for a, b in zip(per_image(original), per_image(masked), strict=True))
    assert masked.pixel_values.equal(other.pixel_values) == (strategy in ("blur", "grey"))


def test_strengths_reach_the_pixels(work):  # noqa: F811
    def pixels(*overrides):
        return collate(work, [rollout(work, "fourth")], *overrides, pictures="masked").pixel_values

    for strategy, key in (
        ("noise", "noise_deviation=9.0"),
        ("diffusion", "diffusion_step=300"),
        ("blur", "blur_pixels=2.0"),
    ):
        default = pixels(f"masked_image.strategy={strategy}")
        assert not default.equal(pixels(f"masked_image.strategy={strategy}", f"masked_image.{key}")), strategy


def test_noise_has_its_deviation_and_diffusion_its_two_shares():
    """On a large flat picture: what is drawn is what the formulas say, by loops."""
    flat = Image.new("RGB", (300, 200), (128, 128, 128))
    noise = np.asarray(views.noisy(flat, 20.0, 1)).astype(float) - 128
    assert noise.std() == pytest.approx(20.0, rel=0.01) and abs(noise.mean()) < 0.3
    a = 1.0
    for t in range(200):
        a *= 1 - ((5e-3 - 1e-5) / (1 + np.exp(6 - 12 * t / 999)) + 1e-5)
    dark = np.asarray(views.diffused(Image.new("RGB", (300, 200), (64, 64, 64)), 200, 2)).astype(float) / 127.5 - 1
    assert dark.mean() == pytest.approx(a**0.5 * (64 / 127.5 - 1), abs=0.005)
    assert dark.std() == pytest.approx((1 - a) ** 0.5, rel=0.05) and 0.05 < (1 - a) ** 0.5 < 0.3  # little is cut off


def test_blur_keeps_the_mean_and_grey_the_luma():
    generator = np.random.default_rng(3)
    picture = Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    before, after = (np.asarray(x).astype(float) for x in (picture, views.blurred(picture, 4.0)))
    assert after.mean() == pytest.approx(before.mean(), abs=1.5) and after.std() < before.std() / 5
    without = np.asarray(views.grey(picture)).astype(float)
    assert (without == without[..., :1]).all()
    np.testing.assert_allclose(without[..., 0], before @ [0.299, 0.587, 0.114], atol=1)


def test_resized_lies_between_the_two_resizes(work):  # noqa: F811
    """Of the published resize: squares of 14 px cut there are no squares of patches afterwards; smart has one step."""
    published = preprocess.PictureSettings(3136, 50176, resize="published")

    def masked(space, settings=published):
        config = load_config(DEMO_CONFIG, [f"masked_image.space={space}"])
        [picture] = preprocess.load_images(work, ["tall.png"], settings, config.masked_image, 7)
        return np.asarray(picture)

    steps = preprocess.sizes(75, 300, preprocess.PictureSettings(802816, 1605632, resize="published"))
    assert len(steps) == 2 and any(side % 28 for side in steps[0])
    large = preprocess.PictureSettings(802816, 1605632, resize="published")
    pixels = {space: masked(space, large) for space in ("native", "resized", "patch")}
    assert len({x.tobytes() for x in pixels.values()}) == 3 and len({x.shape for x in pixels.values()}) == 1
    smart = preprocess.PictureSettings(3136, 50176)
    assert (masked("resized", smart) == masked("patch", smart)).all()


def rows_of(work, records, *overrides):  # noqa: F811
    config = load_config(DEMO_CONFIG, [*LIMITS, *APART, *overrides])
    return config, make_rows(records, [0.0] * len(records), work, config, hf_of(work), work / "rollouts.jsonl")


def test_each_response_may_have_a_view_of_its_own(work):  # noqa: F811
    records = [rollout(work, "fourth", group=3, sample=sample) for sample in (0, 1)]
    hf = hf_of(work)
    for per, distinct in (("group", 1), ("response", 2)):
        config, rows = rows_of(work, records, f"masked_image.per={per}")
        seen = rows_as_seen(rows, "masked", config, hf)
        assert len({row.rollout.masked_image_seed for row in seen}) == distinct
        assert len({row.rollout.group for row in seen}) == distinct  # the group layout: a prompt each
        assert rows_as_seen(rows, "original", config, hf) == rows
        batch = collate(work, [row.rollout for row in seen], *APART, f"masked_image.per={per}", pictures="masked")
        assert len(batch.image_grids) == 3 * distinct
        first, second = per_image(batch)[:3], per_image(batch)[3:]
        assert all(a.equal(b) == (per == "group") for a, b in zip(first, second, strict=True))


def test_none_takes_the_pictures_out_of_the_prompt(work):  # noqa: F811
    hf = hf_of(work)
    record = rollout(work, "fourth")
    around = [x for token in record.prompt_token_ids for x in ([token] if token != hf.image_token_id else
              [hf.vision_start_token_id, token, hf.vision_end_token_id])]  # fmt: skip
    record = record.model_copy(update={"prompt_token_ids": around, "prompt_num_tokens": record.prompt_num_tokens + 6})
    config, rows = rows_of(work, [record], "masked_image.strategy=none")
    [seen] = rows_as_seen(rows, "masked", config, hf)
    assert seen.prompt_token_ids == [1, 2] and seen.grids == [] and seen.rollout.images == []
    assert seen.rollout.response_token_ids == record.response_token_ids
    [original] = rows_as_seen(rows, "original", config, hf)
    assert original.grids and original.prompt_token_ids.count(hf.image_token_id) > 3


@pytest.mark.parametrize(
    "overrides, problem",
    [
        (["masked_image.strategy=none", "evaluation.masked_images=false"], "cannot ride in the update"),
        (["masked_image.per=response"], "cannot ride in the update"),
        (
            [
                "objective.masked_branch=cached",
                "masked_image.per=response",
                "objective.sensitivity.formula=jsd",
                "objective.token_shaping={}",
            ],
            "compares both logits",
        ),
        (["kept_image={}"], "kept_image is read by"),
        (["objective.kl_kept_coef=0.1"], "need a kept picture"),
        (["kept_image={strategy: none}", "objective.kl_kept_coef=0.1"], "kept_image: strategy none"),
    ],
)
def test_views_that_exclude_each_other_are_said_at_the_start(overrides, problem):
    with pytest.raises((UserError, ValidationError), match=problem):
        load_config(DEMO_CONFIG, ["objective.masked_branch=recompute_with_grad", *overrides])
    with pytest.raises(UserError, match="needs pictures"):
        load_config(DEMO_CONFIG, ["masked_image.strategy=none"])
    with pytest.raises(UserError, match="train through every view"):
        load_config(DEMO_CONFIG, ["kept_image={}", "objective.contrast={}"])

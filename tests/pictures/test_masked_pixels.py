"""A masked image really is another image where the vision tower sees it: pixel_values as the Collator makes them from
rollout records. tools.masked_images draws the same pixels again.

NOT covered here: what the tower makes of them (tests/model), whether masked log-probs differ (test_papo_step.py).
"""

import base64
import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.pictures import preprocess
from megatron_papo.run.records import Prompt, Rewards, Rollout, write_jsonl
from megatron_papo.seeds import derive_seed
from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model
from megatron_papo.training.collator import Collator
from megatron_papo.training.rows import make_rows
from tests.helpers import DEMO_CONFIG, run_module, settings

SIZES = {
    "one pixel": (1, 1),
    "small": (9, 11),
    "below a square": (13, 27),
    "tall": (75, 300),
    "wide": (321, 45),
    "line": (3, 600),
    "very long": (50, 9000),
    "large": (980, 728),
}
PROMPTS = {
    "first": ["one pixel"], "second": ["small", "below a square"], "third": [], "fourth": ["tall", "wide", "tall"],
    "fifth": ["line", "very long"], "sixth": ["large"],
}  # fmt: skip
STRATEGIES, SPACES = ("random", "semantic", "full"), ("native", "patch")
LARGE = 52 * 70
"""Patches of "large", which is not resized within these limits."""
LIMITS = ["data.min_pixels=3136", "data.max_pixels=802816"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Pictures that are nowhere black, maps of another resolution, a tiny model's configuration."""
    work, rng = tmp_path_factory.mktemp("masked_pixels"), np.random.default_rng(4)
    make_tiny_model(work / "model", seed=1, sizes=TinySizes(num_layers=1, vision_depth=2))
    for name, (width, height) in SIZES.items():
        Image.fromarray(rng.integers(40, 256, (height, width, 3), dtype=np.uint8)).save(work / f"{name}.png")
        np.save(work / f"{name}.npy", rng.random((23, 31)))
    return work


def hf_of(work):
    return read_hf_config(work / "model")


def rollout(work, prompt_id: str, seed: int = 5, epoch: int = 0, group: int = 0, sample: int = 0) -> Rollout:
    names, token = PROMPTS[prompt_id], hf_of(work).image_token_id
    settings = preprocess.PictureSettings(3136, 802816)
    tokens = sum(
        preprocess.num_image_tokens(preprocess.grid_of(preprocess.load_images(work, [f"{name}.png"], settings)[0]))
        for name in names
    )
    return Rollout(
        prompt_id=prompt_id, iteration=1, epoch=epoch, group=group, sample=sample, answer="1",
        prompt_token_ids=[1, *[token] * len(names), 2], prompt_num_tokens=2 + tokens,
        images=[f"{name}.png" for name in names], saliency=[f"{name}.npy" for name in names],
        response_token_ids=[3, 4], rollout_log_probs=[0.0, 0.0], text="", finish_reason="stop",
        rewards=Rewards(overall=1.0, accuracy=1.0, format=1.0), temperature=1.0, top_p=1.0, sampling_seed=0,
        masked_image_seed=derive_seed(seed, "masked_image", prompt_id, epoch), weight_version="w",
    )  # fmt: skip


def collate(work, rollouts: list[Rollout], *overrides: str, pictures: str):
    config = load_config(DEMO_CONFIG, [*LIMITS, *overrides])
    rows = make_rows(rollouts, [0.0] * len(rollouts), work, config, hf_of(work), work / "rollouts.jsonl")
    return Collator(
        config, hf_of(work), work, with_pixels=True, device=torch.device("cpu"), dtype=torch.float32
    ).collate(rows, pictures)


def masking(strategy: str, space: str, ratio: float = 0.6) -> list[str]:
    return [f"masked_image.strategy={strategy}", f"masked_image.space={space}", f"masked_image.ratio={ratio}"]


def per_image(batch) -> list[torch.Tensor]:
    """Of every place for a picture, in reading order: what the tower saw."""
    distinct = batch.pixel_values.split([rows * columns for _, rows, columns in batch.image_grids])
    return [distinct[picture] for picture in batch.pictures]


def assert_every_image_is_masked(original, masked) -> None:
    assert [original.image_grids[i] for i in original.pictures] == [masked.image_grids[i] for i in masked.pictures]
    assert original.input_ids.equal(masked.input_ids)
    for number, (before, after) in enumerate(zip(per_image(original), per_image(masked), strict=True)):
        assert not before.equal(after), f"image {number} is the same with and without mask"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("ratio", [0.05, 0.6])
def test_every_image_differs(work, strategy, space, ratio):
    """Tiny, long and several pictures per prompt, two rollouts of one prompt, a prompt without pictures, all in one
    micro-batch."""
    rollouts = [rollout(work, name) for name in ("first", "second", "second", "third", "fourth", "fifth")]
    original = collate(work, rollouts, *masking(strategy, space, ratio), pictures="original")
    masked = collate(work, rollouts, *masking(strategy, space, ratio), pictures="masked")
    assert len(original.pictures) == 1 + 2 + 2 + 0 + 3 + 2
    assert (
        len(original.image_grids) == 1 + 2 + 0 + 3 + 2
    )  # the second prompt's two rollouts share what passes the tower
    assert_every_image_is_masked(original, masked)
    first, second = per_image(masked)[1:3], per_image(masked)[3:5]
    assert all(a.equal(b) for a, b in zip(first, second))  # a group shares its masks
    if strategy == "random":
        assert not per_image(masked)[5].equal(per_image(masked)[7])  # the same picture twice in a prompt: two masks


def test_twins_carry_both(work):
    rollouts = [rollout(work, name) for name in ("second", "fourth")]
    both = collate(work, rollouts, pictures="both")
    apart = [collate(work, rollouts, pictures=kind).pixel_values for kind in ("original", "masked")]
    assert both.has_twins and both.pixel_values.equal(torch.cat(apart)) and both.image_grids[:5] == both.image_grids[5:]


def masks_a_copy(image, squares, square_pixels):
    """The defect: the masked copy is dropped and the picture returned."""
    pixels = np.array(image)
    pixels[:] = 0
    return image


@pytest.mark.parametrize("space", SPACES)
def test_a_mask_that_is_dropped_is_caught(work, space, monkeypatch):
    """Negative control of the assertion above; so is one that masks all pictures of a prompt but one."""
    rollouts = [rollout(work, name) for name in ("first", "second")]
    original = collate(work, rollouts, *masking("full", space), pictures="original")
    blacken = preprocess.blacken
    monkeypatch.setattr(preprocess, "blacken", masks_a_copy)
    with pytest.raises(AssertionError, match="image 0 is the same"):
        assert_every_image_is_masked(original, collate(work, rollouts, *masking("full", space), pictures="masked"))
    some = iter([blacken, masks_a_copy, blacken])
    monkeypatch.setattr(preprocess, "blacken", lambda *arguments: next(some)(*arguments))
    with pytest.raises(AssertionError, match="image 1 is the same"):
        assert_every_image_is_masked(original, collate(work, rollouts, *masking("full", space), pictures="masked"))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.9])
def test_share_of_changed_patches_is_the_ratio(work, space, ratio):
    """On a picture of 3640 patches that needs no resize, so that native squares are patches too. random: within 5
    standard deviations."""

    def changed(strategy):
        record, drawn = [rollout(work, "sixth")], masking(strategy, space, ratio)
        original, masked = (collate(work, record, *drawn, pictures=kind) for kind in ("original", "masked"))
        assert original.pixel_values.shape == (LARGE, 1176)
        return int((original.pixel_values != masked.pixel_values).any(dim=1).sum())

    assert abs(changed("random") / LARGE - ratio) < 5 * (ratio * (1 - ratio) / LARGE) ** 0.5
    assert changed("semantic") == round(ratio * LARGE)
    assert changed("full") == LARGE


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("space", SPACES)
def test_seed_decides_where_chance_does(work, strategy, space):
    def pixels(*of):
        return collate(work, [rollout(work, *of)], *masking(strategy, space), pictures="masked").pixel_values

    assert pixels("fourth", 5).equal(pixels("fourth", 5))
    for other in (("fourth", 6), ("fourth", 5, 1)):
        assert pixels("fourth", 5).equal(pixels(*other)) == (strategy != "random")


def test_foundreach_the_pixels(work):
    """Each of the four fields, and the map, gives other pixels."""

    def pixels(*overrides, **changes):
        record = rollout(work, "fourth").model_copy(update=changes)
        return collate(work, [record], *overrides, pictures="masked").pixel_values

    found = {
        "base": pixels(*masking("random", "patch")),
        "strategy": pixels(*masking("semantic", "patch")),
        "space": pixels(*masking("random", "native")),
        "ratio": pixels(*masking("random", "patch", 0.5)),
        "square": pixels(*masking("random", "patch"), "masked_image.square_pixels=28"),
        "map": pixels(*masking("semantic", "patch"), saliency=["small.npy", "wide.npy", "line.npy"]),
    }
    names = list(found)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not found[first].equal(found[second]), (first, second)


@pytest.mark.parametrize("strategy", ["random", "semantic"])
def test_evaluation_shows_the_server_the_same_masks(work, strategy):
    """Stage 7's data URIs of a masked prompt, decoded, are what the Collator makes of the same seed and maps."""
    from megatron_papo.rollout.pictures import Pictures

    record, overrides = rollout(work, "fourth"), masking(strategy, "native")
    prompt = Prompt(
        id="fourth", problem="?", answer="1", token_ids=record.prompt_token_ids, num_tokens=record.prompt_num_tokens,
        images=record.images, saliency=record.saliency,
    )  # fmt: skip
    config = load_config(DEMO_CONFIG, [*LIMITS, *overrides])
    loader = Pictures(work, preprocess.PictureSettings.of(config.data), config.masked_image, kept=2)

    def shown(seed, **changes):
        uris = loader.of(prompt.model_copy(update=changes), seed)()
        pictures = [Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) for uri in uris]
        return np.concatenate([preprocess.to_patches(picture) for picture in pictures])

    masked = collate(work, [record], *overrides, pictures="masked").pixel_values.numpy()
    np.testing.assert_array_equal(shown(record.masked_image_seed), masked)
    assert (shown(None) != masked).any()
    other_maps = shown(record.masked_image_seed, saliency=["line.npy"] * 3)
    assert (other_maps != masked).any() == (strategy == "semantic")


def test_semantic_without_maps_stops_before_training(work):
    record = rollout(work, "second").model_copy(update={"saliency": []})
    with pytest.raises(UserError, match="image small.png: no saliency map, which masked_image.strategy semantic needs"):
        collate(work, [record], *masking("semantic", "patch"), pictures="original")
    no_masks = ["objective.kl_prcp_coef=0", "objective.masked_image_entropy_coef=0"]
    collate(work, [record], *masking("semantic", "patch"), *no_masks, pictures="original")
    collate(work, [record], *masking("random", "patch"), pictures="masked")


def test_every_prompt_epoch_and_run_has_its_seed():
    """The records of stage 4: one seed per (run seed, prompt, epoch), whatever the iteration and the place in the
    batch."""
    from megatron_papo.rollout.groups import Graded, Group, rollout_records
    from megatron_papo.sglang.answers import Sample
    from megatron_papo.sglang.requests import ANY_TOKENS, Request, Sampling

    def seeds(run_seed: int, prompt_id: str, epoch: int, iteration: int = 1) -> set[int]:
        prompt = Prompt(
            id=prompt_id, problem="?", answer="1", token_ids=[1], num_tokens=1, images=[], saliency=["a.npy"]
        )
        graded = Graded(Sample.of([2], [-1.0], "stop", "w"), "text", Rewards(overall=1.0, accuracy=1.0, format=1.0))
        group = Group(epoch, [Request(prompt, number, list, sample=number) for number in range(3)], [graded] * 3)
        sampling = Sampling(1.0, 1.0, -1, 8, ANY_TOKENS)
        records = list(rollout_records([group], sampling, seed=run_seed, iteration=iteration, staleness=0))
        assert all(record.saliency == ["a.npy"] for record in records)
        return {record.masked_image_seed for record in records}

    base = seeds(1, "p", 0)
    assert base == {derive_seed(1, "masked_image", "p", 0)} == seeds(1, "p", 0, iteration=2)
    distinct = base | seeds(2, "p", 0) | seeds(1, "q", 0) | seeds(1, "p", 1)
    assert len(distinct) == 4


@pytest.fixture(scope="module")
def published(work, tmp_path_factory):
    """The same pictures and rollouts as stages 1 and 4 publish them."""
    from megatron_papo.run.stage_output import StageOutput

    root = tmp_path_factory.mktemp("published")
    with StageOutput("stage1_prepare_data", root / "data", {}, {}) as out:
        for name in SIZES:
            for file in (work / f"{name}.png", work / f"{name}.npy"):
                (out.partial / file.name).write_bytes(file.read_bytes())
    with StageOutput("stage4_rollout", root / "rollouts", {}, {}) as out:
        groups = enumerate(["second", "third", "fourth"])
        records = [rollout(work, name, group=group, sample=sample) for group, name in groups for sample in range(2)]
        write_jsonl(out.partial / "rollouts.jsonl", records)
    return root


def draw(published, output, overrides, *more):
    paths = [
        "--config",
        DEMO_CONFIG,
        "--data",
        published / "data",
        "--rollouts",
        published / "rollouts",
        "--output",
        output,
    ]
    return run_module("tools.masked_images", *paths, *settings(*LIMITS, *overrides), *more)


@pytest.mark.parametrize("strategy, space", [("random", "native"), ("semantic", "patch")])
def test_the_tool_draws_what_the_collator_fed(work, published, tmp_path, strategy, space):
    output, overrides = tmp_path / "pictures", masking(strategy, space)
    result = draw(published, output, overrides)
    assert result.returncode == 0, result.stderr
    expected = {}
    for line, prompt_id in ((1, "second"), (5, "fourth")):  # line 3 is a prompt without pictures
        for kind in ("original", "masked"):
            batch = collate(work, [rollout(work, prompt_id)], *overrides, pictures=kind)
            expected |= {
                f"line{line:06}_image{number}_{kind}.png": pixels for number, pixels in enumerate(per_image(batch))
            }
    assert {file.name for file in output.iterdir()} == expected.keys()
    for name, pixels in expected.items():
        np.testing.assert_array_equal(preprocess.to_patches(Image.open(output / name)), pixels.numpy(), err_msg=name)
    # Negative control: another seed draws something else.
    other = collate(work, [rollout(work, "fourth", seed=6)], *masking("random", space), pictures="masked")
    assert (
        preprocess.to_patches(Image.open(output / "line000005_image0_masked.png")) != per_image(other)[0].numpy()
    ).any()
    lines = result.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        str(output / name) for name in sorted(expected) if "masked" in name
    ]
    if space == "patch":  # 14-pixel squares of the resized picture, which is nowhere black, are its patches
        for line in lines:
            path, share = line.split(": ")
            stem = path.rsplit("/", 1)[1].removesuffix("_masked.png")
            changed = (expected[f"{stem}_masked.png"] != expected[f"{stem}_original.png"]).any(dim=1).float().mean()
            assert float(share.split()[0]) == pytest.approx(float(changed), abs=5e-5)


def test_a_run_and_an_iteration_are_all_the_tool_needs(published, tmp_path):
    from megatron_papo.run.run_config import write_run
    from megatron_papo.run.run_directory import RunDirectory

    overrides = masking("random", "patch")
    run = RunDirectory(tmp_path / "run", load_config(DEMO_CONFIG, [*LIMITS, *overrides]))
    write_run(run, [], "a test")
    shutil.copytree(published / "data", run.data)
    shutil.copytree(published / "rollouts", run.rollouts(2))
    outputs = tmp_path / "by run", tmp_path / "by hand"
    command = ["--run", run.root, "--iteration", 2, "--line", 1, "--output", outputs[0]]
    by_run = run_module("tools.masked_images", *command)
    assert by_run.returncode == 0, by_run.stderr
    assert draw(published, outputs[1], overrides, "--line", 1).returncode == 0
    pictures = [{file.name: file.read_bytes() for file in output.iterdir()} for output in outputs]
    assert pictures[0] == pictures[1] and len(pictures[0]) > 0
    missing = run_module("tools.masked_images", *command[:3], 1, "--output", tmp_path / "none")
    assert missing.returncode == 2 and "stages.stage4_rollout --run" in missing.stderr
    for wrong in (["--run", run.root], ["--run", run.root, "--iteration", 2, "--data", run.data]):
        refused = run_module("tools.masked_images", *wrong, "--output", tmp_path / "none")
        assert refused.returncode == 2 and "give --run and --iteration, or" in refused.stderr
    assert not (tmp_path / "none").exists()


def test_the_tool_draws_chosen_lines_and_refuses_others(published, tmp_path):
    result = draw(published, tmp_path / "some", [], "--line", 6, "--line", 3)
    assert result.returncode == 0, result.stderr
    assert {file.name.split("_")[0] for file in (tmp_path / "some").iterdir()} == {"line000006"}
    for output, overrides, more, message in (
        ("some", [], [], "some: is there already: remove it or choose another --output"),
        ("none", [], ["--line", 7], "--line 7: "),
        ("none", ["masked_image.ratio=2"], [], "masked_image.ratio"),
    ):
        result = draw(published, tmp_path / output, overrides, *more)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and message in result.stderr
        assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["some"]

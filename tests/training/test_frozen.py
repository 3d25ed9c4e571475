"""model.freeze in one process: what is frozen stays, the rest trains as before, and a frozen tower encodes each picture
once without a bit of difference.

NOT covered here: gradients and checkpoints in other layouts (tests/training/test_papo_step.py).
"""

import pytest
import torch

from megatron_papo.checkpoint import convert
from megatron_papo.config_files import load_config
from megatron_papo.distributed import process_groups
from megatron_papo.errors import UserError
from megatron_papo.model.freezing import is_frozen
from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model
from megatron_papo.training.accounting import vision_flops
from tests.helpers import DEMO_CONFIG
from tests.training.iteration import GROUP, METRICS, STEPS, Iteration

PARTS = {
    "vision_tower": "vision_model.",
    "merger": "vision_model.merger_",
    "embeddings": "language_model.embedding.",
}
"""Prefixes that hold them, written down anew."""


@pytest.fixture
def make(tmp_path):
    """Iterations from the same weights on the same rollouts; one at a time."""
    made = []

    def make_one(*settings, layout="group"):
        if made:
            process_groups.destroy()
        made.append(Iteration(tmp_path, layout, *settings))
        return made[-1]

    yield make_one
    process_groups.destroy()


def named(iteration):
    return {name: weight.detach().clone() for name, weight in iteration.policy.model.module.named_parameters()}


def moved(before, after):
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


def test_a_frozen_part_keeps_its_bits_and_the_rest_trains(make):
    everything = make()
    metrics, _ = everything.train()
    trained = named(everything)
    everything.policy.load(everything.megatron)
    start = named(everything)
    assert moved(start, trained) == set(start)  # the control: all of it moves, weight decay reaches all

    some = make("model.freeze=[vision_tower,embeddings]")
    of_frozen, _ = some.train()
    frozen = {name for name in start if name.startswith((PARTS["vision_tower"], PARTS["embeddings"]))}
    frozen -= {name for name in start if name.startswith(PARTS["merger"])}
    assert frozen and moved(start, named(some)) == set(start) - frozen
    held = sum(weight.numel() for group in some.policy.optimizer.param_groups for weight in group["params"])
    assert held == sum(weight.numel() for name, weight in start.items() if name not in frozen)
    for name in METRICS[:-1]:  # what the network says does not change, up to rounding: pictures are encoded alone
        assert of_frozen[0][name] == pytest.approx(metrics[0][name], rel=1e-5, abs=1e-6), name
    assert of_frozen[0]["gradient_norm"] < metrics[0]["gradient_norm"]


def test_pictures_are_encoded_once_to_the_same_bits(make):
    """6 pictures and their masked ones: with room for all, for none, and for about half."""
    found, encoded, room = {}, {}, {"all": 8.0, "none": 0.0}
    for name in ("all", "none", "half"):
        iteration = make("model.freeze=[vision_tower]", f"training.encoded_picture_gigabytes={room[name]}")
        found[name] = iteration.train()
        pictures = iteration.policy.encoded_pictures
        encoded[name] = len(pictures.take_encoded())
        kept = sum(tensor.nbytes for tensors in pictures._kept.values() for tensor in tensors)
        assert kept == pictures._bytes <= room[name] * 1e9 and (kept > 0) == (room[name] > 0)
        if name == "all":
            room["half"] = kept / 2e9
            again = iteration.train(load=False)  # the next iteration shows them again
            assert pictures.take_encoded() == [] and again[0][0]["loss"] != found["all"][0][0]["loss"]
            iteration.policy.load(iteration.megatron)
            assert len(pictures._kept) == 0  # another checkpoint may hold another tower
    assert encoded["all"] == 2 * STEPS * 2 < encoded["half"] <= encoded["none"]
    for metrics, weights in found.values():
        assert metrics == found["all"][0] and torch.equal(weights, found["all"][1])


def test_what_a_frozen_tower_saves_is_not_accounted_for(make):
    """An update: its forward and backward pass, and the gradient of what goes into the merger. Its patches: each once,
    in the sweeps."""
    whole = make()
    vision, step = whole.passes.hf.vision, whole.passes.steps[0]
    cell = vision.spatial_merge_size**2 * vision.hidden_size
    tower, inputs, patches = 0, 0, 0
    for row in step.all[::GROUP]:
        for grid in row.grids:
            cells = grid[1] * grid[2] // vision.spatial_merge_size**2
            tower += vision_flops(vision, grid) - cells * 2 * cell * (cell + vision.out_hidden_size)
            inputs += cells * 2 * cell**2
            patches += grid[1] * grid[2]
    expected = whole.passes.account_step(step, 1.0)
    assert expected["patches_computed"] == patches

    frozen = make("model.freeze=[vision_tower]")
    got = frozen.passes.account_step(frozen.passes.steps[0], 1.0)
    assert got["patches_computed"] == 0 and expected["model_flops"] - got["model_flops"] == 3 * tower + inputs
    frozen.train()
    got = frozen.passes.account_step(frozen.passes.steps[0], 1.0)
    assert got["patches_computed"] == 2 * STEPS * patches  # pictures of one size; they and the masked ones
    assert frozen.passes.account_step(frozen.passes.steps[0], 1.0)["patches_computed"] == 0

    nothing = make("model.freeze=[vision_tower,merger]")
    merger = patches // vision.spatial_merge_size**2 * 2 * cell * (cell + vision.out_hidden_size)
    got = nothing.passes.account_step(nothing.passes.steps[0], 1.0)
    assert expected["model_flops"] - got["model_flops"] == 3 * tower + 2 * merger


def test_a_reference_with_another_tower_sees_for_itself(make, tmp_path):
    make_tiny_model(tmp_path / "other", seed=2, sizes=TinySizes(initializer_range=0.15, random_biases_and_norms=True))
    (tmp_path / "other_megatron").mkdir()
    convert.hf_to_megatron(convert.HFCheckpoint(tmp_path / "other"), tmp_path / "other_megatron")
    found = []
    for settings in (["model.freeze=[vision_tower]"], []):
        iteration = make(*settings)
        iteration.policy._reference = None
        iteration.policy.load_reference(tmp_path / "other_megatron")
        found.append(iteration.train()[0])
    assert found[0][0]["kl_ref"] == pytest.approx(found[1][0]["kl_ref"], rel=1e-5) and found[0][0]["kl_ref"] > 0.01
    assert found[0][0]["kl_prcp"] == pytest.approx(found[1][0]["kl_prcp"], rel=1e-5)


@pytest.mark.parametrize("distributed", ["false", "true"])
def test_training_resumes_from_a_checkpoint_in_the_same_bits(make, tmp_path, distributed):
    iteration = make("model.freeze=[vision_tower,merger,embeddings]", f"optimizer.distributed={distributed}")
    policy, passes = iteration.policy, iteration.passes
    policy.load(iteration.megatron)
    reference = passes.sweep_reference(policy)
    constants = [one | other for one, other in zip(reference, passes.sweep_policy(policy.model)[0], strict=True)]
    for number in (0, 1):
        iteration.step(number, constants[number])
    policy.save(tmp_path / "saved", tmp_path / "saved")
    iteration.step(2, constants[2])
    expected = iteration.weights()
    policy.load(tmp_path / "saved")
    iteration.step(2, constants[2])
    assert torch.equal(iteration.weights(), expected)


def test_the_tied_copy_of_the_embeddings_is_frozen_with_them():
    copy = "language_model.output_layer.weight"
    assert is_frozen(copy, ["embeddings"], tied=True)
    assert not is_frozen(copy, ["embeddings"], tied=False) and not is_frozen(
        copy, ["vision_tower", "merger"], tied=True
    )


def test_configuration_mistakes():
    with pytest.raises(UserError, match="model.freeze"):
        load_config(DEMO_CONFIG, ["model.freeze=[tower]"])
    spread = ["parallel.vision_tower=spread"]
    with pytest.raises(UserError, match="needs merger, too"):
        load_config(DEMO_CONFIG, [*spread, "model.freeze=[vision_tower]"])
    load_config(DEMO_CONFIG, [*spread, "model.freeze=[vision_tower,merger]"])
    load_config(DEMO_CONFIG, [*spread, "model.freeze=[merger]"])

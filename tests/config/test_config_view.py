"""The view of the configuration: a stage reads what it lists, and nothing else."""

import pytest

from megatron_papo.config import Config, RewardConfig, leaf_keys, value_of
from megatron_papo.config_files import load_config
from megatron_papo.config_view import KeyNotListed, view
from tests.helpers import DEMO_CONFIG

STAGE = "stage4_rollout"


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(
        DEMO_CONFIG,
        [
            "rollout.dynamic_sampling={max_rounds: 7}",
            "objective.kl_prcp_annealing={steps: 9}",
            "objective.kl_prcp_tokens={sensitivity_share: 0.5}",
            "objective.policy_tokens={entropy_share: 0.5}",
            "objective.trajectory_shaping={}",
            "objective.token_shaping={}",
            "objective.response_shaping={}",
            "objective.contrast={}",
            "objective.masked_branch=recompute_with_grad",
            "kept_image={}",
            "evaluation.masked_image={}",
        ],
    )


def test_listed_keys_read_as_in_the_whole_configuration(config):
    seen = view(
        config, ["seed", "reward", "data.min_pixels", "sft.steps", "rollout.dynamic_sampling.max_rounds"], STAGE
    )
    assert seen.seed == config.seed
    assert seen.reward is config.reward and isinstance(seen.reward, RewardConfig)
    assert seen.reward.model_dump() == config.reward.model_dump()
    assert seen.data.min_pixels == config.data.min_pixels
    assert seen.sft.steps == 60
    assert seen.rollout.dynamic_sampling.max_rounds == 7


def test_a_null_section_of_which_a_part_is_listed_is_null(config):
    without = load_config(DEMO_CONFIG, ["sft=null", "data.sft=null"])
    assert view(without, ["sft.steps"], STAGE).sft is None
    assert value_of(without, "sft.steps") is None


@pytest.mark.parametrize("key", leaf_keys())
def test_every_key_is_readable_where_listed_and_refused_where_not(config, key):
    """One key listed, then all others listed: the same read succeeds and fails."""

    def read(seen):
        for name in key.split("."):
            seen = getattr(seen, name)
        return seen

    assert read(view(config, [key], STAGE)) == read(config)
    with pytest.raises(KeyNotListed) as caught:
        read(view(config, [other for other in leaf_keys() if other != key], STAGE))
    assert str(caught.value).startswith(f"{STAGE} reads {key}, which")


def test_a_section_of_which_nothing_is_listed_is_refused_at_its_own_name(config):
    with pytest.raises(KeyNotListed, match=f"^{STAGE} reads objective, which its entry in the table of stages"):
        _ = view(config, ["seed"], STAGE).objective


def test_properties_reach_listed_keys_only(config):
    seen = view(
        config,
        [
            "rollout.rollout_batch_size",
            "objective.kl_ref_coef",
            "data.evaluation",
            "evaluation.benchmarks",
            "evaluation.source",
        ],
        STAGE,
    )
    assert seen.objective.uses_reference is True
    assert seen.evaluation_sets["evaluation"].count == 256
    with pytest.raises(KeyNotListed, match="reads rollout.over_sampling"):
        _ = seen.rollout.drawn_prompts
    with pytest.raises(KeyNotListed, match="reads objective.kl_prcp_coef"):
        _ = seen.objective.uses_masked_image
    seen = view(config, ["rollout.rollout_batch_size", "rollout.over_sampling"], STAGE)
    assert seen.rollout.drawn_prompts == config.rollout.drawn_prompts


@pytest.mark.parametrize("whole", [lambda part: part.model_dump(), list, lambda part: part == part, hash])
def test_a_section_listed_in_part_is_not_read_whole(config, whole):
    with pytest.raises((KeyNotListed, TypeError)):
        whole(view(config, ["model.path"], STAGE).model)
    whole(view(config, ["data"], STAGE).data.train)  # the control: a real section


def test_neither_hasattr_nor_a_default_hides_a_key_that_is_not_listed(config):
    seen = view(config, ["seed"], STAGE)
    with pytest.raises(KeyNotListed):
        hasattr(seen, "objective")
    with pytest.raises(KeyNotListed):
        getattr(seen, "objective", None)
    assert not hasattr(seen, "objectiv")


def test_nothing_can_be_written_through_a_view(config):
    with pytest.raises(ValueError, match="frozen"):
        view(config, ["seed"], STAGE).seed = 2


def test_a_key_that_the_schema_lacks_cannot_be_listed(config):
    for key in ("sead", "rollout.sead", "seed.x", ""):
        with pytest.raises(KeyError, match="no such key"):
            view(config, [key], STAGE)


def test_a_view_can_be_printed(config):
    seen = view(config, ["model.path"], STAGE)
    assert repr(seen.model) == "<ModelConfig as stage4_rollout may read it: path>"

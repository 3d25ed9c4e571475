"""Configuration files: what is read, and what is refused with which line."""

from pathlib import Path

import pytest
import yaml

from megatron_papo.config import DataConfig
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = CONFIGS / "demo.yaml"


def test_overrides_are_yaml_values():
    config = load_config(
        DEMO, ["optimizer.learning_rate=1e-6", "sft.zero_stage=3", "data.system_prompt=null", "data.problem_key=q"]
    )
    assert config.optimizer.learning_rate == 1e-6
    assert config.sft.zero_stage == 3
    assert config.data.system_prompt is None
    assert config.data.problem_key == "q"
    assert load_config(DEMO).optimizer.learning_rate != 1e-6


def test_dynamic_sampling_and_overlong_settings_at_their_limits():
    """Controls of the refusals below."""
    config = load_config(
        DEMO, ["rollout.dynamic_sampling={generation_batch_size: 17}", "reward.soft_overlong_buffer_tokens=20"]
    )
    assert config.rollout.prompts_per_round == 17
    config = load_config(DEMO, ["rollout.dynamic_sampling={lowest_accuracy: 0.51, highest_accuracy: 0.63}"])  # 5 of 8
    assert config.rollout.prompts_per_round == load_config(DEMO).rollout.prompts_per_round == 336


@pytest.mark.parametrize("text", ["1e-6", "1E6", "2e+3", ".5e1", "3.e2"])
def test_exponents_without_a_point_are_numbers(text):
    """Plain YAML 1.1 reads 1e-6 as a string (the control)."""
    assert isinstance(yaml.safe_load("1e-6"), str)
    assert load_config(DEMO, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == float(text)


def test_the_published_prompt_is_the_default():
    template = DataConfig.model_fields["prompt_template"].default
    assert template.format(problem="P") == (
        "P\n\nYou first think through the reasoning process as an internal monologue, enclosed within <think> </think>"
        " tags. "
        "Then, provide your final answer enclosed within \\boxed{}."
    )


@pytest.mark.parametrize(
    "override, expected",
    [
        ("optimizr.learning_rate=1", "unknown key optimizr: did you mean optimizer?"),
        ("optimizer.learning_rte=1", "unknown key optimizer.learning_rte: did you mean learning_rate?"),
        ("data.train.cuont=3", "unknown key data.train.cuont: did you mean count?"),
        ("sft.zero_stge=3", "unknown key sft.zero_stge: did you mean zero_stage?"),
        ("objective.zzz=1", "unknown key objective.zzz: known keys: advantage"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: Input should be a valid number"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: Input should be greater than 0 (got 0)"),
        ("parallel.sequence_parallel=1", "parallel.sequence_parallel: Input should be a valid boolean (got 1)"),
        ("model.dtype=float16", "model.dtype: Input should be 'float32' or 'bfloat16' (got 'float16')"),
        (
            "rollout.rollout_batch_size=250",
            "rollout.rollout_batch_size 250 is not a multiple of training.global_batch_size",
        ),
        ("parallel.data_parallel_size=3", "rollouts cannot be split over data_parallel_size 3"),
        ("sft=null", "sft and data.sft go together"),
        ("data.min_pixels=99999999", "min_pixels 99999999 is larger than max_pixels"),
        ("data.prompt_template=hello", "prompt_template does not contain {problem}"),
        ("data.prompt_template='{problem} {}'", "prompt_template is not a format string"),
        ("data.train.source=x.jsonl", "model.path is null, which is only possible with the synthetic task"),
        ("rollout.group_size=1", "rollout.group_size: Input should be greater than 1 (got 1)"),
        (
            "rollout.dynamic_sampling={generation_batch_size: 16}",
            "cannot fill rollout_batch_size 336 in max_rounds 20 of 16 prompts",
        ),
        (
            "rollout.dynamic_sampling={lowest_accuracy: 0.51, highest_accuracy: 0.62}",
            "no group of 8 can have a mean accuracy between",
        ),
        (
            "rollout.dynamic_sampling={lowest_accuracy: 0.5, highest_accuracy: 0.5}",
            "lowest_accuracy 0.5 is not below highest_accuracy",
        ),
        (
            "reward.soft_overlong_buffer_tokens=21",
            "soft_overlong_buffer_tokens 21 is larger than rollout.max_response_tokens 20",
        ),
        ("seed", "expected section.key=value"),
        ("seed.x=1", "seed is not a section"),
        ("seed=[1", "not YAML ("),
    ],
)
def test_mistakes_are_one_line_each(override, expected):
    with pytest.raises(UserError) as caught:
        load_config(DEMO, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_key_missing_file_and_broken_yaml(tmp_path):
    tree = yaml.safe_load(DEMO.read_text())
    del tree["rollout"]["group_size"]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "b.yaml").write_text("seed: [1")
    (tmp_path / "c.yaml").write_text("- 1")
    (tmp_path / "d.yaml").write_text("seed: 1\nseed: 2\n")
    for name, expected in {
        "a.yaml": "missing key rollout.group_size: add it",
        "b.yaml": "not YAML",
        "c.yaml": "expected a mapping of sections",
        "d.yaml": "repeated key seed",
        "e.yaml": "cannot be read",
    }.items():
        with pytest.raises(UserError, match=expected):
            load_config(tmp_path / name)


def test_several_mistakes_are_reported_together():
    with pytest.raises(UserError) as caught:
        load_config(DEMO, ["optimizer.a=1", "rollout.b=2"])
    assert len(str(caught.value).splitlines()) == 2

"""configs/*.yaml against the paper's numbers, typed in here, and against the published models' sizes; published.yaml
spells out every key."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from megatron_papo.config import ParallelConfig, leaf_keys
from megatron_papo.config_files import load_config, resolve_config
from megatron_papo.config_notes import bytes_on_disk
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.model.parallel_sizes import check_parallel_sizes
from megatron_papo.plan.machine_file import Traced
from tests.helpers import ROOT, run_module
from tests.model.test_hf_config import OFFICIAL_3B

CONFIGS = ROOT / "configs"

OWN_COLUMNS = dict.fromkeys(("problem_key", "answer_key", "images_key", "target_key", "saliency_key"))
COMMON = {
    "seed": 1,
    "iterations": 202,  # 2 epochs of 38,870 problems: 2 * (38870 // 384)
    # ours, and what the comments on disk count with
    "keep_checkpoints": 2,
    "keep_exports": 5,
    "evaluate_every": 20,
    "keep_best": 1,
    "export_directory": None,
    "save_while_sampling": False,
    "data.train": {"source": "PAPOGalaxy/PAPO_ViRL39K_train", "split": "train", "count": None} | OWN_COLUMNS,
    "data.evaluation": {"source": "PAPOGalaxy/PAPO_MMK12_test", "split": "train", "count": None} | OWN_COLUMNS,
    "data.sft": None,
    "data.min_pixels": 200704,
    "data.max_pixels": 1003520,
    "data.max_prompt_tokens": 4096,
    "data.strip_problem": True,
    "data.resize": "published",
    "data.transparency": "black",
    "evaluation.min_pixels": 1024,
    "data.prompt_template": "{problem}\n\nYou first think through the reasoning process as an internal monologue, "
    "enclosed within <think> </think> tags. Then, provide your final answer enclosed within \\boxed{{}}.",
    "data.system_prompt": None,
    "sft": None,
    "model.dtype": "bfloat16",
    "rollout.rollout_batch_size": 384,
    "rollout.group_size": 5,
    "rollout.temperature": 1.0,
    "rollout.top_p": 0.99,
    "rollout.max_response_tokens": 2048,
    "reward.accuracy_weight": 0.9,
    "reward.format_weight": 0.1,
    "reward.zero_if_cut_off": False,
    "reward.soft_overlong_buffer_tokens": None,
    "masked_image.strategy": "random",
    "masked_image.ratio": 0.6,
    "masked_image.square_pixels": 14,
    "masked_image.space": "native",
    "objective.advantage": "grpo",
    "objective.average": "micro_batch",
    "objective.average_ranks": 8,
    "objective.average_micro_batch_size": 4,
    "objective.clip_ratio_low": 0.2,
    "objective.clip_ratio_dual": 3.0,
    "objective.ratio_level": "token",
    "objective.importance_sampling_cap": None,
    "objective.overlong_filtering": False,
    "objective.kl_ref_estimator": "k3",
    "objective.kl_prcp_estimator": "k3",
    "objective.kl_prcp_clip": None,
    "objective.kl_prcp_top_p": None,
    "objective.kl_prcp_annealing": None,
    "objective.masked_branch": "cached",
    "objective.entropy_estimator": "sampled",
    "objective.sft_coef": 0.0,
    "optimizer.learning_rate": 1e-6,
    "optimizer.warmup_steps": 0,
    "optimizer.decay_steps": None,
    "optimizer.weight_decay": 0.01,
    "optimizer.adam_beta1": 0.9,
    "optimizer.adam_beta2": 0.999,
    "optimizer.adam_epsilon": 1e-8,
    "optimizer.clip_grad": 1.0,
    "training.global_batch_size": 128,
    "training.layout": "group",
    "evaluation.samples_per_prompt": 8,
    "evaluation.temperature": 1.0,
    "evaluation.top_p": 1.0,
    "evaluation.top_k": 50,
    "evaluation.max_response_tokens": 2048,
    "evaluation.max_pixels": 589824,
}
"""What all published runs share: the paper, and the authors' training and evaluation code where the paper is silent."""

DYNAMIC_SAMPLING = {"lowest_accuracy": 0.01, "highest_accuracy": 0.99, "generation_batch_size": 128, "max_rounds": 20}

PRESETS = {
    # name                  gamma  eta   beta  clip high, dynamic sampling
    "grpo_3b":             (0,    0,    0.01, 0.30, None),
    "grpo_7b":             (0,    0,    0.01, 0.30, None),
    "papo_g_3b":           (0.02, 0,    0.01, 0.30, None),
    "papo_g_7b":           (0.02, 0.05, 0.01, 0.30, None),
    "papo_g_no_kl_ref_3b": (0.01, 0.03, 0,    0.30, None),
    "papo_g_no_kl_ref_7b": (0.01, 0.03, 0,    0.30, None),
    "dapo_3b":             (0,    0,    0,    0.28, DYNAMIC_SAMPLING),
    "dapo_7b":             (0,    0,    0,    0.28, DYNAMIC_SAMPLING),
    "papo_d_3b":           (0.01, 0.03, 0,    0.28, DYNAMIC_SAMPLING),
    "papo_d_7b":           (0.01, 0.03, 0,    0.28, DYNAMIC_SAMPLING),
    "papo_g_32b":          (0.02, 0.05, 0.01, 0.30, None),  # papo_g_7b's, not published at this size
    "papo_g_72b":          (0.02, 0.05, 0.01, 0.30, None),
}  # fmt: skip

SIZES = {
    #       hidden heads kv layers MLP    vocabulary vision MLP tied  parameters      TP PP DP
    "3b":  (2048,  16,   2, 36,    11008, 151936,    3420,      True,  3_754_622_976, 1, 1, 8),
    "7b":  (3584,  28,   4, 28,    18944, 152064,    3420,      False, 8_292_166_656, 2, 1, 4),
    "32b": (5120,  40,   8, 64,    27648, 152064,    3456,      False, 33_452_718_336, 8, 2, 1),
    "72b": (8192,  64,   8, 80,    29568, 152064,    3456,      False, 73_410_777_344, 8, 4, 1),
}  # fmt: skip
FAMILY_PARTS = ["vppo"]
FAMILY = {
    "vppo_7b": {},
    "vppo_32b": {"objective.average_ranks": 32},
    "pgpo_7b": {},
    "tor_7b": {},
    "cgpo_7b": {},
    "dvrp_7b": {},
    "cppo_7b": {},
    "vepo_7b": {},
}
"""Methods other than PAPO: their presets, and what differs from the method at another size."""
VPPO = {
    "rollout.group_size": 8,
    "rollout.top_p": 0.99,
    "rollout.dynamic_sampling": DYNAMIC_SAMPLING,
    "reward.accuracy_weight": 1.0,
    "reward.format_weight": 0.0,
    "masked_image.ratio": 0.5,
    "masked_image.space": "resized",
    "masked_image.per": "response",
    "masked_image.square_pixels": 14,
    "training.global_batch_size": 128,
    "objective.average": "token",
    "objective.average_ranks": 8,
    "objective.average_micro_batch_size": 16,
    "objective.kl_ref_coef": 0.0,
    "objective.kl_prcp_coef": 0.0,
    "objective.clip_ratio_low": 0.2,
    "objective.clip_ratio_high": 0.28,
    "objective.clip_ratio_dual": 3.0,
    "objective.entropy_coef": 0.06,
    "objective.masked_image_entropy_coef": 0.0,
    "objective.sensitivity": {"formula": "k3", "weights": "old"},
    "objective.policy_tokens.sensitivity_share": 0.4,
    "objective.policy_tokens.entropy_share": None,
    "objective.policy_tokens.per": "response",
    "objective.policy_tokens.average": "all",
    "objective.trajectory_shaping": {"lowest": 0.9, "statistics": "dealt"},
}
"""The authors' 7B script and code, typed in."""
GRPO = {"objective.kl_ref_coef": 0.01, "objective.average": "token", "rollout.dynamic_sampling": None}
METHODS = {
    "vppo": VPPO,
    "pgpo": GRPO
    | {
        "masked_image.strategy": "none",
        "objective.kl_prcp_coef": 0.0,
        "objective.token_shaping": {"threshold": 0.4, "boost": 2.0},
        "objective.sensitivity": {"formula": "k3", "weights": "old"},
    },
    "tor": GRPO
    | {
        "masked_image.strategy": "none",
        "objective.kl_prcp_coef": 0.0,
        "objective.sensitivity": {"formula": "abs", "weights": "old"},
        "objective.policy_tokens": {
            "sensitivity_share": 0.3,
            "entropy_share": 0.3,
            "per": "step",
            "sensitivity_only_weight": 0.5,
            "average": "all",
        },
    },
    "cgpo": GRPO | {"objective.kl_prcp_coef": 0.0, "objective.response_shaping.strength": 0.1},
    "dvrp": GRPO
    | {
        "kept_image.strategy": "noise",
        "objective.kl_prcp_coef": 0.01,
        "objective.kl_kept_coef": 0.01,
        "objective.kl_prcp_estimator": "k3",
        "objective.masked_branch": "recompute_with_grad",
    },
    "vepo": GRPO
    | {
        "masked_image.strategy": "noise",
        "objective.kl_prcp_coef": 0.0,
        "objective.sensitivity.formula": "vepo",
        "objective.policy_tokens.sensitivity_share": 0.2,
        "objective.policy_tokens.per": "response",
        "objective.policy_tokens.average": "selected",
    },
    "cppo": GRPO
    | {
        "objective.kl_prcp_coef": 0.0,
        "objective.masked_branch": "recompute_with_grad",
        "objective.sensitivity": {"formula": "entropy_gap", "weights": "current"},
        "objective.contrast.coefficient": 0.01,
        "objective.contrast.temperature": 0.1,
        "objective.contrast.share": 0.5,
        "objective.contrast.positive_advantages": True,
    },
}
"""What the sources state of each method's settings, typed in."""

PARTS = ["grpo", "dapo", "papo_g_no_kl_ref", "3b_8x80gb", "7b_8x80gb", "32b_24x80gb", "72b_40x80gb"]
"""config.json of Qwen/Qwen2.5-VL-*-Instruct, their number of parameters (half of total_size in
model.safetensors.index.json), and the layout of our presets."""
OTHER_MACHINES = ["3b_4x80gb", "3b_8x40gb", "7b_4x80gb"]
SHARED = ("3b", "7b")
"""Sizes whose preset trains and samples on the same GPUs, which takes a checkpoint in each iteration."""


def size_of(name: str) -> str:
    return name.rsplit("_", 1)[1]


def expected(name: str) -> dict:
    if name in FAMILY:
        return METHODS[name.rsplit("_", 1)[0]] | FAMILY[name]
    gamma, eta, beta, clip_ratio_high, dynamic_sampling = PRESETS[name]
    size = size_of(name)
    tp, pp, dp = SIZES[size][-3:]
    return COMMON | {
        "checkpoint_every": 1 if size in SHARED else 10,
        "server.shares_gpus": size in SHARED,
        "model.path": f"Qwen2.5-VL-{size.upper()}-Instruct",
        "objective.kl_prcp_coef": gamma,
        "objective.entropy_coef": eta,
        "objective.masked_image_entropy_coef": eta,
        "objective.kl_ref_coef": beta,
        "objective.clip_ratio_high": clip_ratio_high,
        "rollout.dynamic_sampling": dynamic_sampling,
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": pp,
        "parallel.data_parallel_size": dp,
    }


def differences(path: Path, name: str) -> dict:
    """{dotted key: value in the file} of what is not as expected of the preset `name`."""
    config, found = load_config(path), {}
    for key, value in expected(name).items():
        actual = config
        for part in key.split("."):
            actual = getattr(actual, part)
        actual = actual.model_dump() if isinstance(actual, BaseModel) else actual
        if actual != value:
            found[key] = actual
    return found


def changed(tmp_path, name: str, old: str, new: str) -> Path:
    """A copy of configs/ in which one piece of the text of one file is replaced; returns that file."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    path = tmp_path / "configs" / f"{name}.yaml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return path


def test_every_file_is_the_demo_a_preset_or_a_part_of_one():
    known = ["demo", "published", *PARTS, *OTHER_MACHINES, *FAMILY_PARTS, *PRESETS, *FAMILY]
    assert sorted(path.name for path in CONFIGS.glob("*.yaml")) == sorted(f"{name}.yaml" for name in known)


def test_every_preset_starts_from_the_published_file_and_every_part_is_used():
    extended = {name: yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["extends"] for name in [*PRESETS, *FAMILY]}
    assert {names[0] for names in extended.values()} == {"published.yaml"}
    assert {name for names in extended.values() for name in names[1:]} == {
        f"{name}.yaml" for name in [*PARTS, *FAMILY_PARTS]
    }


@pytest.mark.parametrize("name", [*PRESETS, *FAMILY])
def test_numbers_are_the_published_ones(name):
    assert differences(CONFIGS / f"{name}.yaml", name) == {}


@pytest.mark.parametrize(
    "name, file, old, new, key, value",
    [
        ("vppo_7b", "vppo", "lowest: 0.9 ", "lowest: 0.8 ", "objective.trajectory_shaping",
         {"lowest": 0.8, "statistics": "dealt"}),
        ("vppo_32b", "vppo_32b", "average_ranks: 32", "average_ranks: 8", "objective.average_ranks", 8),
        ("papo_g_7b", "published", "kl_prcp_coef: 0.02", "kl_prcp_coef: 0.01", "objective.kl_prcp_coef", 0.01),
        ("papo_g_7b", "papo_g_7b", "  entropy_coef: 0.05", "  entropy_coef: 0.03", "objective.entropy_coef", 0.03),
        ("grpo_3b", "published", "kl_ref_coef: 0.01", "kl_ref_coef: 0.0", "objective.kl_ref_coef", 0.0),
        ("grpo_3b", "grpo", "kl_prcp_coef: 0.0", "kl_prcp_coef: 0.01", "objective.kl_prcp_coef", 0.01),
        ("papo_d_3b", "dapo", "clip_ratio_high: 0.28", "clip_ratio_high: 0.3", "objective.clip_ratio_high", 0.3),
        ("papo_g_3b", "published", "average: micro_batch", "average: token", "objective.average", "token"),
        ("papo_g_32b", "32b_24x80gb", "pipeline_model_parallel_size: 2", "pipeline_model_parallel_size: 4",
         "parallel.pipeline_model_parallel_size", 4),
        ("dapo_7b", "dapo", "max_rounds: 20", "max_rounds: 10",
         "rollout.dynamic_sampling", DYNAMIC_SAMPLING | {"max_rounds": 10}),
        ("papo_g_72b", "published", "enclosed within\\\n", "enclosed in\\\n", "data.prompt_template", None),
    ],
)  # fmt: skip
def test_a_changed_number_is_noticed(tmp_path, name, file, old, new, key, value):
    found = differences(changed(tmp_path, file, old, new).with_name(f"{name}.yaml"), name)
    assert list(found) == [key]
    assert value is None or found[key] == value


def keys(tree: dict, prefix: str = "") -> dict[str, object]:
    """Dotted names of all leaves of a nested dict, with their values."""
    found = {}
    for key, value in tree.items():
        found |= keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found


def keys_left_to_defaults(path: Path) -> set[str]:
    """What the schema holds and the file does not say; of a section that the file sets to null nothing is missing."""
    said = keys(yaml.safe_load(path.read_text()))
    null = tuple(f"{key}." for key, value in said.items() if value is None)
    return {key for key in leaf_keys() if key not in said and not key.startswith(null)}


def test_every_key_is_spelled_out():
    assert keys_left_to_defaults(CONFIGS / "published.yaml") == set()


@pytest.mark.parametrize(
    "old, new, missing",
    [
        ("  clip_grad: 1.0", "", {"optimizer.clip_grad"}),
        ("keep_best: 1 ", "", {"keep_best"}),
        ("ViRL39K_train, split: train, count: null,", "ViRL39K_train,", {"data.train.split", "data.train.count"}),
    ],
)
def test_a_key_left_out_is_noticed(tmp_path, old, new, missing):
    assert keys_left_to_defaults(changed(tmp_path, "published", old, new)) == missing


def test_dynamic_sampling_is_spelled_out_where_it_is_on():
    said = yaml.safe_load((CONFIGS / "dapo.yaml").read_text())["rollout"]["dynamic_sampling"]
    assert said.keys() == DYNAMIC_SAMPLING.keys()


def stated_disk(name: str) -> tuple[str, str, str]:
    """What the comment in a size's file says: a checkpoint, an export, the whole run at most."""
    text = " ".join(line.removeprefix("# ") for line in (CONFIGS / f"{name}.yaml").read_text().splitlines())
    found = re.search(
        r"parameters x 14 bytes = (\d+) GB, an export x 2 bytes = ([\d.]+) GB.* at most ([\d.]+ [GT]B)\.", text
    )
    return found.groups()


@pytest.mark.parametrize(
    "name, part, whole",
    [
        ("papo_g_3b", "3b_8x80gb", "270 GB"),
        ("papo_g_7b", "7b_8x80gb", "597 GB"),
        ("papo_g_32b", "32b_24x80gb", "2.4 TB"),
        ("papo_g_72b", "72b_40x80gb", "5.3 TB"),
    ],
)
def test_the_disk_that_a_run_takes_is_stated(name, part, whole):
    """By hand: 2 newest checkpoints, a best, one being written; 5 newest exports, a best, one being written, the
    reference."""
    parameters = SIZES[size_of(name)][8]
    checkpoint, export, stated = stated_disk(part)
    assert checkpoint == f"{parameters * 14 / 1e9:.0f}"
    assert export in (f"{parameters * 2 / 1e9:.1f}", f"{parameters * 2 / 1e9:.0f}")
    by_hand = parameters * (4 * 14 + 8 * 2)
    row = f"| {size_of(name).upper()} | {parameters / 1e9:.2f} G | {checkpoint} GB | {export} GB | {stated} |"
    assert row in (ROOT / "docs" / "configuration.md").read_text()
    unit = 1e12 if stated.endswith("TB") else 1e9
    assert stated == whole == f"{by_hand / unit:.{1 if unit == 1e12 else 0}f} {whole[-2:]}"
    assert bytes_on_disk(load_config(CONFIGS / f"{name}.yaml"), parameters) == by_hand
    more = load_config(CONFIGS / f"{name}.yaml", ["keep_exports=6"])
    assert bytes_on_disk(more, parameters) == by_hand + 2 * parameters


def official_tree(size: str) -> dict:
    """config.json of Qwen/Qwen2.5-VL-<size>-Instruct as far as it decides on sizes."""
    hidden, heads, groups, layers, mlp, vocabulary, vision_mlp, tied = SIZES[size][:8]
    return OFFICIAL_3B | {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "vision_config": OFFICIAL_3B["vision_config"] | {"intermediate_size": vision_mlp, "out_hidden_size": hidden},
    }


@pytest.fixture
def official(tmp_path):
    """size -> the model's HFConfig."""

    def read(size):
        (tmp_path / "config.json").write_text(json.dumps(official_tree(size)))
        return read_hf_config(tmp_path)

    return read


@pytest.mark.parametrize("name", [*PRESETS, *FAMILY])
def test_the_layout_fits_the_model(official, name):
    check_parallel_sizes(official(size_of(name)), load_config(CONFIGS / f"{name}.yaml").parallel)


@pytest.mark.parametrize(
    "size, tp, pp, complaint",
    [
        ("3b", 8, 1, "vision MLP width 3420"),
        ("7b", 8, 1, "attention heads 28"),
        ("32b", 8, 3, "64 text layers"),
        ("72b", 8, 3, "80 text layers"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(official, size, tp, pp, complaint):
    with pytest.raises(UserError, match=complaint):
        check_parallel_sizes(
            official(size), ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        )


@pytest.fixture(scope="module")
def parameters():
    """size -> {name: number of elements} of transformers' own model, made without memory for its weights."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def count(size):
        tree = official_tree(size)
        config = Qwen2_5_VLConfig(
            text_config={
                key: value for key, value in tree.items() if key not in ("vision_config", "model_type", "architectures")
            },
            vision_config=tree["vision_config"],
            tie_word_embeddings=tree["tie_word_embeddings"],
        )
        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration(config)
        return {name: parameter.numel() for name, parameter in model.named_parameters()}

    return {size: count(size) for size in SIZES}


def gigabytes_of_fullest_gpu(counts: dict[str, int], parallel: ParallelConfig) -> float:
    """Parameters in bf16 (2 bytes), gradients in fp32 (4), fp32 main parameters and AdamW moments sharded over
    data-parallel ranks (12); a tower that is spread is whole on each rank."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    in_layers = sum(count for name, count in counts.items() if "language_model.layers" in name)
    last = sum(count for name, count in counts.items() if "lm_head" in name or "language_model.norm" in name)
    first = sum(counts.values()) - in_layers - last
    ends = first + last if pp == 1 else max(first, last)
    tower = sum(count for name, count in counts.items() if ".visual." in name)
    whole = tower * (1 - 1 / tp) if parallel.vision_tower == "spread" else 0
    return ((in_layers / pp + ends) / tp + whole) * (2 + 4 + 12 / parallel.data_parallel_size) / 1e9


def test_the_sizes_are_the_published_models(parameters):
    assert {size: sum(counts.values()) for size, counts in parameters.items()} == {
        size: row[8] for size, row in SIZES.items()
    }


@pytest.mark.parametrize("part", [name for name in [*PARTS, *OTHER_MACHINES] if name.endswith("gb")])
def test_what_a_gpu_holds_all_the_time_is_as_the_file_says(parameters, part):
    """Counted here from transformers' parameters: norms, which are not cut, are a thousandth. And it fits, with what
    the trace adds."""
    file = CONFIGS / f"{part}.yaml"
    config, said = resolve_config(file, below=CONFIGS / "published.yaml").config, Traced.read(file.read_text())
    counted = gigabytes_of_fullest_gpu(parameters[part.partition("_")[0]], config.parallel)
    assert float(said.resident) == pytest.approx(counted, rel=0.005)
    assert float(said.resident) < float(said.peak) < float(said.needed) <= int(re.search(r"x(\d+)gb", part)[1])


def shown_by_start_run(*arguments) -> dict[str, str]:
    """What run_all.sh would be told, by variable; nothing is written."""
    done = run_module("tools.start_run", *arguments, "--dry-run", "--write", "--caller", ROOT)
    assert done.returncode == 0, done.stderr
    assignments, paths = done.stdout.split("declare -gA PATHS=")
    return dict(word.split("=", 1) for word in shlex.split(assignments)) | {"PATHS": paths}


@pytest.mark.parametrize("name", PRESETS)
def test_the_plan_of_a_preset(name):
    plan = shown_by_start_run("--config", CONFIGS / f"{name}.yaml", "--name", "test-plan")
    tp, pp, dp = SIZES[size_of(name)][-3:]
    assert plan["START_TRAIN"] == f".venv/bin/python -m tools.torchrun --standalone --nproc-per-node {tp * pp * dp}"
    assert (plan["FIRST"], plan["ITERATIONS"], plan["RESIDENT"], plan["SUMMARY"]) == ("1", "202", "0", "1")
    todo = plan["TODO"].split()
    assert todo[:3] == ["1", "3", "7:0"] and "2" not in todo  # no cold start
    for stage in "456":
        assert [key for key in todo if key[0] == stage] == [f"{stage}:{number}" for number in range(1, 203)]
    assert [key for key in todo if key[0] == "7"] == [f"7:{number}" for number in [*range(0, 201, 20), 202]]
    model = f"/Qwen2.5-VL-{size_of(name).upper()}-Instruct\n"
    of_start = plan["PATHS"].split("[3]=")[1]
    assert f"{model}    makes runs/test-plan/reference\n" in of_start
    assert "reads rollback" not in plan["PATHS"]
    assert ("reads previous" in plan["PATHS"]) == ("dapo" in name or "papo_d" in name)  # dynamic sampling
    assert not (ROOT / "runs" / "test-plan").exists()


def test_run_all_shows_the_commands_of_a_preset():
    name = "test-dry-run"
    arguments = ["--config", "configs/papo_d_7b.yaml", "--name", name, "--dry-run", "--set", "iterations=2"]
    done = subprocess.run(["bash", "run_all.sh", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"^(\S.* stages\.stage.*)\n((?:    .*\n)+)", done.stdout, re.MULTILINE)
    stages = [command.split(" stages.stage", 1)[1][0] for command, _ in commands]
    assert stages == ["1", "3", "7", "4", "5", "6", "4", "5", "6", "7"]
    (first, first_paths), (second, second_paths) = (row for row in commands if "stage5_train" in row[0])
    torchrun = ".venv/bin/python -m tools.torchrun --standalone --nproc-per-node 8 -m --"
    torchrun += f" stages.stage5_train --run runs/{name} "
    assert first.strip() == f"{torchrun}--iteration 1" and second.strip() == f"{torchrun}--iteration 2"
    assert f"    reads megatron   runs/{name}/reference\n" in first_paths
    assert f"    reads megatron   runs/{name}/iterations/0001/megatron\n" in second_paths
    assert not (ROOT / "runs" / name).exists()

"""Frozen and living keys, what differs between two configurations, cadence, and notes."""

import re

import pytest

from megatron_papo.config import Change, Config, changes, is_living, leaf_keys, living_reason, meaning_of, value_of
from megatron_papo.config_files import load_config
from megatron_papo.config_notes import bytes_on_disk, notes
from megatron_papo.errors import UserError
from tests.helpers import DEMO_CONFIG, ROOT, run_module
from tools.show_config import living_table

LIVING = {
    "iterations", "keep_checkpoints", "keep_exports", "evaluate_every", "keep_best", "checkpoint_every",
    "export_directory", "save_while_sampling",
    "model.path", "data.train.source", "data.sft.source", "data.image_root",
    "data.skip_bad_rows", "data.max_suspicious_share",
    "rollout.concurrency", "rollout.request_timeout_seconds", "rollout.dynamic_sampling.max_rounds", "reward.workers",
    "training.encoded_picture_gigabytes", "training.max_rollout_log_prob_difference",
}  # fmt: skip
LIVING_SECTIONS = ("server.", "evaluation.", "data.evaluation.")


@pytest.fixture(scope="module")
def demo() -> Config:
    return load_config(DEMO_CONFIG)


def test_which_keys_are_living():
    found = {key for key in leaf_keys() if is_living(key)}
    assert {key for key in found if not key.startswith(LIVING_SECTIONS)} == LIVING
    assert found >= {key for key in leaf_keys() if key.startswith(LIVING_SECTIONS)}
    assert is_living("server") and is_living("data.evaluation")
    assert not is_living("rollout") and not is_living("data")  # living in part only
    assert all(living_reason(key) for key in found)


def test_what_decides_a_number_is_frozen():
    for section in ("objective", "hacking_guard", "optimizer", "masked_image", "sft", "parallel", "data.synthetic"):
        assert not any(is_living(key) for key in leaf_keys() if key.startswith(f"{section}."))
    for key in ("seed", "rollout.top_p", "reward.time_limit_seconds", "training.micro_batch_size", "data.train.count"):
        assert not is_living(key)


@pytest.mark.parametrize("key", ["sead", "server.prt", "seed.x", "", "server.", "data.train.source.x"])
def test_asking_for_a_key_that_there_is_not_is_an_error(demo, key):
    for question in (is_living, meaning_of, lambda name: value_of(demo, name)):
        with pytest.raises(KeyError, match="no such key"):
            question(key)


def test_every_key_has_a_meaning():
    assert [key for key in leaf_keys() if not meaning_of(key)] == []


def test_changes_are_leaf_by_leaf(demo):
    assert changes(demo, demo) == []
    other = load_config(DEMO_CONFIG, ["server.port=7000", "objective.kl_prcp_coef=0.5", "iterations=9"])
    assert changes(demo, other) == [
        Change("iterations", 6, 9, living=True),
        Change("server.port", 0, 7000, living=True),
        Change("objective.kl_prcp_coef", 0.01, 0.5, living=False),
    ]
    assert [(change.key, change.old, change.new) for change in changes(other, demo)][0] == ("iterations", 9, 6)


def test_changes_of_entries_are_told_by_their_names(demo):
    one = load_config(DEMO_CONFIG, ["evaluation.benchmarks.a.source=a.jsonl"])
    other = load_config(DEMO_CONFIG, ["evaluation.benchmarks.a={source: a.jsonl, count: 4}"])
    assert changes(one, other) == [Change("evaluation.benchmarks.a.count", None, 4, living=True)]
    (new,) = changes(demo, one)
    assert (new.key, new.old, new.new["source"]) == ("evaluation.benchmarks.a", None, "a.jsonl")
    assert [(change.key, change.new) for change in changes(one, demo)] == [("evaluation.benchmarks.a", None)]


def test_changes_where_a_section_is_null_on_one_side(demo):
    without = load_config(DEMO_CONFIG, ["sft=null", "data.sft=null"])
    found = {change.key: change for change in changes(demo, without)}
    assert found["sft.steps"] == Change("sft.steps", 60, None, living=False)
    # a living key of a section that goes: the run is another one all the same
    assert found["data.sft.source"] == Change("data.sft.source", "synthetic", None, living=False)
    assert set(found) == {key for key in leaf_keys() if key.startswith(("sft.", "data.sft."))}
    back = {change.key: change for change in changes(without, demo)}
    assert back["sft.steps"] == Change("sft.steps", None, 60, living=False)
    sampled = load_config(DEMO_CONFIG, ["rollout.dynamic_sampling={}"])
    assert "rollout.dynamic_sampling.max_rounds" in {change.key for change in changes(demo, sampled)}


@pytest.mark.parametrize("key", [key for key in leaf_keys() if key not in ("model.path", "evaluation.benchmarks")])
def test_every_key_can_be_seen_to_change(demo, key):
    """Each leaf, replaced by a value that no configuration holds, is the one change."""

    def replaced(section, names):
        name, *rest = names
        old = getattr(section, name)
        return section.model_copy(update={name: replaced(old, rest) if rest else ["changed"]})

    config = load_config(
        DEMO_CONFIG,
        [
            "rollout.dynamic_sampling={}",
            "objective.kl_prcp_annealing={steps: 5}",
            "evaluation.masked_image={}",
            "objective.kl_prcp_tokens={sensitivity_share: 0.5}",
            "objective.policy_tokens={sensitivity_share: 0.5}",
            "objective.trajectory_shaping={}",
            "objective.token_shaping={}",
            "objective.response_shaping={}",
            "objective.contrast={}",
            "objective.masked_branch=recompute_with_grad",
            "kept_image={}",
        ],
    )
    assert [change.key for change in changes(config, replaced(config, key.split(".")))] == [key]


@pytest.mark.parametrize(
    "overrides, complaint",
    [
        (["keep_best=1", "evaluate_every=null"], "keep_best 1 needs evaluate_every"),
        (["keep_best=-1"], "keep_best: Input should be greater than or equal to 0"),
        (["keep_best=true"], "keep_best: Input should be a valid integer"),
        (["checkpoint_every=0"], "checkpoint_every: Input should be greater than 0"),
        (["keep_checkpoints=0"], "keep_checkpoints: Input should be greater than 0"),
        (["keep_exports=0"], "keep_exports: Input should be greater than 0"),
        (["evaluate_every=0"], "evaluate_every: Input should be greater than 0"),
        (["evaluation.validation=mmk12"], "no evaluation set of that name, there is evaluation"),
        (["checkpoint_every=2"], "checkpoint_every 2 and hacking_guard.action rollback_and_lower_gamma exclude each"),
        (
            ["checkpoint_every=2", "hacking_guard.action=stop", "server.shares_gpus=true"],
            "checkpoint_every 2 and server.shares_gpus exclude each other",
        ),
        (["export_directory=/dev/shm"], "export_directory /dev/shm is not used with checkpoint_every 1"),
        (["save_while_sampling=true", "server.shares_gpus=true"], "save_while_sampling and server.shares_gpus exclude"),
    ],
)
def test_cadence_that_cannot_be(overrides, complaint):
    with pytest.raises(UserError, match=complaint):
        load_config(DEMO_CONFIG, overrides)
    possible = [
        "keep_best=1",
        "evaluate_every=2",
        "keep_exports=null",
        "checkpoint_every=3",
        "export_directory=/dev/shm",
    ]
    load_config(DEMO_CONFIG, [*possible, "hacking_guard.action=stop"])


def test_a_coefficient_that_reaches_no_gradient_is_said():
    assert notes(load_config(DEMO_CONFIG, ["objective.masked_branch=recompute_with_grad"])) == []
    assert notes(load_config(DEMO_CONFIG, ["objective.masked_image_entropy_coef=0.0"])) == []
    for branch, published in (("cached", True), ("recompute", False)):
        (note,) = notes(load_config(DEMO_CONFIG, [f"objective.masked_branch={branch}"]))
        assert note.startswith("objective.masked_image_entropy_coef 0.03 reaches no gradient")
        assert f"objective.masked_branch {branch}" in note and ("as published" in note) == published
    (note,) = notes(
        load_config(DEMO_CONFIG, ["objective.masked_image_entropy_coef=0.0", "training.max_tokens_per_micro_batch=512"])
    )
    assert "max_tokens_per_micro_batch 512 is not read" in note


def test_bytes_on_disk_follow_the_cadence():
    """By hand, in units of the 100 parameters of a model: float32 weights are 4, a checkpoint 12."""
    for overrides, checkpoints, exports in [
        ([], 6, 6),  # the demo keeps all of its six
        (["keep_checkpoints=2"], 3, 6),
        (["keep_checkpoints=2", "hacking_guard.rollback_iterations=3"], 5, 6),
        (["keep_checkpoints=2", "keep_exports=1", "keep_best=1", "evaluate_every=1"], 4, 3),
        (["keep_checkpoints=2", "keep_exports=3", "iterations=1"], 1, 1),
    ]:
        expected = 100 * (12 * checkpoints + 4 * (exports + 2))  # besides the reference and the cold start
        assert bytes_on_disk(load_config(DEMO_CONFIG, overrides), 100) == expected, overrides


def test_the_table_in_the_docs_is_the_schemas():
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert "\n".join(living_table()) in text
    # every key or section that the schema marks, and no other, whatever the table's layout
    rows = set(re.findall(r"^\| `([\w.*]+)` \|", text, re.MULTILINE))
    assert rows == LIVING | {f"{section}*" for section in LIVING_SECTIONS}


def lines_of(*arguments) -> list[str]:
    done = run_module("tools.show_config", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_show_config_prints_every_key_with_its_source_kind_and_meaning():
    lines = lines_of("--config", "configs/papo_d_7b.yaml", "--set", "seed=2")
    text = "\n".join(lines)
    for key, value, source in [
        ("seed", "2", "--set seed=2, frozen"),
        ("objective.kl_prcp_coef", "0.01", "configs/papo_d_7b.yaml, frozen"),
        ("objective.clip_ratio_high", "0.28", "configs/dapo.yaml, frozen"),
        ("server.first_gpu", "0", "configs/7b_8x80gb.yaml, living"),
        ("optimizer.learning_rate", "1e-06", "configs/published.yaml, frozen"),
        ("sft", "null", "configs/published.yaml, frozen"),
    ]:
        assert re.search(rf"^{re.escape(key)}: {re.escape(value)} +\({re.escape(source)}\)$", text, re.MULTILINE), key
    assert "    Standard deviation of the pixel noise, in grey levels (0..255)." in lines
    null = ("data.sft.", "sft.", "evaluation.masked_image.", "kept_image.") + tuple(
        f"objective.{section}."
        for section in (
            "kl_prcp_annealing",
            "kl_prcp_tokens",
            "policy_tokens",
            "trajectory_shaping",
            "token_shaping",
            "response_shaping",
            "contrast",
        )
    )
    printed = {line.split(": ")[0] for line in lines if re.match(r"[a-z_.0-9]+: .*(frozen|living)\)$", line)}
    assert printed == {key for key in leaf_keys() if not key.startswith(null)} | {name.rstrip(".") for name in null}
    assert lines[-1].startswith("note: objective.masked_image_entropy_coef 0.03 reaches no gradient")


def test_show_config_prints_differences_a_part_and_a_run(tmp_path):
    def keys_of(*arguments) -> list[str]:
        return [line.split(": ")[0] for line in lines_of(*arguments) if line.endswith((" frozen)", " living)"))]

    overrides = ["--set", "seed=2"]
    assert keys_of("--config", "configs/grpo_7b.yaml", "--differences", "--only", "objective") == [
        "objective.kl_prcp_coef"
    ]
    assert "seed" in keys_of("--config", "configs/grpo_7b.yaml", "--differences", *overrides)
    assert "seed" not in keys_of("--config", "configs/grpo_7b.yaml", "--differences")
    demo = keys_of("--config", DEMO_CONFIG, "--differences")
    assert "masked_image.space" in demo and "masked_image.ratio" not in demo
    (tmp_path / "config.yaml").write_text(DEMO_CONFIG.read_text())
    assert keys_of("--run", tmp_path, "--only", "data.synthetic") == [
        f"data.synthetic.{name}" for name in ("grid", "lowest", "highest", "noise")
    ]
    done = run_module("tools.show_config", "--run", tmp_path / "none")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "config.yaml: cannot be read" in done.stderr

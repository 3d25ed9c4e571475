"""The table of stages: complete, without a key that nobody reads, and the same paths for everybody."""

import ast
import re

import pytest

from megatron_papo.config import Section, is_living, leaf_keys, value_of
from megatron_papo.config_files import load_config
from megatron_papo.config_view import KeyNotListed, view
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stages import STAGES, Turn, all_turns, maker, paths
from tests.helpers import DEMO_CONFIG, ROOT

MANY = ["iterations=5", "evaluate_every=2", "hacking_guard.rollback_iterations=1"]


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run", load_config(DEMO_CONFIG, MANY))


def covered(key: str, listed: tuple[str, ...]) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in listed)


def test_every_stage_has_its_file_and_every_file_its_row():
    assert {path.stem for path in (ROOT / "stages").glob("stage*.py")} == set(STAGES)


def test_every_frozen_key_decides_a_stage():
    """Or its change would be refused for no reason."""
    decided = tuple(key for stage in STAGES.values() for key in stage.decided_by)
    assert [key for key in leaf_keys() if not is_living(key) and not covered(key, decided)] == []


def test_no_key_of_the_table_is_unknown():
    config = load_config(DEMO_CONFIG)
    for stage in STAGES.values():
        for key in stage.keys:
            value_of(config, key)
    with pytest.raises(KeyError):
        value_of(config, "objective.gamma")


@pytest.mark.parametrize("name", STAGES)
def test_a_fingerprint_changes_with_what_decides_and_with_nothing_else(name):
    stage, base = STAGES[name], load_config(DEMO_CONFIG)
    others = {
        "seed": 2,
        "rollout.concurrency": 3,
        "reward.workers": 1,
        "server.port": 40000,
        "iterations": 9,
        "keep_exports": 3,
        "training.max_rollout_log_prob_difference": 0.5,
        "rollout.temperature": 0.5,
        "reward.format_weight": 0.2,
        "optimizer.learning_rate": 1e-5,
        "evaluation.temperature": 0.5,
        "objective.kl_prcp_coef": 0.5,
        "sft.steps": 3,
        "masked_image.ratio": 0.5,
        "model.recompute": "full",
        "data.max_prompt_tokens": 63,
    }
    for key, value in others.items():
        changed = load_config(DEMO_CONFIG, [f"{key}={value}"])
        decides = key in stage.decided_by or (covered(key, stage.decided_by) and not is_living(key))
        assert (stage.values(changed, Turn(1)) != stage.values(base, Turn(1))) == decides, key


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_sees_its_own_keys_alone(name):
    shown = view(load_config(DEMO_CONFIG), STAGES[name].keys, name)
    for key in ("keep_checkpoints", "iterations"):
        with pytest.raises(KeyNotListed, match=f"{name} reads {key}"):
            getattr(shown, key)


def test_what_another_makes_is_what_a_stage_reads(run):
    """Every path that a turn reads is made by an earlier turn, by one of the stages that the table names."""
    made = {}
    for stage, turn in all_turns(run):
        for spec in stage.needed_inputs(run.config, turn):
            path = spec.path(run, turn)
            if path != run.base:
                assert made[path].name in spec.made_by, (stage.name, turn, spec.name)
        made[stage.output(run, turn)] = stage
    assert len(made) == len(list(all_turns(run)))


def test_turns_of_a_run(run):
    turns = [(stage.number, turn.iteration) for stage, turn in all_turns(run)]
    assert turns[:5] == [(1, None), (1, None), (2, None), (3, None), (7, 0)]
    assert [number for stage, number in turns if stage == 7] == [0, 2, 4, 5]
    assert turns[5:9] == [(4, 1), (5, 1), (6, 1), (4, 2)]


def test_rollback_and_staleness(run):
    assert [run.rollback(number) for number in (1, 2, 3)] == [None, run.reference, run.trained(1)]
    assert paths(STAGES["stage5_train"], run, Turn(4))["rollback"] == run.trained(2)
    stale = RunDirectory(
        run.root, load_config(DEMO_CONFIG, ["rollout.max_staleness=1", "objective.importance_sampling_cap=2"])
    )
    hf = [paths(STAGES["stage4_rollout"], stale, Turn(number))["hf"] for number in (1, 2, 3)]
    assert hf == [run.sft, run.sft, run.exported(1)]


def test_maker(run):
    stage, turn = maker(run, run.exported(3))
    assert (stage.name, turn) == ("stage6_convert_to_hf", Turn(3))
    assert maker(run, run.root / "nothing") is None
    assert maker(run, run.exported(9)) is None and maker(run, run.exported(9), at_least=9)[1] == Turn(9)


def test_stages_read_the_configuration_through_their_view_only():
    """No stage file takes a key from the whole configuration."""
    for path in (ROOT / "stages").glob("stage*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert "whole_config" not in names and not re.search(r"load_config\(", path.read_text()), path


def test_sections_are_plain_data_in_recipes():
    values = STAGES["stage5_train"].values(load_config(DEMO_CONFIG), Turn(1))
    assert not any(isinstance(value, Section) for value in values.values())
    assert "max_rollout_log_prob_difference" not in values["training"] and "concurrency" not in values["rollout"]

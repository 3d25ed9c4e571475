"""Stages 4 and 7 with dynamic sampling and the soft overlong punishment: the real server, and a model that is right now
and then."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_papo.rollout.data_order import prompts_at
from megatron_papo.run.records import Prediction, Prompt, Rollout, groups_of, read_jsonl
from tests.helpers import DEMO_CONFIG, run_module, settings

DATA = settings("data.train.count=64", "data.evaluation.count=8")
SFT = settings("sft.processes=1", "sft.micro_batch_size=64")
GROUP_SIZE, BATCH, PER_ROUND, MAX_TOKENS = 4, 8, 6, 20
SMALL = settings(
    f"rollout.rollout_batch_size={BATCH}",
    f"rollout.group_size={GROUP_SIZE}",
    "training.global_batch_size=1",
    "evaluation.samples_per_prompt=2",
)
DYNAMIC = f"rollout.dynamic_sampling={{generation_batch_size: {PER_ROUND}}}"


@dataclass(frozen=True)
class World:
    """What the commands of this file are given."""

    data: Path
    evaluation: Path
    """Stage 1's output for the evaluation set."""
    untrained: Path
    trained: Path
    server_dir: Path
    root: Path

    def stage(self, name: str, hf: Path, *arguments, overrides=()):
        data = self.evaluation if "stage7" in name else self.data
        common = ["--data", data, "--hf", hf, "--server", self.server_dir]
        return run_module(name, "--config", DEMO_CONFIG, *SMALL, *settings(*overrides), *common, *arguments)

    def roll_out(self, name: str, *arguments, iteration=1, overrides=()) -> Path:
        output = self.root / name
        result = self.stage(
            "stages.stage4_rollout",
            self.trained,
            "--iteration",
            iteration,
            "--output",
            output,
            *arguments,
            overrides=overrides,
        )
        assert result.returncode == 0, result.stderr
        (self.root / f"{name}.txt").write_text(result.stdout)
        return output


@pytest.fixture(scope="module")
def world(server, server_dir, tmp_path_factory) -> World:
    """The demo's cold start: right in a third of its answers."""
    root = tmp_path_factory.mktemp("dapo")
    data, trained = root / "data", root / "sft"
    made = run_module("stages.stage1_prepare_data", "--config", DEMO_CONFIG, *DATA, "--output", data)
    assert made.returncode == 0, made.stderr
    evaluation = ["--evaluation-set", "evaluation", "--hf", data / "model", "--output", root / "evaluation"]
    made = run_module("stages.stage1_prepare_data", "--config", DEMO_CONFIG, *DATA, *evaluation)
    assert made.returncode == 0, made.stderr
    inputs = ["--data", data, "--hf", data / "model", "--output", trained]
    learned = run_module("stages.stage2_sft", "--config", DEMO_CONFIG, *DATA, *SFT, *inputs, processes=1)
    assert learned.returncode == 0, learned.stderr
    return World(data, root / "evaluation", data / "model", trained, server_dir, root)


@pytest.fixture(scope="module")
def first(world) -> Path:
    return world.roll_out("first", overrides=[DYNAMIC])


@pytest.fixture(scope="module")
def second(world, first) -> Path:
    return world.roll_out("second", "--previous", first, iteration=2, overrides=[DYNAMIC])


@pytest.fixture(scope="module")
def everything(world, first) -> Path:
    """All that the first iteration sampled: the same prompts without dynamic sampling."""
    return world.roll_out("everything", overrides=[f"rollout.rollout_batch_size={counts(first)['prompts_used']}"])


def counts(output: Path) -> dict:
    return json.loads((output / "manifest.json").read_text())["counts"]


def groups(output: Path) -> list[list[Rollout]]:
    return list(groups_of(read_jsonl(output / "rollouts.jsonl", Rollout), GROUP_SIZE, output))


def right(group) -> int:
    return sum(one.rewards.accuracy == 1.0 for one in group)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def unnumbered(group) -> list[dict]:
    return [one.model_dump(exclude={"group"}) for one in group]


def test_the_kept_groups_are_the_first_mixed_ones_of_all_that_was_sampled(first, everything):
    kept, sampled = groups(first), groups(everything)
    assert len(kept) == BATCH and all(0 < right(group) < GROUP_SIZE for group in kept)
    mixed = [group for group in sampled if 0 < right(group) < GROUP_SIZE]
    assert [unnumbered(group) for group in kept] == [unnumbered(group) for group in mixed[:BATCH]]
    assert any(right(group) == 0 for group in sampled)  # control: without dynamic sampling some teach nothing


def test_counts_say_what_was_used_and_dropped(world, first, everything):
    kept, sampled, told = groups(first), groups(everything), counts(first)
    assert told["rounds"] >= 2  # a round of 6 prompts cannot give 8 groups
    assert told["prompts_used"] == told["rounds"] * PER_ROUND == told["next_position"] == len(sampled)
    assert told["groups_all_wrong"] == sum(right(group) == 0 for group in sampled) > 0
    assert told["groups_all_right"] == sum(right(group) == GROUP_SIZE for group in sampled)
    assert told["groups_surplus"] == len(sampled) - BATCH - told["groups_all_wrong"] - told["groups_all_right"]
    for suffix, part in (("sampled", sampled), ("kept", kept)):
        for name in ("accuracy", "format"):
            assert told[f"{name}_{suffix}"] == pytest.approx(
                mean(getattr(one.rewards, name) for group in part for one in group)
            )
        assert told[f"responses_{suffix}"] == len(part) * GROUP_SIZE
    assert told["accuracy_sampled"] != told["accuracy_kept"]
    line = (world.root / "first.txt").read_text()
    for words in (
        f"{BATCH} groups kept of {told['prompts_used']} prompts used in {told['rounds']} round(s)",
        f"{told['groups_all_right']} all right, {told['groups_all_wrong']} all wrong, {told['groups_surplus']} surplus",
        f"accuracy {told['accuracy_sampled']:.3f} of all sampled, {told['accuracy_kept']:.3f} of the kept",
    ):
        assert words in line
    plain = counts(everything)
    assert (plain["rounds"], plain["prompts"], plain["prompts_used"], plain["groups_surplus"]) == (
        1,
        len(sampled),
        len(sampled),
        0,
    )
    assert plain["groups_all_wrong"] == told["groups_all_wrong"] and plain["next_position"] == len(sampled)


def test_the_next_iteration_starts_where_the_one_before_stopped(world, first, second):
    start, end = counts(first)["next_position"], counts(second)["next_position"]
    assert end - start == counts(second)["prompts_used"]
    prompts = read_jsonl(world.data / "prompts.jsonl", Prompt)
    order = [(epoch, prompts[index].id) for epoch, index in prompts_at(len(prompts), 0, end, seed=1)]
    for output, positions in ((first, range(start)), (second, range(start, end))):
        found = [order.index((group[0].epoch, group[0].prompt_id)) for group in groups(output)]
        assert found == sorted(set(found)) and set(found) <= set(positions)
    assert {group[0].prompt_id for group in groups(first)}.isdisjoint(group[0].prompt_id for group in groups(second))
    # control: without --previous it would have started at the second slice of the batch size, inside what the first one
    # used
    assert start != BATCH


def test_same_bytes_again(world, first, second):
    again = world.roll_out("first_again", overrides=[DYNAMIC])
    assert (again / "rollouts.jsonl").read_bytes() == (first / "rollouts.jsonl").read_bytes()
    again = world.roll_out("second_again", "--previous", again, iteration=2, overrides=[DYNAMIC])
    assert (again / "rollouts.jsonl").read_bytes() == (second / "rollouts.jsonl").read_bytes()
    other = world.roll_out(
        "other_limits", overrides=["rollout.dynamic_sampling={generation_batch_size: 6, lowest_accuracy: 0.3}"]
    )
    assert (other / "rollouts.jsonl").read_bytes() != (first / "rollouts.jsonl").read_bytes()  # control
    assert all(2 <= right(group) < GROUP_SIZE for group in groups(other))


def refused(result, *words):
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), result.stderr


def test_a_model_that_is_never_right_ends_with_the_counts(world, tmp_path):
    output = tmp_path / "output"
    command = ["stages.stage4_rollout", world.untrained, "--iteration", 1, "--output", output]
    hopeless = "rollout.dynamic_sampling={generation_batch_size: 6, max_rounds: 2}"
    words = (
        "after max_rounds = 2 rounds, 12 prompts gave 0 of the 8 groups wanted",
        "0 were all right, 12 all wrong",
        "cold start",
    )
    refused(world.stage(*command, overrides=[hopeless]), *words)
    assert not output.exists() and not output.with_name("output.partial").exists()
    # control, and the server is still of use: without dynamic sampling all those groups are rollouts
    result = world.stage(*command)
    assert result.returncode == 0, result.stderr
    assert len(groups(output)) == BATCH and all(right(group) == 0 for group in groups(output))


def test_mistakes_with_previous(world, first, second, everything, tmp_path):
    def second_after(*previous, overrides=(DYNAMIC,)):
        arguments = ["--iteration", 2, *previous, "--output", tmp_path / "output"]
        return world.stage("stages.stage4_rollout", world.trained, *arguments, overrides=overrides)

    missing = second_after()
    assert missing.returncode == 2 and "--previous" in missing.stderr and "Traceback" not in missing.stderr
    refused(second_after("--previous", tmp_path / "none"), str(tmp_path / "none"), "stages.stage4_rollout")
    refused(second_after("--previous", world.data), "expected the output of stage4_rollout")
    refused(second_after("--previous", second), "its iteration is 2, expected 1")
    refused(second_after("--previous", first, overrides=(DYNAMIC, "seed=2")), "its seed is 1, expected 2")
    old = tmp_path / "old"
    shutil.copytree(first, old)
    with open(old / "rollouts.jsonl", "a") as stream:
        stream.write("\n")
    refused(second_after("--previous", old), "differs from its manifest")


def test_previous_counts_only_with_dynamic_sampling(world, second, everything):
    """As run_all.sh gives it: not part of the fingerprint where it decides nothing."""
    again = ["--iteration", 1, "--output", everything, "--previous", world.root / "none"]
    overrides = [f"rollout.rollout_batch_size={counts(everything)['prompts']}"]
    result = world.stage("stages.stage4_rollout", world.trained, *again, overrides=overrides)
    assert result.returncode == 0 and "nothing to do" in result.stdout
    # control: with dynamic sampling it decides where the prompts start, so another one makes another output
    other = world.roll_out("first_of_more", overrides=[DYNAMIC, "rollout.rollout_batch_size=9"])
    again = ["--iteration", 2, "--output", second, "--previous", other]
    refused(world.stage("stages.stage4_rollout", world.trained, *again, overrides=[DYNAMIC]), "inputs.previous")


def test_long_responses_are_punished_in_training_and_not_in_evaluation(world, everything):
    buffer, penalty = 12, 0.5
    overlong = [f"reward.soft_overlong_buffer_tokens={buffer}", f"reward.soft_overlong_penalty={penalty}"]
    size = f"rollout.rollout_batch_size={counts(everything)['prompts']}"
    punished = world.roll_out("punished", overrides=[size, *overlong])
    pairs = [(a, b) for old, new in zip(groups(everything), groups(punished)) for a, b in zip(old, new)]
    for before, after in pairs:
        over = len(after.response_token_ids) - (MAX_TOKENS - buffer)
        expected = 0.0 if over <= 0 else -penalty * over / buffer
        assert after.rewards.overlong_penalty == pytest.approx(expected, abs=1e-12)
        assert after.rewards.overall == pytest.approx(before.rewards.overall + expected, abs=1e-12)
        assert after.model_dump(exclude={"rewards"}) == before.model_dump(exclude={"rewards"})
        assert after.rewards.accuracy == before.rewards.accuracy and before.rewards.overlong_penalty == 0
    assert len({after.rewards.overlong_penalty for _, after in pairs}) > 2  # different lengths, different punishments

    metrics, predictions = [], []
    for name, overrides in (("evaluated", []), ("evaluated_overlong", overlong)):
        output = world.root / name
        result = world.stage("stages.stage7_evaluate", world.trained, "--output", output, overrides=overrides)
        assert result.returncode == 0, result.stderr
        metrics.append(json.loads((output / "metrics.json").read_text()))
        predictions.append(read_jsonl(output / "predictions.jsonl", Prediction))
    assert metrics[0] == metrics[1] and predictions[0] == predictions[1]
    assert all(one.rewards.overlong_penalty == 0 for one in predictions[1])

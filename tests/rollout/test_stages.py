"""Stages 4 and 7 through the command line, on the demo's data, with the real server."""

import json
import shutil

import pytest

from megatron_papo.evaluation.accuracy import average_at_k
from megatron_papo.rollout.data_order import prompts_at
from megatron_papo.run.records import Prediction, Prompt, Rollout, groups_of, read_jsonl
from tests.helpers import DEMO_CONFIG, run_module, settings

SMALL = settings(
    "rollout.rollout_batch_size=16",
    "rollout.group_size=3",
    "rollout.max_response_tokens=6",
    "evaluation.samples_per_prompt=2",
)


def stage(name, *arguments, overrides=()):
    return run_module(name, "--config", DEMO_CONFIG, *SMALL, *settings(*overrides), *arguments)


@pytest.fixture(scope="module")
def common(server, server_dir, demo_data, tiny_hf):
    return ["--data", demo_data, "--hf", tiny_hf, "--server", server_dir]


@pytest.fixture(scope="module")
def evaluation_data(demo_data, tiny_hf, tmp_path_factory):
    """Stage 1's output for the demo's evaluation set."""
    output = tmp_path_factory.mktemp("stage1") / "evaluation"
    command = ["--evaluation-set", "evaluation", "--hf", tiny_hf, "--output", output]
    result = stage("stages.stage1_prepare_data", *command, overrides=["data.evaluation.count=32"])
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def rollouts(common, tmp_path_factory):
    output = tmp_path_factory.mktemp("stage4") / "rollouts"
    result = stage("stages.stage4_rollout", *common, "--iteration", 3, "--output", output)
    assert result.returncode == 0, result.stderr
    return output


def test_rollouts(rollouts, demo_data):
    records = read_jsonl(rollouts / "rollouts.jsonl", Rollout)
    prompts = read_jsonl(demo_data / "prompts.jsonl", Prompt)
    groups = list(groups_of(records, 3, rollouts))
    drawn = prompts_at(len(prompts), 2 * 16, 16, seed=1)
    assert [(g[0].epoch, g[0].prompt_id) for g in groups] == [(epoch, prompts[i].id) for epoch, i in drawn]
    by_id = {prompt.id: prompt for prompt in prompts}
    for one in records:
        prompt = by_id[one.prompt_id]
        assert (one.prompt_token_ids, one.prompt_num_tokens, one.images, one.answer) == (
            prompt.token_ids,
            prompt.num_tokens,
            prompt.images,
            prompt.answer,
        )
        assert len(one.rollout_log_probs) == len(one.response_token_ids) <= 6 and max(one.rollout_log_probs) <= 0
        ended = one.response_token_ids[-1] == end_of_turn(demo_data)
        assert one.finish_reason == ("stop" if ended else "length") and (ended or len(one.response_token_ids) == 6)
        assert one.iteration == 3 and one.temperature == 1.0 and one.top_p == 1.0
    assert len({one.sampling_seed for one in records}) == len(records)
    assert len({one.masked_image_seed for one in records}) == len(groups)
    assert len({tuple(one.response_token_ids) for one in groups[0]}) == 3
    manifest = json.loads((rollouts / "manifest.json").read_text())
    counts = manifest["counts"]
    assert (
        counts["responses_sampled"] == counts["responses_kept"] == 48
        and counts["prompts"] == counts["prompts_used"] == 16
    )
    assert counts["next_position"] == 3 * 16
    assert records[0].weight_version == manifest["recipe"]["inputs"]["hf"][:16]


def end_of_turn(demo_data):
    return json.loads((demo_data / "model" / "config.json").read_text())["eos_token_id"]


def test_same_bytes_again_whatever_the_batching(rollouts, common, tmp_path):
    again = stage("stages.stage4_rollout", *common, "--iteration", 3, "--output", rollouts)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    other = tmp_path / "other"
    result = stage(
        "stages.stage4_rollout", *common, "--iteration", 3, "--output", other, overrides=["rollout.concurrency=5"]
    )
    assert result.returncode == 0, result.stderr
    assert (other / "rollouts.jsonl").read_bytes() == (rollouts / "rollouts.jsonl").read_bytes()


def test_other_iteration_and_seed_give_other_responses(rollouts, common, tmp_path):
    """Control of the test above."""
    original = read_jsonl(rollouts / "rollouts.jsonl", Rollout)
    other = tmp_path / "other"
    result = stage("stages.stage4_rollout", *common, "--iteration", 3, "--output", other, overrides=["seed=2"])
    assert result.returncode == 0, result.stderr
    assert {tuple(r.response_token_ids) for r in read_jsonl(other / "rollouts.jsonl", Rollout)}.isdisjoint(
        tuple(r.response_token_ids) for r in original
    )
    refused = stage("stages.stage4_rollout", *common, "--iteration", 4, "--output", other, overrides=["seed=2"])
    assert refused.returncode == 2 and "arguments.iteration" in refused.stderr


def test_over_sampling_keeps_the_first_complete_groups_and_counts_the_rest(rollouts, common, demo_data, tmp_path):
    output = tmp_path / "over"
    overrides = ["rollout.over_sampling=0.45", "rollout.concurrency=6"]
    result = stage("stages.stage4_rollout", *common, "--iteration", 2, "--output", output, overrides=overrides)
    assert result.returncode == 0, result.stderr
    drawn_prompts = 24  # 16 * 1.45 = 23.2
    counts = json.loads((output / "manifest.json").read_text())["counts"]
    groups = list(groups_of(read_jsonl(output / "rollouts.jsonl", Rollout), 3, output))
    assert len(groups) == counts["prompts"] == 16
    assert (
        counts["prompts_used"] == drawn_prompts
        and counts["next_position"] == 2 * drawn_prompts
        and counts["prompts_cancelled"] == 8
    )
    assert counts["requests_cancelled_waiting"] > 0
    cancelled = counts["requests_cancelled_running"] + counts["requests_cancelled_waiting"]
    assert 0 < cancelled <= 8 * 3 and counts["responses_kept"] == counts["responses_sampled"] == 16 * 3
    assert f"8 prompts not finished, {cancelled} requests cancelled" in result.stdout
    prompts = read_jsonl(demo_data / "prompts.jsonl", Prompt)
    drawn = [(epoch, prompts[i].id) for epoch, i in prompts_at(len(prompts), drawn_prompts, drawn_prompts, seed=1)]
    places = [drawn.index((g[0].epoch, g[0].prompt_id)) for g in groups]
    assert places == sorted(places)
    # control: without it nothing is cancelled
    plain = json.loads((rollouts / "manifest.json").read_text())["counts"]
    assert plain["requests_cancelled_running"] == plain["requests_cancelled_waiting"] == plain["prompts_cancelled"] == 0
    both = stage(
        "stages.stage4_rollout", *common, "--iteration", 2, "--output", tmp_path / "x",
        overrides=["rollout.over_sampling=0.5", "rollout.dynamic_sampling={}"],
    )  # fmt: skip
    refused(both, tmp_path / "x", "over_sampling and dynamic_sampling", "do not go together")


def test_replicas_given_by_their_urls_give_the_same_bytes(server, rollouts, common, tmp_path):
    """--server with two URLs (of one server): groups are shared out, and the file is the same."""
    output = tmp_path / "two"
    inputs = [*common[:-1], f"{server.url},{server.url}/"]
    command = ["--config", DEMO_CONFIG, *SMALL, *inputs, "--iteration", 3, "--output", output]
    result = run_module("stages.stage4_rollout", *command, env={"SGLANG_API_KEY": server.api_key})
    assert result.returncode == 0, result.stderr
    assert (output / "rollouts.jsonl").read_bytes() == (rollouts / "rollouts.jsonl").read_bytes()


def test_evaluation(server_dir, evaluation_data, tiny_hf, tmp_path):
    output = tmp_path / "evaluation"
    common = ["--data", evaluation_data, "--hf", tiny_hf, "--server", server_dir]
    result = stage("stages.stage7_evaluate", *common, "--output", output)
    assert result.returncode == 0, result.stderr
    predictions = read_jsonl(output / "predictions.jsonl", Prediction)
    metrics = json.loads((output / "metrics.json").read_text())
    prompts = read_jsonl(evaluation_data / "prompts.jsonl", Prompt)
    assert (
        len(predictions) == 2 * 2 * len(prompts)
        and metrics["prompts"] == len(prompts)
        and metrics["samples_per_prompt"] == 2
    )
    for image, suffix in (("original", ""), ("masked", "_masked")):
        part = [one for one in predictions if one.image == image]
        assert [(one.prompt_id, one.sample) for one in part] == [
            (prompt.id, sample) for prompt in prompts for sample in (0, 1)
        ]
        assert metrics["accuracy" + suffix] == average_at_k((one.prompt_id, one.rewards.accuracy) for one in part)
        mean_tokens = sum(len(one.response_token_ids) for one in part) / len(part)
        assert metrics["mean_response_tokens" + suffix] == pytest.approx(mean_tokens)
    original, masked = (
        [one.response_token_ids for one in predictions if one.image == image] for image in ("original", "masked")
    )
    assert original != masked  # the same seeds, another picture
    smaller = tmp_path / "smaller"
    overrides = [
        "evaluation.max_pixels=3136",
        "data.min_pixels=784",
        "evaluation.masked_images=false",
        "evaluation.samples_per_prompt=1",
    ]
    result = stage("stages.stage7_evaluate", *common, "--output", smaller, overrides=overrides)
    assert result.returncode == 0, result.stderr
    assert {one.image for one in read_jsonl(smaller / "predictions.jsonl", Prediction)} == {"original"}


def copied(demo_data, tmp_path):
    shutil.copytree(demo_data, tmp_path / "data")
    return tmp_path / "data"


def refused(result, output, *words):
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), result.stderr
    assert not output.exists() and not output.with_name(output.name + ".partial").exists()


@pytest.mark.parametrize("name", ["stages.stage4_rollout", "stages.stage7_evaluate"])
def test_truncated_prompts(demo_data, evaluation_data, tiny_hf, tmp_path, name):
    data, output = copied(demo_data if "stage4" in name else evaluation_data, tmp_path), tmp_path / "output"
    file = data / "prompts.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    iteration = ["--iteration", 1] if "stage4" in name else []
    result = stage(
        name, "--data", data, "--hf", tiny_hf, "--server", tmp_path / "server", *iteration, "--output", output
    )
    refused(result, output, str(file), "differs from its manifest")
    assert not (tmp_path / "server").exists()  # noticed before a server was started


def test_other_tokenizer_is_refused(demo_data, checkpoints, tmp_path):
    foreign, output = tmp_path / "foreign", tmp_path / "output"
    shutil.copytree(checkpoints.first, foreign)
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<|other|>"
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    arguments = [
        "--data",
        demo_data,
        "--hf",
        foreign,
        "--server",
        tmp_path / "server",
        "--iteration",
        1,
        "--output",
        output,
    ]
    refused(stage("stages.stage4_rollout", *arguments), output, "tokenizer.json", str(demo_data))


def test_inputs_that_are_not_there(demo_data, tiny_hf, tmp_path):
    output = tmp_path / "output"
    end = ["--server", tmp_path / "server", "--output", output]
    result = stage("stages.stage4_rollout", "--data", tmp_path / "none", "--hf", tiny_hf, "--iteration", 1, *end)
    refused(result, output, str(tmp_path / "none"), "stage1_prepare_data")
    result = stage("stages.stage7_evaluate", "--data", demo_data, "--hf", tmp_path / "none", *end)
    refused(result, output, str(tmp_path / "none"))
    nobody = ["--server", "http://127.0.0.1:9", "--output", output]
    result = stage("stages.stage4_rollout", "--data", demo_data, "--hf", tiny_hf, "--iteration", 1, *nobody)
    refused(result, output, "http://127.0.0.1:9", "does not answer")

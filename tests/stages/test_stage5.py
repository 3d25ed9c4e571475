"""Stage 5 as a user runs it, in one process, on the rollouts of a small real run: options that change what the stage
does."""

import json

import pytest

from megatron_papo.config_files import load_config
from megatron_papo.run.run_config import write_run
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.training.metrics_log import read_metrics
from tests.helpers import DEMO_CONFIG, run_module, settings

ONE_PROCESS = [
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.sequence_parallel=false",
]
NERVOUS = [
    "hacking_guard.warmup_steps=1",
    "hacking_guard.level_factor=1.000001",
    "hacking_guard.variance_factor=1.000001",
    "hacking_guard.signs_needed=1",
    "hacking_guard.patience_steps=1",
    "hacking_guard.cooldown_steps=0",
    "training.global_batch_size=4",
]
"""A guard that takes the noise of the first steps for hacking."""


def arguments(run, output, *overrides, megatron=None, iteration=1, reference=True, extra=()):
    """Stage 5 on the outputs of a run, with its configuration, but for what may not change in it: frozen keys."""
    start = megatron or run / "reference"
    rollouts = run / "iterations/0001/rollouts"
    paths = ["--data", run / "data", "--rollouts", rollouts, "--megatron", start, "--rollback", start]
    paths += ["--reference", run / "reference"] * reference
    of_run = ["--config", run / "config.yaml", *settings(*ONE_PROCESS, *overrides)]
    return [*of_run, *paths, "--iteration", iteration, "--output", output, *extra]


def train(run, output, *overrides, processes=None, **options):
    """-> every line of metrics.jsonl, what was printed."""
    result = run_module("stages.stage5_train", *arguments(run, output, *overrides, **options), processes=processes)
    assert result.returncode == 0, result.stderr[-3000:]
    return [
        json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()
    ], result.stdout + result.stderr


@pytest.fixture(scope="module")
def cached(small_run):
    """The metrics of the run itself: masked branch cached, TP2 x PP2."""
    return read_metrics(small_run / "iterations/0001/megatron/metrics.jsonl")


def test_metrics_have_their_parts(cached):
    for row in cached:
        assert (
            row["kl_prcp_variance"] > 0 and 0 < row["rollout_effective_sample_size"] <= 1 and row["rollout_kl_k3"] >= 0
        )
        assert row["rollout_log_prob_difference_max"] >= row["rollout_log_prob_difference_mean"] > 0
        assert (
            abs(row["sampling_bias"]) < 6 * row["sampling_bias_error"] + 0.02
        )  # the vision tokens are forbidden: a little mass is missing
        assert row["kl_prcp_coef"] == 0.01 and row["attempt"] == 1
        assert (
            row["parity_log_prob_difference_mean"] < 1e-5 < row["rollout_log_prob_difference_mean"]
        )  # over the tokens the server may sample


def test_the_papers_objective_without_a_reference(small_run, cached, tmp_path):
    """No --reference at all; gradient through both branches, exact KL and entropies; and top_p below 1 is said to
    bias."""
    metrics, printed = train(
        small_run,
        tmp_path / "out",
        "objective.kl_ref_coef=0",
        "objective.masked_branch=recompute_with_grad",
        "objective.kl_prcp_estimator=exact",
        "objective.entropy_estimator=exact",
        "objective.sft_coef=0.001",
        "rollout.top_p=0.99",
        reference=False,
    )
    assert all("kl_ref" not in row for row in metrics) and all("kl_ref" in row for row in cached)
    first = metrics[0]
    assert first["entropy"] == pytest.approx(
        cached[0]["entropy"], rel=1e-4
    )  # the first step starts from the same weights
    assert first["masked_image_entropy"] == pytest.approx(cached[0]["masked_image_entropy"], rel=1e-4)
    assert first["kl_prcp"] != pytest.approx(cached[0]["kl_prcp"], rel=1e-3)  # exact, not k3
    assert (first["sft_loss"] > 0) == (first["accuracy"] > 0)
    assert "rollout.top_p 0.99: the sampled tokens are" in printed


def test_recomputed_masked_branch_follows_the_weights(small_run, cached, tmp_path):
    metrics, printed = train(small_run, tmp_path / "out", "objective.masked_branch=recompute")
    assert metrics[0]["masked_image_entropy"] == pytest.approx(cached[0]["masked_image_entropy"], rel=1e-4)
    assert metrics[0]["kl_prcp"] == pytest.approx(cached[0]["kl_prcp"], rel=1e-3)
    assert (
        abs(metrics[1]["masked_image_entropy"] / cached[1]["masked_image_entropy"] - 1) > 1e-5
    )  # the weights have moved in between
    assert "rollout.top_p" not in printed


def test_pictures_spread_over_the_ranks_train_alike(small_run, cached, tmp_path):
    metrics, _ = train(
        small_run,
        tmp_path / "out",
        "parallel.tensor_model_parallel_size=2",
        "parallel.vision_tower=spread",
        processes=2,
    )
    for ours, theirs in zip(metrics, cached, strict=True):
        for name in ("loss", "gradient_norm", "entropy", "kl_prcp"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name


def test_steps_and_sweeps_are_accounted_for(small_run, cached, tmp_path):
    """Twice the pass over the same rollouts, without gradient, in the sweeps; group layout: the prompts once."""
    one, two = cached
    every, later = one["tokens_computed"] + two["tokens_computed"], two["tokens_computed"]
    assert one["sweep_tokens_computed"] == 2 * every + later  # reference and masked, old policy of the second step
    assert one["tokens_computed"] == one["tokens_naive"] and one["tokens_per_second"] == pytest.approx(
        one["tokens_naive"] / one["seconds"]
    )
    metrics, _ = train(small_run, tmp_path / "out", "training.layout=group", "training.max_tokens_per_micro_batch=1000")
    assert metrics[0]["tokens_naive"] == one["tokens_naive"] > 1.5 * metrics[0]["tokens_computed"]
    assert metrics[0]["model_flops"] < one["model_flops"] and metrics[0]["loss"] == pytest.approx(
        one["loss"], rel=1e-3, abs=1e-6
    )
    assert "mfu" not in one and "peak_memory_bytes" not in one  # those are for GPUs


def test_annealing_and_filtering_reach_the_run(small_run, cached, tmp_path):
    metrics, _ = train(
        small_run,
        tmp_path / "out",
        "objective.kl_prcp_annealing={end: 0.0, steps: 2}",
        "objective.overlong_filtering=true",
    )
    assert [row["kl_prcp_coef"] for row in metrics] == pytest.approx([0.01, 0.005])
    assert metrics[0]["kl_prcp"] != cached[0]["kl_prcp"]  # a model after four steps of cold start is often cut off
    assert sum(row["cut_off"] for row in cached) > 0


def test_one_step_needs_no_sweep_of_the_old_policy(small_run, cached, tmp_path):
    """The update says what the old policy was: the same checks of the rollouts, a ratio of exactly 1."""
    [row], _ = train(
        small_run, tmp_path / "out", "training.global_batch_size=16", "objective.importance_sampling_cap=2.0"
    )
    for name in ("rollout_log_prob_difference_mean", "rollout_kl_k3", "sampling_bias", "rollout_effective_sample_size"):
        assert row[name] == pytest.approx(cached[0][name], rel=1e-4, abs=1e-7), name
    assert row["kl_old"] == 0 == row["clip_fraction_high"] and row["parity_log_prob_difference_mean"] < 1e-5
    assert cached[0]["kl_old"] == 0  # nor does the first of two
    assert 0 < abs(cached[1]["kl_old"])  # control: a second step is another policy than the old one
    assert row["kl_prcp"] == pytest.approx((cached[0]["kl_prcp"] + cached[1]["kl_prcp"]) / 2, rel=0.2)


@pytest.fixture(scope="module")
def rolled_back(small_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("stage5") / "rolled_back"
    return output, *train(
        small_run,
        output,
        *NERVOUS,
        "hacking_guard.action=rollback_and_lower_gamma",
        "hacking_guard.lowest_gamma_scale=0.2",
    )


def test_rollback_goes_back_exactly_and_lowers_gamma(rolled_back):
    output, metrics, printed = rolled_back
    decisions = [json.loads(line) for line in (output / "guard.jsonl").read_text().splitlines()]
    assert decisions[0]["action"] == "rollback" and decisions[0]["kl_prcp_scale"] == 0.1
    assert "hacking guard: step" in printed and "kl_prcp_coef 0.1 x its value" in printed
    attempts = {
        attempt: [row for row in metrics if row["attempt"] == attempt]
        for attempt in {row["attempt"] for row in metrics}
    }
    last = attempts[max(attempts)]
    assert [row["step"] for row in last] == [1, 2, 3, 4]
    again = next(row for row in metrics if row["attempt"] == 2 and row["step"] == 1)
    first = metrics[0]
    for name in ("kl_prcp", "entropy", "kl_ref", "policy_loss", "learning_rate"):  # the same weights as at the start
        assert again[name] == first[name], name
    assert (first["kl_prcp_coef"], again["kl_prcp_coef"]) == (0.01, 0.001) and again["loss"] != first["loss"]
    second = [row for row in metrics if row["step"] == 2]
    assert second[0]["gradient_norm"] != second[1]["gradient_norm"]
    assert read_metrics(output / "metrics.jsonl") == last
    assert json.loads((output / "manifest.json").read_text())["counts"]["attempts"] == max(attempts)


def test_the_guard_decides_alike_every_time_and_is_resumed(rolled_back, small_run, tmp_path):
    output, metrics, _ = rolled_back
    again, _ = train(
        small_run,
        tmp_path / "again",
        *NERVOUS,
        "hacking_guard.action=rollback_and_lower_gamma",
        "hacking_guard.lowest_gamma_scale=0.2",
    )
    assert (tmp_path / "again/guard.jsonl").read_bytes() == (output / "guard.jsonl").read_bytes()
    assert (tmp_path / "again/__0_0.distcp").read_bytes() == (output / "__0_0.distcp").read_bytes()
    later, _ = train(
        small_run,
        tmp_path / "later",
        *NERVOUS,
        "hacking_guard.action=rollback_and_lower_gamma",
        "hacking_guard.lowest_gamma_scale=0.2",
        megatron=output,
        iteration=2,
    )
    assert later[0]["step"] == 5 and later[0]["kl_prcp_coef"] == pytest.approx(
        0.01 * json.loads((output / "guard.jsonl").read_text().splitlines()[-1])["kl_prcp_scale"]
    )


def test_rollback_to_an_earlier_checkpoint_leaves_these_rollouts(small_run, tmp_path):
    """Iteration 2 goes back to where iteration 1 started: its output holds those weights, and a lower gamma."""
    train(
        small_run,
        tmp_path / "out",
        *NERVOUS,
        "hacking_guard.action=rollback_and_lower_gamma",
        megatron=small_run / "iterations/0001/megatron",
        iteration=2,
        extra=["--rollback", small_run / "reference"],
    )
    counts = json.loads((tmp_path / "out/manifest.json").read_text())["counts"]
    assert counts["total_steps"] == 0 and counts["guard_interventions"] == 1
    result = run_module(
        "stages.stage6_convert_to_hf", "--run", small_run, "--iteration", 1,
        "--megatron", tmp_path / "out", "--output", tmp_path / "hf",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (small_run / "sft/model.safetensors").read_bytes()
    assert (small_run / "iterations/0001/hf/model.safetensors").read_bytes() != (
        small_run / "sft/model.safetensors"
    ).read_bytes()


def test_stop_saves_nothing(small_run, tmp_path):
    result = run_module(
        "stages.stage5_train", *arguments(small_run, tmp_path / "out", *NERVOUS, "hacking_guard.action=stop")
    )
    assert (
        result.returncode == 2
        and "error: hacking guard: step" in result.stderr
        and "nothing of this iteration was saved" in result.stderr
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_parity_with_the_server_is_a_gate(small_run, tmp_path):
    """Within rounding it passes any sensible limit; past the limit nothing is trained and the worst tokens are
    named."""
    limit = "training.max_rollout_log_prob_difference"
    result = run_module("stages.stage5_train", *arguments(small_run, tmp_path / "out", f"{limit}=1e-12"))
    assert (
        result.returncode == 2
        and "error: log-probs of the rollouts differ by" in result.stderr
        and "token" in result.stderr
    )
    assert not (tmp_path / "out").exists()
    train(small_run, tmp_path / "out", f"{limit}=1e-4")


def test_a_missing_reference_is_named(small_run, tmp_path):
    """It is needed because objective.kl_ref_coef is 0.01: another test trains without both."""
    result = run_module("stages.stage5_train", *arguments(small_run, tmp_path / "out", reference=False))
    assert result.returncode == 2 and "error: without --run needed: --reference\n" in result.stderr
    missing = ["--reference", tmp_path / "none"]
    result = run_module("stages.stage5_train", *arguments(small_run, tmp_path / "out", reference=False, extra=missing))
    command = (
        f"error: {tmp_path / 'none'}: not there: make it with: .venv/bin/python -m stages.stage3_convert_to_megatron"
    )
    assert result.returncode == 2 and command in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_does_not_have_is_named_with_the_command_that_makes_it(tmp_path):
    """The run's own paths; and its frozen keys stay as they are."""
    run = tmp_path / "run"
    write_run(RunDirectory(run, load_config(DEMO_CONFIG)), [], "a test")
    before = sorted(run.iterdir())
    for number, missing, command in (
        (1, "reference", f".venv/bin/python -m stages.stage3_convert_to_megatron --run {run}"),
        (
            2,
            "iterations/0001/megatron",
            ".venv/bin/python -m tools.torchrun --standalone --nproc-per-node 4 -m"
            f" stages.stage5_train --run {run} --iteration 1",
        ),
    ):
        result = run_module("stages.stage5_train", "--run", run, "--iteration", number)
        assert result.returncode == 2
        assert result.stderr == f"error: {run / missing}: not there: make it with: {command}\n"
    frozen = ["--set", "objective.kl_ref_coef=0"]
    result = run_module("stages.stage5_train", "--run", run, "--iteration", 1, *frozen)
    assert result.returncode == 2
    assert "objective.kl_ref_coef is 0.01 in this run, not 0.0: choose another --name" in result.stderr
    assert sorted(run.iterdir()) == before

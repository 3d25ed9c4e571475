"""An iteration of three steps in one process: its first step says itself what the old policy was.

Expected is what a sweep of every rollout with the first weights gives. NOT covered here: more than one process
(tests/training/test_papo_step.py, case `one step`), the checks of the rollouts (tests/stages/test_stage5.py).
"""

import pytest
import torch

from megatron_papo.distributed import process_groups
from tests.training.iteration import GROUP, LAYOUTS, METRICS, STEPS, Iteration

WEIGHED = [
    "objective.average=token",
    "objective.policy_tokens={sensitivity_share: 0.4}",
    "objective.trajectory_shaping={lowest: 0.7}",
]


def no_sensitivity(constants):
    """As if all tokens depended on the picture alike: the first of each response are selected."""
    return [
        of_step | {"old_sensitivity": [torch.zeros_like(row) for row in of_step["old_sensitivity"]]}
        for of_step in constants
    ]


def no_sweep(constants):
    """Each step its own old policy: wrong from the second on."""
    return [{name: rows for name, rows in of_step.items() if name != "old_log_probs"} for of_step in constants]


@pytest.fixture(params=LAYOUTS)
def iteration(request, tmp_path):
    yield Iteration(tmp_path, request.param)
    process_groups.destroy()


def test_the_first_step_says_what_the_old_policy_was(iteration):
    rollouts = STEPS * 2 * GROUP
    metrics, weights = iteration.train()
    assert iteration.swept == rollouts * (1 + 1) + rollouts * (STEPS - 1) // STEPS  # reference, masked, old policy
    assert iteration.swept == sum(iteration.passes.plan.count_at_start(n) * 2 * GROUP for n in range(STEPS))
    expected, expected_weights = iteration.train(iteration.every_sweep)
    for ours, theirs in zip(metrics, expected, strict=True):
        for name in METRICS:  # fp32: another micro-batch's rounding
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    assert metrics[0]["kl_old"] == 0 < abs(metrics[1]["kl_old"])
    assert (weights - expected_weights).abs().max() < 1e-5
    wrong, wrong_weights = iteration.train(no_sweep)
    assert wrong[0] == metrics[0] and abs(wrong[1]["loss"] - metrics[1]["loss"]) > 1e-4
    assert (wrong_weights - expected_weights).abs().max() > 1e-4


@pytest.mark.parametrize("formula", ["k3", "jsd"])
def test_tokens_are_weighed_by_sweeps_before_the_step(tmp_path, formula):
    """By the iteration's first weights or by each step's: the same in the first step, not in the later ones."""
    found = {}
    for weights in ("old", "current"):
        sensitivity = f"objective.sensitivity={{formula: {formula}, weights: {weights}}}"
        (tmp_path / weights).mkdir()
        iteration = Iteration(tmp_path / weights, "group", *WEIGHED, sensitivity)
        found[weights], _ = iteration.train()
        for step, metrics in zip(iteration.passes.steps, found[weights], strict=True):
            lengths = [row.response_length for row in step.all]
            kept = sum(-(-4 * length // 10) for length in lengths)
            assert metrics["policy_tokens_share"] == pytest.approx(kept / sum(lengths), rel=1e-6)
        if weights == "old":
            without, _ = iteration.train(no_sensitivity)
            assert abs(without[0]["policy_loss"] - found["old"][0]["policy_loss"]) > 1e-4  # the control
        process_groups.destroy()
    old, current = found["old"], found["current"]
    assert old[0]["loss"] == pytest.approx(current[0]["loss"], rel=1e-5, abs=1e-6)
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(old[1:], current[1:], strict=True)) > 1e-4


def test_what_is_not_swept_is_not_accounted_for(iteration):
    passes = iteration.passes
    of_rollouts = [sum(len(row.prompt_token_ids) + row.response_length for row in step.all) for step in passes.steps]
    sweeps = passes.account_sweeps(1.0)
    assert sweeps["sweep_tokens_naive"] == 2 * sum(of_rollouts) + sum(of_rollouts[1:])
    patches = [
        sum(GROUP * grid[1] * grid[2] for row in step.all[::GROUP] for grid in row.grids) for step in passes.steps
    ]
    assert sweeps["sweep_patches_naive"] == 2 * sum(patches) + sum(patches[1:])
    assert sweeps["sweep_tokens_computed"] < sweeps["sweep_tokens_naive"] or passes.config.training.layout == "plain"

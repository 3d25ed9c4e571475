"""An iteration of three steps in one process: its first step says itself what the old policy was.

Expected is what a sweep of every rollout with the first weights gives. NOT covered here: more than one process
(tests/training/test_papo_step.py, case `one step`), the checks of the rollouts (tests/stages/test_stage5.py).
"""

import pytest

from megatron_papo.distributed import process_groups
from tests.training.iteration import GROUP, LAYOUTS, METRICS, STEPS, Iteration


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

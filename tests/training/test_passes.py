"""An iteration of three steps in one process: its first step says itself what the old policy was.

Expected is what a sweep of every rollout with the first weights gives. NOT covered here: more than one process
(tests/training/test_papo_step.py, case `one step`), the checks of the rollouts (tests/stages/test_stage5.py).
"""

from dataclasses import replace

import pytest
import torch

from megatron_papo.distributed import process_groups
from tools.gpu_acceptance.task import Shape, Task

STEPS, GROUP = 3, 3
SHAPE = Shape(STEPS * 2, 40, 8)
LAYOUTS = {"group": "training.max_tokens_per_micro_batch=150", "plain": "training.micro_batch_size=4"}
METRICS = ("loss", "policy_loss", "kl_ref", "kl_prcp", "entropy", "clip_fraction_high", "gradient_norm")


class Iteration:
    """Makes the steps from the same weights, again and again."""

    def __init__(self, directory, layout):
        from megatron_papo.model.hf_config import read_hf_config
        from megatron_papo.training.collator import Collator
        from megatron_papo.training.passes import Passes, PassPlan, split_into_steps
        from megatron_papo.training.policy import Policy

        task = Task(directory, "cpu", True)
        hf_dir, self.megatron = task.checkpoint()
        hf = read_hf_config(hf_dir)
        changes = [
            *SHAPE.changes,
            f"rollout.group_size={GROUP}",
            f"rollout.rollout_batch_size={SHAPE.groups}",
            f"training.global_batch_size={SHAPE.groups // STEPS}",
            f"training.layout={layout}",
            LAYOUTS[layout],
            "objective.average=micro_batch",
            "objective.importance_sampling_cap=1.5",
        ]
        config = task.config("float32", changes)
        process_groups.initialize(config.parallel)
        rows = task.rows(hf, config, directory / "pictures", SHAPE)
        rows = [  # the server's log-probs a little off the policy's, so that the importance weights are some
            replace(row, rollout=row.rollout.model_copy(update={"rollout_log_probs": [-5.0] * row.response_length}))
            for row in rows
        ]
        steps = split_into_steps(rows, config, 0, 1)
        cpu = torch.device("cpu")
        collator = Collator(config, hf, directory / "pictures", with_pixels=True, device=cpu, dtype=torch.float32)
        self.gone_over: list[int] = []
        self.passes = Passes(config, hf, steps, PassPlan.of(config.objective), collator, self.gone_over.append)
        self.policy = Policy(config, hf)
        self.policy.load_reference(self.megatron)

    def train(self, change):
        """change: from the constants of the steps to others. -> metrics of each step, all weights."""
        from megatron_papo.training.loss_recipe import loss_recipe

        passes, policy = self.passes, self.policy
        policy.load(self.megatron)
        self.gone_over.clear()
        of_reference = passes.sweep_reference(policy)
        of_policy, _ = passes.sweep_policy(policy.model)
        self.swept = sum(self.gone_over)
        constants = change([one | other for one, other in zip(of_reference, of_policy, strict=True)])
        metrics = []
        for number, step in enumerate(passes.steps):
            recipe = loss_recipe(passes.config.objective, number)
            update = passes.update(policy, step, constants[number], recipe, 2e-3)
            metrics.append({**update.metrics, "gradient_norm": update.gradient_norm})
        return metrics, torch.cat([weight.detach().flatten() for weight in policy.model.parameters()])

    def every_sweep(self, constants):
        """As if the old policy had been swept over the first step's rollouts, too."""
        swept = self.passes.sweep(self.policy.model, self.passes.steps[0].own, ["original"])["original"]
        return [constants[0] | {"old_log_probs": swept.log_probs}, *constants[1:]]


def no_sweep(constants):
    """Each step its own old policy: wrong from the second on."""
    return [{name: rows for name, rows in of_step.items() if name != "old_log_probs"} for of_step in constants]


@pytest.fixture(params=LAYOUTS)
def iteration(request, tmp_path):
    yield Iteration(tmp_path, request.param)
    process_groups.destroy()


def test_the_first_step_says_what_the_old_policy_was(iteration):
    rollouts = STEPS * 2 * GROUP
    metrics, weights = iteration.train(lambda constants: constants)
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

"""An iteration of three steps in one process, made from the same weights again and again."""

from dataclasses import replace

import torch

from megatron_papo.distributed import process_groups
from tools.gpu_acceptance.task import Shape, Task

STEPS, GROUP = 3, 3
SHAPE = Shape(STEPS * 2, 40, 8)
LAYOUTS = {"group": "training.max_tokens_per_micro_batch=150", "plain": "training.micro_batch_size=4"}
METRICS = ("loss", "policy_loss", "kl_ref", "kl_prcp", "entropy", "clip_fraction_high", "gradient_norm")


class Iteration:
    """Makes the steps from the same weights, again and again."""

    def __init__(self, directory, layout, *settings):
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
            *settings,
        ]
        config = task.config("float32", changes)
        process_groups.initialize(config.parallel)
        rows = task.rows(hf, config, directory / "pictures", SHAPE)
        rows = [  # the server's log-probs a little off the policy's, so that the importance weights are some
            replace(row, rollout=row.rollout.model_copy(update={"rollout_log_probs": [-5.0] * row.response_length}))
            for row in rows
        ]
        steps = split_into_steps(rows, config, 0, 1)
        self.policy = Policy(config, hf)
        self.policy.load_reference(self.megatron)
        collator = Collator(
            config,
            hf,
            directory / "pictures",
            with_pixels=True,
            device=torch.device("cpu"),
            dtype=torch.float32,
            encoded=self.policy.encoded_pictures,
        )
        self.gone_over: list[int] = []
        self.passes = Passes(config, hf, steps, PassPlan.of(config.objective), collator, self.gone_over.append)

    def train(self, change=lambda constants: constants, load=True):
        """change: from the constants of the steps to others. -> metrics of each step, all weights."""
        passes, policy = self.passes, self.policy
        if load:
            policy.load(self.megatron)
        self.gone_over.clear()
        of_reference = passes.sweep_reference(policy)
        of_policy, _ = passes.sweep_policy(policy.model)
        self.swept = sum(self.gone_over)
        constants = change([one | other for one, other in zip(of_reference, of_policy, strict=True)])
        metrics = [self.step(number, of_step) for number, of_step in enumerate(constants)]
        return metrics, self.weights()

    def step(self, number, constants):
        from megatron_papo.training.loss_recipe import loss_recipe

        recipe = loss_recipe(self.passes.config.objective, number)
        update = self.passes.update(self.policy, self.passes.steps[number], constants, recipe, 2e-3)
        return {**update.metrics, "gradient_norm": update.gradient_norm}

    def weights(self):
        return torch.cat([weight.detach().flatten() for weight in self.policy.model.parameters()])

    def every_sweep(self, constants):
        """As if the old policy had been swept over the first step's rollouts, too."""
        swept = self.passes.sweep(self.policy.model, self.passes.steps[0].own, ["original"])["original"]
        return [constants[0] | {"old_log_probs": swept.log_probs}, *constants[1:]]

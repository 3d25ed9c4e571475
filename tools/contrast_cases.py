"""CPPO's contrastive term on a file's cases: what tools.check_objective does with those that have `views`.

In float64 from the logits on: 1 / temperature multiplies the rounding of fp32 log-probs to some 1e-5. What a training
step computes in fp32 is compared with loops in tests/training/test_papo_step.py.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GRADIENT_FLOOR = 0.01
"""Of the largest entry."""


def run_contrast(case: dict, **changes: Any) -> tuple[float, "list[torch.Tensor]", "torch.Tensor"]:
    """Run one case through our objective, with the average of the authors' micro-batches.

    Args:
        case: of the file: logits of the policy with the picture, and of `keep` and `remove` in its views.
        changes: fields of objective.contrast that differ from the case's.

    Returns the loss, its gradient [B, T, V] with respect to the logits of the three views (the picture, keep, remove),
    and which tokens are selected, [B, T].
    """
    import torch

    from megatron_papo.config import ContrastConfig, ObjectiveConfig, SensitivityConfig
    from megatron_papo.objective.papo_loss import (
        Averages,
        MaskedImageTokens,
        ResponseTokens,
        StepCounts,
        papo_loss,
    )
    from megatron_papo.objective.sensitivity import TwoViews
    from megatron_papo.training.collator import pad_responses
    from megatron_papo.training.loss_recipe import contrast_weights_of, loss_recipe, sensitivity_of

    switches, mask = case["cppo"], torch.tensor(case["response_mask"], dtype=torch.float64)
    contrast = {
        "coefficient": switches["cpl_loss_coef"],
        "temperature": switches["cpl_tau"],
        "share": float(switches["cpl_vision_top_percent"]) if switches["cpl_use_vision_mask"] else None,
        "positive_advantages": switches["cpl_use_advantage_gating"],
        "average": "dealt",
    }
    objective = ObjectiveConfig(
        kl_prcp_coef=0.0,
        kl_ref_coef=0.0,
        masked_branch="recompute_with_grad",
        sensitivity=SensitivityConfig(formula="entropy_gap", weights="current"),
        average_ranks=1,
        average_micro_batch_size=case["micro_batch"],
        contrast=ContrastConfig(**contrast | changes),
    )
    views = {view["name"]: view["logits"] for view in case["views"]}
    logits = [
        torch.tensor(values, dtype=torch.float64).requires_grad_()
        for values in (case["logits"], views["keep"], views["remove"])
    ]
    positions = mask.flatten().nonzero()[:, 0]
    sampled = torch.tensor(case["responses"]).flatten()[positions]
    own, kept, removed = (x.flatten(0, 1)[positions].log_softmax(-1) for x in logits)

    def entropy(log_probs: torch.Tensor) -> torch.Tensor:
        return -(log_probs.exp() * log_probs).sum(-1).detach()

    def table(log_probs: torch.Tensor) -> torch.Tensor:
        return pad_responses([log_probs.gather(-1, sampled[:, None])[:, 0]], mask)

    views_of_tokens = TwoViews(own[:, 0], removed[:, 0], entropy(own), entropy(removed))
    sensitivity = sensitivity_of(objective, views_of_tokens).split([int(length) for length in mask.sum(dim=1)])
    advantages = [row[0] for row in case["advantages"]]
    weights = pad_responses(contrast_weights_of(objective, sensitivity, advantages), mask)
    tokens = ResponseTokens(
        log_probs=table(own),
        old_log_probs=table(own).detach(),
        advantages=mask.new_zeros(len(mask), 1),
        mask=mask,
        masked_image=MaskedImageTokens(table(removed)),
        kept_image=MaskedImageTokens(table(kept)),
        contrast_weights=weights,
    )
    recipe = loss_recipe(objective, step=0)
    averages = Averages(StepCounts(mask.sum().item(), len(mask)))
    loss, _ = papo_loss(tokens, averages, recipe.coefficients, recipe.formulas)
    return loss.item(), list(torch.autograd.grad(loss, logits)), (weights > 0).double()


def contrast_errors(case: dict, **changes: Any) -> dict[str, float]:
    """Return the largest relative error of the loss and of each gradient, and that of the selection.

    Where the case has expected_response_tokens_only, that is what is expected: we look at response tokens alone.
    """
    import torch

    expected = case.get("expected_response_tokens_only") or case["expected"]
    loss, gradients, selected = run_contrast(case, **changes)
    errors = {"loss": abs(loss - expected["loss"]) / (abs(expected["loss"]) + GRADIENT_FLOOR)}
    largest = max(torch.tensor(expected[name]).abs().max().item() for name in ("grad", "grad_keep", "grad_remove"))
    for name, gradient in zip(("grad", "grad_keep", "grad_remove"), gradients, strict=True):
        theirs = torch.tensor(expected[name], dtype=torch.float64)
        difference = (gradient - theirs).abs() / (theirs.abs() + GRADIENT_FLOOR * largest).clamp(min=1e-30)
        errors[name] = difference.max().item()
    if expected.get("selected") is not None:
        errors["selected"] = (selected - torch.tensor(expected["selected"], dtype=torch.float64)).abs().max().item()
    return errors

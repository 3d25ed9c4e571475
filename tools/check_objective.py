"""Run a file of known objectives through this project's own, and compare loss, metrics and gradient.

    .venv/bin/python -m tools.check_objective tests/golden/papo_loss.json

FILE is a JSON list of cases in the format of tests/golden/papo_loss.json, which came from the authors' own actor
update: logits [B, T, V], responses, response_mask, advantages, cached log-probs, coefficients, `over` (what differs
from the authors' defaults), and their metrics and gradient with respect to the logits. A file may also be an object
whose `cases` is that list, as tests/golden/vppo.json. A case may have besides

    sensitivity, sensitivity_weights   how much a token depends on the picture: k3 or abs of masked_log_probs (old)
    select                             {share, by, per, of} or a list of them: tokens that keep their policy gradient
    advantage_scaling                  {kind: vppo, min}
    expected                           selected [B, T] and scaling [B] of the whole step
    expected_as_split                  loss and grad with the statistics of the ranks and micro-batches in `ranks`

A case with `views` is of CPPO's contrastive term alone, as tests/golden/cppo.json has it: loss, and the gradient of
each of the three views, in float64 (tools/contrast_cases.py).

Each case goes the way of a training step: token statistics of the response positions from the logits, papo_loss,
backward. Prints per case the largest relative error of the loss, of the metrics, of the gradient and of what tokens are
weighed by; exit status 1 if any exceeds 1e-5, 0 if none does.

Relative errors: |ours - theirs| / (|theirs| + floor), where floor is 0.01 nats for loss and metrics and 0.01 of the
largest entry for the gradient, since both sides are fp32 sums.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_papo.config import ObjectiveConfig
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run
from tools.contrast_cases import contrast_errors

if TYPE_CHECKING:
    import torch

    from megatron_papo.objective.token_weights import Deal

LIMIT = 1e-5
METRIC_FLOOR, GRADIENT_FLOOR = 0.01, 0.01
KEYS = (
    "over",
    "kl_coef",
    "kl_prcp_coef",
    "clip",
    "loss_avg_mode",
    "logits",
    "responses",
    "response_mask",
    "old_log_probs",
    "ref_log_probs",
    "masked_log_probs",
    "advantages",
    "metrics",
    "grad",
)
CONTRAST_KEYS = ("logits", "responses", "response_mask", "advantages", "views", "cppo", "micro_batch", "expected")
ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2", "low_var_kl": "k3"}
AVERAGES = {"token": "micro_batch", "seq": "sequence"}
"""loss_avg_mode: ours; each case is one micro-batch of one rank."""
KNOWN_OVERRIDES = (
    "loss_avg_mode",
    "clip_ratio_low",
    "clip_ratio_high",
    "clip_ratio_dual",
    "use_kl_loss",
    "kl_coef",
    "kl_penalty",
    "use_kl_prcp",
    "kl_prcp_coef",
    "kl_prcp_penalty",
    "use_kl_prcp_clipping",
    "kl_prcp_clipping",
    "use_kl_prcp_token_level_mask",
    "kl_prcp_token_level_mask_top_p",
    "use_aug_entropy_loss",
    "aug_entropy_loss_coef",
    "use_ori_entropy_loss",
    "ori_entropy_loss_coef",
    "use_sft_loss",
    "sft_loss_coef",
)
SHARES = {"sensitivity": "sensitivity_share", "entropy": "entropy_share"}
"""select.by: ours."""
SELECTED = {"policy_loss": "policy_tokens", "kl_prcp": "kl_prcp_tokens"}
"""select.of: ours."""
METRICS = {
    "actor/pg_loss": ("loss", 1),  # their name for the total
    "actor/kl_loss": ("kl_ref", 1),
    "actor/kl_prcp_loss": ("kl_prcp", -1),
    "actor/aug_entropy_loss": ("masked_image_entropy_sampled", 1),
    "actor/entropy_loss": ("entropy_sampled", 1),
    "actor/ori_entropy_loss": ("entropy_sampled", 1),
    "actor/sft_loss": ("sft_loss", 1),
    "actor/pg_clipfrac_higher": ("clip_fraction_high", 1),
    "actor/pg_clipfrac_lower": ("clip_fraction_dual", 1),
    "actor/ppo_kl": ("kl_old", 1),
    "actor/grad_norm": ("grad_norm", 1),
}
"""Their metric: ours, sign."""


def read_cases(path: Path) -> list[dict]:
    try:
        cases = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}")
    if isinstance(cases, dict) and "cases" in cases:
        cases = cases["cases"]
    if not isinstance(cases, list) or not cases:
        raise UserError(f"{path}: expected a JSON list of cases, as in tests/golden/papo_loss.json")
    for number, case in enumerate(cases):
        if isinstance(case, dict) and "views" in case:
            missing = [key for key in CONTRAST_KEYS if key not in case]
            case = {"over": {}} | case
        else:
            missing = [key for key in KEYS if key not in case] if isinstance(case, dict) else list(KEYS)
        if missing:
            raise UserError(f"{path}: case {number}: lacks {', '.join(missing)}: see tests/golden/papo_loss.json")
        unknown = [key for key in case["over"] if key not in KNOWN_OVERRIDES]
        if unknown:
            raise UserError(f"{path}: case {number}: over holds {', '.join(unknown)}, which this tool cannot translate")
        if "views" not in case and (problem := next(untranslatable(case), None)):
            raise UserError(f"{path}: case {number}: {problem}, which this tool cannot translate")
    return cases


def untranslatable(case: dict) -> Iterator[str]:
    """Yield what stands in the newer fields of a case and has no counterpart here."""
    if case.get("sensitivity", "k3") not in ("k3", "abs"):
        yield f"sensitivity {case['sensitivity']}"
    if case.get("sensitivity_weights", "old") != "old":
        yield f"sensitivity_weights {case['sensitivity_weights']}, without the logits of the other view"
    for select in selections_of(case):
        if (select["by"], select["of"]) not in [(by, of) for by in SHARES for of in SELECTED]:
            yield f"select by {select['by']} of {select['of']}"
        elif select["by"] == "sensitivity" and "sensitivity" not in case:
            yield "select by sensitivity without a sensitivity"
    if case.get("advantage_scaling") and case["advantage_scaling"]["kind"] != "vppo":
        yield f"advantage_scaling {case['advantage_scaling']['kind']}"


def selections_of(case: dict) -> list[dict]:
    """Return the selections of a case, each {share, by, per, of}."""
    select = case.get("select") or []
    return select if isinstance(select, list) else [select]


def objective_of(case: dict) -> dict:
    """Return the fields of ObjectiveConfig that say what the case's options, in the authors' words, say."""
    over = case["over"]
    low, high, dual = case["clip"]
    annealing = case["metrics"].get("actor/kl_prcp_coef_annealing_discount", 1.0)

    selected: dict[str, dict] = {}
    for select in selections_of(case):
        of_term = selected.setdefault(SELECTED[select["of"]], {"per": select.get("per", "response")})
        share = SHARES[select["by"]]
        of_term[share] = max(float(select["share"]), of_term.get(share, 0.0))
    scaling = case.get("advantage_scaling")

    def where(switch: str, value: float) -> float | None:
        return value if over.get(switch) else None

    return {
        "average": AVERAGES[case["loss_avg_mode"]],
        "average_ranks": 1,
        "average_micro_batch_size": len(case["response_mask"]),
        "clip_ratio_low": low,
        "clip_ratio_high": high,
        "clip_ratio_dual": dual,
        "kl_ref_coef": case["kl_coef"],
        "kl_ref_estimator": ESTIMATORS[over.get("kl_penalty", "low_var_kl")],
        "kl_prcp_coef": case["kl_prcp_coef"] * annealing,
        "kl_prcp_estimator": ESTIMATORS[over.get("kl_prcp_penalty", "low_var_kl")],
        "kl_prcp_clip": where("use_kl_prcp_clipping", over.get("kl_prcp_clipping", 0.2)),
        "kl_prcp_top_p": where("use_kl_prcp_token_level_mask", over.get("kl_prcp_token_level_mask_top_p", 0.2)),
        "entropy_coef": where("use_ori_entropy_loss", over.get("ori_entropy_loss_coef", 0.01) * annealing) or 0.0,
        "masked_image_entropy_coef": where("use_aug_entropy_loss", over.get("aug_entropy_loss_coef", 0.01) * annealing)
        or 0.0,
        "sft_coef": where("use_sft_loss", over.get("sft_loss_coef", 1e-3)) or 0.0,
        "sensitivity": {"formula": case.get("sensitivity", "k3")},
        "trajectory_shaping": None if scaling is None else {"lowest": float(scaling["min"])},
        **selected,
    }


@dataclass(frozen=True)
class Result:
    """What our objective makes of a case."""

    metrics: dict[str, float]
    gradient: "torch.Tensor"
    """[B, T, V]"""
    policy_weights: "torch.Tensor | None"
    """[B, T] what each token's policy loss is multiplied by; None: 1."""


def run_case(case: dict, *, num_tokens: float | None = None, ranks: "Deal | None" = None, **changes: Any) -> Result:
    """Run one case through our objective.

    Args:
        case: of the file.
        num_tokens: the denominator of averages over tokens, where it is not the case's own number of tokens.
        ranks: the rows of each micro-batch of each rank, whose statistics scale advantages; None: those of the step.
        changes: fields of ObjectiveConfig that differ from the case's.
    """
    import torch

    from megatron_papo.distributed import process_groups
    from megatron_papo.model.log_probs import token_statistics
    from megatron_papo.objective.papo_loss import (
        Averages,
        MaskedImageTokens,
        ResponseTokens,
        StepCounts,
        papo_loss,
        stacked,
    )
    from megatron_papo.objective.sensitivity import TwoViews
    from megatron_papo.objective.token_weights import StepTokens
    from megatron_papo.training.collator import pad_responses
    from megatron_papo.training.loss_recipe import denominators_of, loss_recipe, sensitivity_of, token_weights_of

    process_groups.connect()
    over, mask = case["over"], torch.tensor(case["response_mask"], dtype=torch.float32)

    def table(name: str) -> torch.Tensor:
        values = torch.tensor(case[name])
        if values.shape != mask.shape:
            raise ValueError(f"{name} is {list(values.shape)}, response_mask {list(mask.shape)}")
        return values

    logits = torch.tensor(case["logits"], dtype=torch.float32).requires_grad_()
    positions = mask.flatten().nonzero()[:, 0]
    sampled = table("responses").flatten()[positions]
    world = torch.distributed.group.WORLD
    assert world is not None  # connect() has made it
    statistics = token_statistics(logits.flatten(0, 1), positions, sampled, world)
    correct = torch.tensor(case.get("correctness_mult_mask", [1.0] * len(mask)))[:, None]
    objective = ObjectiveConfig(**objective_of(case) | changes)
    of_responses = [row.bool() for row in mask]

    def cut(values: torch.Tensor) -> list[torch.Tensor]:
        return [row[kept] for row, kept in zip(values, of_responses, strict=True)]

    weights: dict[str, torch.Tensor] = {}
    if objective.weighs_tokens:
        entropy = pad_responses([statistics.entropy.detach()], mask)
        views = TwoViews(table("old_log_probs"), table("masked_log_probs"), entropy, entropy)
        step = StepTokens(cut(sensitivity_of(objective, views)), cut(entropy))
        of_step = token_weights_of(objective, step, ranks)
        weights = {name: pad_responses([torch.cat(values).float()], mask) for name, values in of_step.items()}
    tokens = ResponseTokens(
        log_probs=pad_responses([statistics.log_probs], mask),
        old_log_probs=table("old_log_probs"),
        advantages=table("advantages"),
        mask=mask,
        correct=correct,
        ref_log_probs=table("ref_log_probs") if over.get("use_kl_loss", True) else None,
        masked_image=MaskedImageTokens(table("masked_log_probs")) if over.get("use_kl_prcp", True) else None,
        policy_weights=weights.get("policy_weights"),
        kl_prcp_weights=weights.get("kl_prcp_weights"),
    )
    recipe = loss_recipe(objective, step=0)
    lengths, of_correct = mask.sum(dim=1).tolist(), (mask * correct).sum(dim=1).tolist()
    rollouts = [
        StepCounts(tokens, 1, correct_tokens) for tokens, correct_tokens in zip(lengths, of_correct, strict=True)
    ]
    counts = stacked(denominators_of(rollouts, objective), mask.device)
    if num_tokens is not None:
        counts = replace(counts, tokens=num_tokens)
    loss, metrics = papo_loss(tokens, Averages(counts, recipe.of_loss), recipe.coefficients, recipe.formulas)
    [gradient] = torch.autograd.grad(loss, [logits])
    metrics["grad_norm"] = gradient.norm()
    numbers = {name: value.item() for name, value in metrics.items()}
    return Result(numbers, gradient, weights.get("policy_weights"))


def errors_of(case: dict, **changes: Any) -> dict[str, float]:
    """Return the largest relative error of loss, metrics, gradient and weights; changes: as run_case takes them.

    Raises UserError where a metric of theirs is one that we lack.
    """
    result = run_case(case, **changes)
    metrics = result.metrics
    errors = {"loss": 0.0, "metrics": 0.0, "gradient": gradient_error(result.gradient, case["grad"])}
    if (error := _weights_error(case, case.get("expected") or {}, result)) is not None:
        errors["weights"] = error
    for theirs, value in case["metrics"].items():
        if theirs.endswith(("_coef", "_discount")):  # inputs
            continue
        if theirs not in METRICS or METRICS[theirs][0] not in metrics:
            raise UserError(f"metric {theirs} has no counterpart here")
        ours, sign = METRICS[theirs]
        if theirs == "actor/entropy_loss" and case["loss_avg_mode"] == "seq":
            expected_value, our_value = _entropy_in_sequence_average(case, value)
        else:
            expected_value, our_value = value, metrics[ours]
        error = _not_finite_is_infinite(abs(our_value - sign * expected_value) / (abs(expected_value) + METRIC_FLOOR))
        kind = "loss" if ours == "loss" else "metrics"
        errors[kind] = max(errors[kind], error)
    return errors


def errors_as_split(case: dict) -> dict[str, float]:
    """Return the errors of loss, gradient and weights where the statistics are those of the authors' ranks and
    micro-batches."""
    expected = case["expected_as_split"]
    result = run_case(case, ranks=expected["ranks"])
    loss = abs(result.metrics["loss"] - expected["loss"]) / (abs(expected["loss"]) + METRIC_FLOOR)
    errors = {
        "loss": _not_finite_is_infinite(loss),
        "gradient": gradient_error(result.gradient, expected["grad"]),
    }
    if (error := _weights_error(case, expected, result)) is not None:
        errors["weights"] = error
    return errors


def gradient_error(gradient: "torch.Tensor", theirs: list) -> float:
    import torch

    expected = torch.tensor(theirs)
    difference = (gradient - expected).abs() / (expected.abs() + GRADIENT_FLOOR * expected.abs().max()).clamp(min=1e-30)
    return _not_finite_is_infinite(difference.max().item())


def _weights_error(case: dict, expected: dict, result: Result) -> float | None:
    """Return the largest error of what the policy loss of a token is multiplied by: 1 where it is selected, times the
    scale of its response. None where the case does not say."""
    import torch

    if expected.get("selected") is None or result.policy_weights is None:
        return None
    mask, scaling = torch.tensor(case["response_mask"]), expected.get("scaling") or [1.0] * len(case["response_mask"])
    theirs = torch.tensor(expected["selected"]) * torch.tensor(scaling)[:, None] * mask
    return _not_finite_is_infinite((result.policy_weights * mask - theirs).abs().max().item())


def _entropy_in_sequence_average(case: dict, value: float) -> tuple[float, float]:
    """Return their logged entropy, which follows the loss's average, and ours, else over tokens, averaged their way."""
    import torch

    from megatron_papo.objective.papo_loss import StepCounts, sequence_average

    mask = torch.tensor(case["response_mask"], dtype=torch.float32)
    log_probs = torch.log_softmax(torch.tensor(case["logits"]), -1).gather(
        -1, torch.tensor(case["responses"])[..., None]
    )[..., 0]
    weights = sequence_average(mask, StepCounts(mask.sum().item(), len(mask)))
    return value, (weights * -log_probs).sum().item()


def _not_finite_is_infinite(error: float) -> float:
    return error if math.isfinite(error) else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    path = parser.parse_args().file
    failed, cases = 0, read_cases(path)
    for number, case in enumerate(cases):
        try:
            if "views" in case:
                checked = {"contrast: " + json.dumps(case["cppo"]): contrast_errors(case)}
            else:
                checked = {json.dumps(case["over"]): errors_of(case)}
            if "expected_as_split" in case:
                checked["as their code splits the step"] = errors_as_split(case)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path}: case {number}: cannot be run ({' '.join(str(error).split())}): are its shapes right?"
            )
        failed += any(max(errors.values()) > LIMIT for errors in checked.values())
        for what, errors in checked.items():
            shown = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
            print(f"case {number:3}  {shown}  {'WRONG' if max(errors.values()) > LIMIT else 'ok'}  {what}")
    print(f"{path}: {len(cases)} cases, {failed} past {LIMIT:g}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main)

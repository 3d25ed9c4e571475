"""The objective against numbers from the authors' own actor update (tests/golden): loss, every metric, gradient."""

import json
from pathlib import Path

import pytest
import torch

from megatron_papo.objective.advantages import ADVANTAGES
from megatron_papo.objective.papo_loss import average_weights, papo_loss

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "papo_loss.json").read_text())
ESTIMATOR_NAMES = {"kl": "k1", "mse": "k2", "abs": "abs"}
# fp32 on both sides, sums of at most 28 terms: 1e-5 relative, plus an absolute floor for values near zero
TOLERANCE = dict(rtol=1e-5, atol=1e-7)


def run_case(case, **changes):
    """-> loss, metrics, gradient [B, T, V] of one golden case through our objective."""
    over, (low, high, dual) = case["over"], case["clip"]
    logits = torch.tensor(case["logits"]).requires_grad_()
    responses, mask = torch.tensor(case["responses"]), torch.tensor(case["response_mask"], dtype=torch.float32)
    log_probs = torch.log_softmax(logits, -1).gather(-1, responses[..., None])[..., 0]
    options = dict(
        num_tokens=mask.sum().item(),
        num_sequences=mask.shape[0],
        average="sequence" if case["loss_avg_mode"] == "seq" else "token",
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_dual=dual,
        kl_ref_coef=case["kl_coef"],
        kl_prcp_coef=case["kl_prcp_coef"],
        kl_prcp_estimator=ESTIMATOR_NAMES.get(over.get("kl_prcp_penalty"), "k3"),
        kl_prcp_clip=over.get("kl_prcp_clipping"),
        kl_prcp_top_p=over.get("kl_prcp_token_level_mask_top_p"),
        entropy_coef=over["ori_entropy_loss_coef"] if over.get("use_ori_entropy_loss") else 0.0,
        masked_image_entropy_coef=over["aug_entropy_loss_coef"] if over.get("use_aug_entropy_loss") else 0.0,
    )
    loss, metrics = papo_loss(
        log_probs,
        torch.tensor(case["old_log_probs"]),
        torch.tensor(case["advantages"]),
        mask,
        torch.tensor(case["ref_log_probs"]) if over.get("use_kl_loss", True) else None,
        torch.tensor(case["masked_log_probs"]),
        **options | changes,
    )
    loss.backward()
    return loss, metrics, logits.grad


def expected_metrics(case):
    """The authors' metric names on ours; kl_prcp_loss is minus KL_prcp, pg_loss is the total loss."""
    theirs = {name.removeprefix("actor/"): value for name, value in case["metrics"].items()}
    rows = {
        "loss": theirs["pg_loss"],
        "kl_ref": theirs.get("kl_loss"),
        "kl_prcp": -theirs["kl_prcp_loss"],
        "masked_image_entropy_sampled": theirs["aug_entropy_loss"],
        "clip_fraction_high": theirs["pg_clipfrac_higher"],
        "clip_fraction_dual": theirs["pg_clipfrac_lower"],
        "kl_old": theirs["ppo_kl"],
    }
    if case["loss_avg_mode"] == "token":  # their logged entropy follows the loss's average; ours is always over tokens
        rows["entropy_sampled"] = theirs["entropy_loss"]
    return {name: value for name, value in rows.items() if value is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["seed"]))
def test_loss_metrics_and_gradient(case):
    loss, metrics, gradient = run_case(case)
    for name, value in expected_metrics(case).items():
        torch.testing.assert_close(metrics[name], torch.tensor(value), **TOLERANCE, msg=lambda text: f"{name}: {text}")
    torch.testing.assert_close(gradient, torch.tensor(case["grad"]), **TOLERANCE)
    torch.testing.assert_close(gradient.norm(), torch.tensor(case["metrics"]["actor/grad_norm"]), **TOLERANCE)


def test_entropy_in_the_sequence_average():
    case = CASES[1]
    log_probs = torch.log_softmax(torch.tensor(case["logits"]), -1).gather(-1, torch.tensor(case["responses"])[..., None])[..., 0]
    mask = torch.tensor(case["response_mask"], dtype=torch.float32)
    weights = {name: average_weights(mask, name, num_tokens=mask.sum().item(), num_sequences=len(mask)) for name in ("token", "sequence")}
    expected = torch.tensor(case["metrics"]["actor/entropy_loss"])
    torch.testing.assert_close((weights["sequence"] * -log_probs).sum(), expected, **TOLERANCE)
    assert abs((weights["token"] * -log_probs).sum() - expected) > 1e-2


@pytest.mark.parametrize(
    "change",
    [
        dict(kl_prcp_coef=0.021),
        dict(kl_ref_coef=0.02),
        dict(kl_prcp_estimator="k2"),
        dict(average="sequence"),
        dict(entropy_coef=0.001),
        dict(kl_prcp_clip=0.1),
        dict(kl_prcp_top_p=0.5),
        dict(num_tokens=29),
    ],
    ids=str,
)
def test_every_option_reaches_the_gradient(change):
    """Negative control: with any option changed the golden gradient is missed by far more than the tolerance."""
    gradient = run_case(CASES[0], **change)[2]
    assert not torch.allclose(gradient, torch.tensor(CASES[0]["grad"]), rtol=1e-3, atol=1e-6)


def test_masked_image_entropy_changes_the_loss_but_no_gradient():
    before, after = run_case(CASES[0]), run_case(CASES[0], masked_image_entropy_coef=0.5)
    assert after[0] > before[0] + 1
    assert torch.equal(after[2], before[2])


@pytest.mark.parametrize("clip, moves", [(dict(clip_ratio_low=0.01), True), (dict(clip_ratio_high=0.02), True), (dict(clip_ratio_dual=1.01), True)])
def test_clip_ratios_reach_the_gradient(clip, moves):
    changed = [not torch.equal(run_case(case, **clip)[2], run_case(case)[2]) for case in CASES]
    assert any(changed) is moves


@pytest.mark.parametrize("number", range(len(json.loads((GOLDEN / "advantages.json").read_text()))))
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_advantages(name, number):
    case = json.loads((GOLDEN / "advantages.json").read_text())[number]
    groups = len(set(case["group"]))
    rewards = torch.tensor(case["rewards"]).view(groups, -1)
    expected = torch.tensor(case[name]).view(groups, -1)
    torch.testing.assert_close(ADVANTAGES[name](rewards), expected, rtol=1e-5, atol=2e-6)
    other = "rloo" if name == "grpo" else "grpo"
    assert not torch.allclose(ADVANTAGES[other](rewards), expected, atol=1e-2)


def test_dr_grpo_is_grpo_times_the_standard_deviation():
    rewards = torch.tensor([[1.0, 0.1, 0.9, 0.0, 1.0]])
    torch.testing.assert_close(ADVANTAGES["dr_grpo"](rewards), ADVANTAGES["grpo"](rewards) * (rewards.std() + 1e-6))

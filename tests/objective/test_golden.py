"""The objective against numbers from the authors' own actor update (tests/golden): loss, every metric, gradient;
through the tool."""

import copy
import json
from pathlib import Path

import pytest
import torch

from megatron_papo.objective.advantages import advantages_of
from tests.helpers import run_module
from tools.check_objective import LIMIT, errors_as_split, errors_of, run_case
from tools.contrast_cases import contrast_errors, run_contrast

GOLDEN = Path(__file__).parent.parent / "golden"
VPPO_CASES = json.loads((GOLDEN / "vppo.json").read_text())["cases"]
CPPO_CASES = json.loads((GOLDEN / "cppo.json").read_text())["cases"]
CASES = json.loads((GOLDEN / "papo_loss.json").read_text())
ADVANTAGE_CASES = json.loads((GOLDEN / "advantages.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["seed"]))
def test_loss_metrics_and_gradient(case):
    assert max(errors_of(case).values()) < LIMIT


@pytest.mark.parametrize(
    "change",
    [
        dict(kl_prcp_coef=0.021),
        dict(kl_ref_coef=0.02),
        dict(kl_prcp_estimator="k2"),
        dict(kl_ref_estimator="k2"),
        dict(average="sequence"),
        dict(entropy_coef=0.001),
        dict(kl_prcp_clip=0.1),
        dict(kl_prcp_top_p=0.5),
        dict(num_tokens=29),
        dict(ratio_level="sequence"),
        dict(sft_coef=0.001),
    ],
    ids=str,
)
def test_every_option_reaches_the_gradient(change):
    """Negative control: with any option changed the golden gradient is missed by far more than the limit."""
    assert errors_of(CASES[0], **change)["gradient"] > 100 * LIMIT


@pytest.mark.parametrize("case", VPPO_CASES, ids=lambda case: case["name"])
def test_vppo(case):
    """Loss, metrics, gradient, and which tokens and responses weigh what: the whole step, and as their code splits
    it."""
    assert max(errors_of(case).values()) < LIMIT
    if "expected_as_split" in case:
        assert max(errors_as_split(case).values()) < LIMIT


@pytest.mark.parametrize(
    "change",
    [
        dict(policy_tokens=dict(sensitivity_share=0.5)),
        dict(policy_tokens=dict(entropy_share=0.4)),
        dict(policy_tokens=dict(sensitivity_share=0.4, average="selected"), average="token"),
        dict(policy_tokens=None),
        dict(trajectory_shaping=None),
        dict(trajectory_shaping=dict(lowest=0.8)),
        dict(token_shaping={}),
        dict(response_shaping={}),
    ],
    ids=str,
)
def test_every_option_of_vppo_reaches_the_gradient(change):
    errors = errors_of(VPPO_CASES[0], **change)
    assert min(errors["gradient"], errors["weights"]) > 100 * LIMIT


def test_a_setting_splits_the_step_as_their_code_does():
    """One rank, micro-batches of two, in order: average_ranks and average_micro_batch_size say so."""
    case = next(case for case in VPPO_CASES if "expected_as_split" in case)
    split = case["expected_as_split"]
    assert split["ranks"] == [[[0, 1], [2, 3], [4, 5], [6, 7]]]
    shaping = dict(lowest=case["advantage_scaling"]["min"], statistics="dealt")
    options = dict(trajectory_shaping=shaping, average="token", average_ranks=1, average_micro_batch_size=2)
    result = run_case(case, **options)
    assert result.metrics["loss"] == pytest.approx(split["loss"], abs=LIMIT)
    torch.testing.assert_close(result.gradient, torch.tensor(split["grad"]), rtol=LIMIT, atol=LIMIT / 100)
    whole = run_case(case)
    assert abs(whole.metrics["loss"] - split["loss"]) > 1e-2  # the control


@pytest.mark.parametrize("case", CPPO_CASES, ids=lambda case: case["name"])
def test_cppo(case):
    """Loss, the gradient of each of the three views, and the selected tokens, in float64."""
    assert max(contrast_errors(case).values()) < 1e-9


@pytest.mark.parametrize(
    "change",
    [dict(coefficient=0.02), dict(temperature=0.2), dict(share=0.9), dict(share=None), dict(positive_advantages=False)],
    ids=str,
)
def test_every_option_of_the_contrast_reaches_each_view(change):
    errors = contrast_errors(CPPO_CASES[0], **change)
    assert min(errors[name] for name in ("grad", "grad_keep", "grad_remove")) > 100 * LIMIT


def test_the_exact_contrast_is_over_the_step():
    """The mean over the selected tokens of all micro-batches, not theirs over each; by hand from their per-token
    values."""
    case = next(case for case in CPPO_CASES if case["micro_batch"] < len(case["response_mask"]))
    theirs = case["expected"]
    selected, values = torch.tensor(theirs["selected"]), torch.tensor(theirs["cpl"])
    expected = case["cppo"]["cpl_loss_coef"] * ((selected * values).sum() / selected.sum()).item()
    loss, _, _ = run_contrast(case, average="step")
    assert loss == pytest.approx(expected, rel=1e-6) and abs(loss - theirs["loss"]) > 1e-3 * theirs["loss"]


@pytest.mark.parametrize(
    "clip", [dict(clip_ratio_low=0.01), dict(clip_ratio_high=0.02), dict(clip_ratio_dual=1.01)], ids=str
)
def test_clip_ratios_reach_the_gradient(clip):
    assert any(not torch.equal(run_case(case, **clip).gradient, run_case(case).gradient) for case in CASES)


@pytest.mark.parametrize("number", range(len(ADVANTAGE_CASES)))
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_advantages(name, number):
    case = ADVANTAGE_CASES[number]
    groups = len(set(case["group"]))
    rewards = torch.tensor(case["rewards"]).view(groups, -1)
    expected = torch.tensor(case[name]).view(groups, -1)
    lengths = torch.ones_like(rewards)
    torch.testing.assert_close(advantages_of(name, rewards, lengths), expected, rtol=1e-5, atol=2e-6)
    other = "rloo" if name == "grpo" else "grpo"
    assert not torch.allclose(advantages_of(other, rewards, lengths), expected, atol=1e-2)


def damaged(where):
    case = copy.deepcopy(CASES[3])
    if where == "gradient":
        case["grad"][0][0][0] += 1e-4
    else:
        case["metrics"][where] *= 1.0001
    return case


@pytest.mark.parametrize(
    "file, lines, summary", [("papo_loss", 10, "10 cases"), ("vppo", 7, "6 cases"), ("cppo", 3, "3 cases")]
)
def test_the_tool_passes_the_golden_file(file, lines, summary):
    result = run_module("tools.check_objective", GOLDEN / f"{file}.json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" ok ") == lines and f"{summary}, 0 past 1e-05" in result.stdout


@pytest.mark.parametrize(
    "where", ["gradient", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "actor/aug_entropy_loss"]
)
def test_the_tool_finds_a_damaged_number(where, tmp_path):
    kind = {"gradient": "gradient", "actor/pg_loss": "loss"}.get(where, "metrics")
    errors = errors_of(damaged(where))
    assert errors[kind] > LIMIT and all(value < LIMIT for name, value in errors.items() if name != kind)
    if where == "gradient":
        (tmp_path / "damaged.json").write_text(json.dumps([CASES[0], damaged(where)]))
        result = run_module("tools.check_objective", tmp_path / "damaged.json")
        assert result.returncode == 1 and result.stdout.count("WRONG") == 1


@pytest.mark.parametrize(
    "text, problem",
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected a JSON list of cases"),
        ('[{"over": {}}]', "case 0: lacks kl_coef"),
        (json.dumps([CASES[0] | {"over": {"use_magic": True}}]), "case 0: over holds use_magic"),
        (json.dumps([VPPO_CASES[0] | {"advantage_scaling": {"kind": "magic"}}]), "case 0: advantage_scaling magic"),
        (json.dumps([CASES[0] | {"select": {"share": 0.1, "by": "luck", "of": "kl_prcp"}}]), "case 0: select by luck"),
        (json.dumps([CASES[0] | {"old_log_probs": [[0.0]]}]), "case 0: cannot be run"),
    ],
    ids=["not JSON", "empty", "incomplete", "unknown option", "unknown scaling", "unknown selection", "wrong shape"],
)
def test_the_tool_refuses_other_files(text, problem, tmp_path):
    (tmp_path / "file.json").write_text(text)
    result = run_module("tools.check_objective", tmp_path / "file.json")
    assert result.returncode == 2 and problem in result.stderr and "Traceback" not in result.stderr

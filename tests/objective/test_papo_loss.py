"""Every option of the objective, from logits to loss, metrics and gradient, against loops over tokens in float64
(naive.py).

The product computes in fp32 with whole tensors; one rollout of the example is empty, one has one token, one ends in
padding full of nan.
"""

import pytest
import torch

from megatron_papo.config import ObjectiveConfig
from megatron_papo.distributed import process_groups
from megatron_papo.model.log_probs import token_statistics
from megatron_papo.objective.papo_loss import (
    Averages,
    ClipRatios,
    Coefficients,
    EstimatedKL,
    Formulas,
    MaskedImageTokens,
    ResponseTokens,
    StepCounts,
    TruncatedImportanceWeights,
    annealed_kl_prcp_coef,
    exact_entropy,
    exact_kl_prcp,
    finish_metrics,
    papo_loss,
    sequence_average,
    sequence_log_ratios,
    token_average,
    token_log_ratios,
    top_share,
)
from megatron_papo.training.collator import pad_responses
from megatron_papo.training.loss_recipe import KL_ESTIMATORS, loss_recipe
from tests.objective.naive import naive_papo_loss, naive_token, number_of

LENGTHS, VOCABULARY = [5, 1, 0, 7, 3, 4], 13
ADVANTAGES = [1.2, -0.7, 0.4, -1.5, 0.0, 0.9]
CORRECT = [True, False, True, False, True, False]
BASE = dict(low=0.2, high=0.3, dual=1.5, beta=0.3, gamma=0.2, eta_1=0.05, eta_2=0.07)
NAMES = dict(
    low="clip_ratio_low",
    high="clip_ratio_high",
    dual="clip_ratio_dual",
    beta="kl_ref_coef",
    gamma="kl_prcp_coef",
    eta_1="entropy_coef",
    eta_2="masked_image_entropy_coef",
    estimator="kl_prcp_estimator",
    ref_estimator="kl_ref_estimator",
    ratio_level="ratio_level",
    importance_cap="importance_sampling_cap",
    kl_clip="kl_prcp_clip",
    top_p="kl_prcp_top_p",
    sft="sft_coef",
    average="average",
)
TOLERANCE = dict(rtol=2e-5, atol=2e-6)  # fp32 sums of at most 20 terms


def objective_of(options):
    """naive.py's words -> the configuration."""
    named = {NAMES[name]: value for name, value in options.items() if name in NAMES}
    named["entropy_estimator"] = "exact" if options.get("exact_entropy") else "sampled"
    return ObjectiveConfig(masked_branch="recompute_with_grad", **named)


@pytest.fixture(scope="module")
def example():
    """Float64 logits of both branches and the cached numbers of each rollout."""
    process_groups.connect()
    generator = torch.Generator().manual_seed(3)

    def draw(*shape, spread=1.0):
        return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)

    rollouts = []
    for length, advantage, correct in zip(LENGTHS, ADVANTAGES, CORRECT):
        logits = draw(length, VOCABULARY, spread=1.5)
        tokens = torch.randint(VOCABULARY, (length,), generator=generator)
        own = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        rollouts.append(
            {
                "logits": logits,
                "masked_logits": logits + draw(length, VOCABULARY, spread=0.8),
                "tokens": tokens,
                "advantage": advantage,
                "correct": correct,
                "old": (own + draw(length, spread=0.4)).tolist(),
                "ref": (own + draw(length, spread=0.5)).tolist(),
                "rollout": (own + draw(length, spread=0.5)).tolist(),
            }  # fmt: skip
        )
    return rollouts


def expected(example, with_grad, **options):
    """-> loss, metrics, gradients of the logits and of the masked logits, by the loops."""
    leaves, rollouts = [], []
    for r in example:
        logits, masked = r["logits"].clone().requires_grad_(), r["masked_logits"].clone().requires_grad_()
        leaves.append((logits, masked))
        second = masked if with_grad else masked.detach()
        tokens = [naive_token(list(z), list(m), int(t)) for z, m, t in zip(logits, second, r["tokens"])]
        kinds = ("log_probs", "masked", "entropy", "masked_entropy", "exact_kl")
        rollouts.append({**r, **{kind: [token[kind] for token in tokens] for kind in kinds}})
    loss, metrics = naive_papo_loss(rollouts, **options)
    loss.backward()
    gradients = [torch.cat([torch.zeros_like(x) if x.grad is None else x.grad for x in side]) for side in zip(*leaves)]
    return number_of(loss), {name: number_of(torch.as_tensor(value)) for name, value in metrics.items()}, *gradients


def ours(example, with_grad, padding=0, order=None, splits=1, num_tokens=None, dtype=torch.float32, **options):
    """The same through token_statistics and papo_loss; order: of the rollouts; splits: micro-batches; padding: extra
    columns of nan."""
    process_groups.connect()
    order = list(order or range(len(example)))
    logits = torch.cat([r["logits"] for r in example]).to(dtype).requires_grad_()
    masked = torch.cat([r["masked_logits"] for r in example]).to(dtype).requires_grad_()
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    totals, loss = {}, 0.0
    tokens_of_step = num_tokens or sum(LENGTHS)
    correct_tokens = sum(length for length, correct in zip(LENGTHS, CORRECT) if correct)
    for start in range(0, len(order), -(-len(order) // splits)):
        rows = order[start : start + -(-len(order) // splits)]
        width = max(1, *(LENGTHS[i] for i in rows)) + padding
        mask = torch.tensor([[1.0] * LENGTHS[i] + [0.0] * (width - LENGTHS[i]) for i in rows])
        place = torch.tensor([p for i in rows for p in range(starts[i], starts[i + 1])], dtype=torch.long)
        tokens = torch.cat([example[i]["tokens"] for i in rows])
        both = torch.cat([logits, masked])
        found = token_statistics(
            both, torch.cat([place, place + len(logits)]), tokens.repeat(2), torch.distributed.group.WORLD,
            kl_of_halves=options.get("estimator") == "exact", second_half_gradient=with_grad,
        )  # fmt: skip
        here = len(place)

        def table(values):
            padded = torch.full_like(mask, torch.nan)
            return torch.where(mask.bool(), pad_responses([values], mask), padded)

        second = (lambda x: x) if with_grad else torch.Tensor.detach
        response_tokens = ResponseTokens(
            log_probs=table(found.log_probs[:here]),
            old_log_probs=table(torch.tensor([x for i in rows for x in example[i]["old"]])),
            advantages=torch.tensor([[ADVANTAGES[i]] for i in rows]),
            mask=mask,
            correct=torch.tensor([[float(CORRECT[i])] for i in rows]),
            entropy=table(found.entropy[:here]),
            ref_log_probs=table(torch.tensor([x for i in rows for x in example[i]["ref"]])),
            rollout_log_probs=table(torch.tensor([x for i in rows for x in example[i]["rollout"]])),
            masked_image=MaskedImageTokens(
                table(second(found.log_probs[here:])),
                table(second(found.entropy[here:])),
                None if found.kl is None else table(found.kl),
            ),
        )
        # The options go the product's way: through the configuration.
        recipe = loss_recipe(objective_of(options), step=0)
        counts = StepCounts(tokens_of_step, len(order), correct_tokens)
        averages = Averages(counts, recipe.of_loss)
        value, metrics = papo_loss(response_tokens, averages, recipe.coefficients, recipe.formulas)
        value.backward()
        loss += value.item()
        totals = {name: totals.get(name, 0.0) + x.item() for name, x in metrics.items()}
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (logits, masked)]
    return loss, finish_metrics(totals), *gradients


CHANGES = {
    "base": {},
    "sequence average": dict(average="sequence"),
    "k1": dict(estimator="k1"),
    "abs": dict(estimator="abs"),
    "k2": dict(estimator="k2"),
    "exact": dict(estimator="exact"),
    "ref k1": dict(ref_estimator="k1"),
    "ref abs": dict(ref_estimator="abs"),
    "ref k2": dict(ref_estimator="k2"),
    "clip low": dict(low=0.02),
    "clip high": dict(high=0.02),
    "dual": dict(dual=1.1),
    "beta": dict(beta=0.5),
    "gamma": dict(gamma=0.6),
    "eta 1": dict(eta_1=0.3),
    "eta 2": dict(eta_2=0.5),
    "KL_prcp clipped": dict(kl_clip=0.05),
    "top-p": dict(top_p=0.4),
    "top-p, then clipped": dict(top_p=0.4, kl_clip=0.05),
    "exact entropy": dict(exact_entropy=True, eta_1=0.3, eta_2=0.5),
    "GSPO": dict(ratio_level="sequence"),
    "TIS": dict(importance_cap=1.2),
    "SFT": dict(sft=0.3),
    "everything": dict(
        average="sequence",
        estimator="exact",
        ref_estimator="k2",
        exact_entropy=True,
        top_p=0.6,
        kl_clip=0.3,
        ratio_level="sequence",
        importance_cap=0.9,
        sft=0.2,
    ),
}


@pytest.mark.parametrize("with_grad", [False, True], ids=["masked branch constant", "gradient through both"])
@pytest.mark.parametrize("name", CHANGES)
def test_loss_metrics_and_gradient_equal_the_loops(example, name, with_grad):
    options = BASE | CHANGES[name]
    loss, metrics, gradient, masked_gradient = ours(example, with_grad, **options)
    expected_loss, expected_metrics, expected_gradient, expected_masked = expected(example, with_grad, **options)
    assert loss == pytest.approx(expected_loss, rel=2e-5, abs=2e-6)
    for metric, value in expected_metrics.items():
        assert metrics[metric] == pytest.approx(value, rel=2e-5, abs=2e-6), metric
    torch.testing.assert_close(gradient.double(), expected_gradient, **TOLERANCE)
    torch.testing.assert_close(masked_gradient.double(), expected_masked, **TOLERANCE)
    assert bool(masked_gradient.any()) == with_grad


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "base"])
def test_every_option_reaches_loss_or_gradient(example, name):
    """Negative control of the test above: without the option the result is another by far more than its tolerance."""
    with_grad = True
    base = ours(example, with_grad, **BASE)
    changed = ours(example, with_grad, **BASE | CHANGES[name])
    moved = max(float((changed[i] - base[i]).abs().max()) for i in (2, 3))
    assert moved > 100 * TOLERANCE["atol"] and abs(changed[0] - base[0]) > 100 * TOLERANCE["atol"]


def test_masked_image_entropy_without_gradient_changes_the_loss_alone(example):
    """What the authors' default does (their issue 20); with gradient through both branches it reaches the masked
    branch."""
    before, after = (ours(example, False, **BASE | dict(eta_2=eta)) for eta in (0.0, 0.5))
    assert after[0] > before[0] + 0.1 and torch.equal(after[2], before[2]) and not after[3].any()
    assert not torch.equal(
        ours(example, True, **BASE | dict(eta_2=0.5))[3], ours(example, True, **BASE | dict(eta_2=0.0))[3]
    )


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize(
    "change", [dict(splits=2), dict(splits=6), dict(padding=4), dict(order=[3, 5, 0, 2, 4, 1])], ids=str
)
def test_invariance(example, average, change):
    options = BASE | dict(average=average, estimator="exact", sft=0.2, top_p=0.6)
    one, other = ours(example, True, **options), ours(example, True, **options, **change)
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for i in (2, 3):
        torch.testing.assert_close(one[i], other[i], rtol=1e-5, atol=1e-7)
    assert one[1] == pytest.approx(other[1], rel=1e-4, abs=1e-6)


def test_a_mean_of_means_fails_the_invariance(example):
    """Negative control: token means inside micro-batches, then their mean."""

    def mean_of_means(splits):
        total = 0.0
        size = len(example) // splits
        for start in range(0, len(example), size):
            rows = list(range(start, start + size))
            tokens = max(sum(LENGTHS[i] for i in rows), 1)
            total += ours(example, False, order=rows, num_tokens=tokens, **BASE)[0] / splits
        return total

    assert mean_of_means(1) == pytest.approx(ours(example, False, **BASE)[0], rel=1e-5)
    assert abs(mean_of_means(3) - mean_of_means(1)) > 1e-2


def tokens_of(values):
    """[B, T] everything at once for the degenerate cases."""
    return torch.tensor(values, dtype=torch.float32)


EVERYTHING = Coefficients(kl_ref=0.1, kl_prcp=0.1, entropy=0.1, masked_image_entropy=0.1, sft=0.1)
DEGENERATE = {
    "one token": ([[-0.5]], [[-0.6]], [[1.0]]),
    "empty response": ([[-0.5, -1.0], [0.0, 0.0]], [[-0.5, -1.1], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]),
    "all tokens masked": ([[-0.5, -1.0]], [[-0.4, -1.0]], [[0.0, 0.0]]),
    "log-probs 100 apart, up": ([[-0.1, -0.5]], [[-100.1, -0.5]], [[1.0, 1.0]]),
    "log-probs 100 apart, down": ([[-100.1, -0.5]], [[-0.1, -0.5]], [[1.0, 1.0]]),
    "forbidden by both": ([[-torch.inf, -0.5]], [[-torch.inf, -0.5]], [[1.0, 1.0]]),
    "forbidden by pi": ([[-torch.inf, -0.5]], [[-1.0, -0.5]], [[1.0, 1.0]]),
    "forbidden by the others": ([[-1.0, -0.5]], [[-torch.inf, -0.5]], [[1.0, 1.0]]),
    "nan in the padding": ([[-1.0, torch.nan]], [[-0.9, torch.nan]], [[1.0, 0.0]]),
}


@pytest.mark.parametrize("estimator", KL_ESTIMATORS.values(), ids=KL_ESTIMATORS)
@pytest.mark.parametrize("log_ratios", [token_log_ratios, sequence_log_ratios])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_input_gives_finite_loss_and_gradient(name, advantage, log_ratios, estimator):
    log_probs, other, mask = map(tokens_of, DEGENERATE[name])
    log_probs.requires_grad_()
    tokens = ResponseTokens(
        log_probs, other, torch.full((len(mask), 1), advantage), mask, torch.ones(len(mask), 1),
        ref_log_probs=other, rollout_log_probs=other, masked_image=MaskedImageTokens(other),
    )  # fmt: skip
    formulas = Formulas(
        ClipRatios(low=0.2, high=0.3, dual=3.0),
        log_ratios=log_ratios,
        importance_weights=TruncatedImportanceWeights(2.0),
        kl_ref=estimator,
        kl_prcp=EstimatedKL(estimator),
        kl_prcp_top_p=0.5,
    )
    averages = Averages(StepCounts(mask.sum().item(), len(mask), mask.sum().item()))
    loss, metrics = papo_loss(tokens, averages, EVERYTHING, formulas)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(log_probs.grad).all()
    assert all(torch.isfinite(value) for value in metrics.values())
    if not mask.any():
        assert loss == 0 and not log_probs.grad.any()


def test_the_degenerate_cases_are_degenerate():
    """Negative control: the textbook formulas give inf or nan on them."""
    log_probs, other, _ = map(tokens_of, DEGENERATE["forbidden by both"])
    assert torch.isnan((log_probs - other).exp()).any()
    log_probs, other, _ = map(tokens_of, DEGENERATE["log-probs 100 apart, up"])
    assert torch.isinf((log_probs - other).exp()).any()


def test_top_share_keeps_the_largest_of_each_rollout():
    values = tokens_of([[0.1, 0.9, 0.5, 0.7, 99.0], [3.0, 1.0, 2.0, 0.0, 0.0]])
    mask = tokens_of([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    assert top_share(values, mask, 0.5).tolist() == [[0, 1, 0, 1, 0], [1, 0, 1, 0, 0]]
    assert top_share(values, mask, 1.0).tolist() == mask.tolist()


def test_annealing_is_linear_then_constant():
    assert [annealed_kl_prcp_coef(step, 0.02, 0.0, 4) for step in (0, 1, 2, 4, 9)] == pytest.approx(
        [0.02, 0.015, 0.01, 0.0, 0.0]
    )
    assert annealed_kl_prcp_coef(3, 0.02, 0.01, 6) == pytest.approx(0.015)


def test_average_weights_sum_to_one():
    mask, counts = tokens_of([[1, 1, 1], [1, 0, 0]]), StepCounts(tokens=4, sequences=2)
    assert token_average(mask, counts).tolist() == [[0.25] * 3, [0.25, 0, 0]]
    torch.testing.assert_close(sequence_average(mask, counts), tokens_of([[1 / 6] * 3, [0.5, 0, 0]]))


@pytest.mark.parametrize(
    "formulas, coefficients, problem",
    [
        (dict(kl_prcp=exact_kl_prcp), Coefficients(), "the formulas need exact_kl,"),
        (dict(entropy=exact_entropy), Coefficients(), "the formulas need entropy,"),
        (dict(importance_weights=TruncatedImportanceWeights(2.0)), Coefficients(), "need rollout_log_probs,"),
        ({}, Coefficients(sft=0.1), "the formulas need correct,"),
    ],
)
def test_a_formula_without_its_tensor_is_named(formulas, coefficients, problem):
    """Control: without that formula the same tokens have a loss."""
    values, mask = tokens_of([[-0.5, -1.0]]), tokens_of([[1.0, 1.0]])
    tokens = ResponseTokens(values, values, tokens_of([[1.0]]), mask, masked_image=MaskedImageTokens(values))
    averages, clip = Averages(StepCounts(2, 1)), ClipRatios(0.2, 0.3, 3.0)
    with pytest.raises(ValueError, match=problem):
        papo_loss(tokens, averages, coefficients, Formulas(clip, **formulas))
    assert torch.isfinite(papo_loss(tokens, averages, Coefficients(), Formulas(clip))[0])

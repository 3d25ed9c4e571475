"""Selection and shaping against loops over tokens (naive_weights.py), through the configuration; what stays the same
under another order of rollouts; what is defined at the edges.

NOT covered here: loss and gradient (test_papo_loss.py, test_golden.py), ranks (tests/training/test_papo_step.py).
"""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_papo.config import ObjectiveConfig
from megatron_papo.distributed import process_groups
from megatron_papo.model.log_probs import output_token_statistics
from megatron_papo.objective.dealt_average import deal
from megatron_papo.objective.sensitivity import TwoViews
from megatron_papo.objective.token_weights import StepTokens, TrajectoryShaping, largest, share_of
from megatron_papo.training.loss_recipe import sensitivity_of, token_weights_of
from tests.objective import naive_weights as naive

LENGTHS = [5, 1, 0, 7, 3, 12, 2]
EXACT = dict(rtol=1e-12, atol=1e-12)  # float64 on both sides
METHODS = {
    "vppo": dict(policy_tokens=dict(sensitivity_share=0.4), trajectory_shaping=dict(lowest=0.9)),
    "vppo by entropy": dict(policy_tokens=dict(entropy_share=0.2)),
    "vppo by both": dict(policy_tokens=dict(sensitivity_share=0.3, entropy_share=0.2), trajectory_shaping=dict()),
    "pgpo": dict(token_shaping=dict(threshold=0.4, boost=2.0)),
    "tor": dict(
        sensitivity=dict(formula="abs"),
        policy_tokens=dict(sensitivity_share=0.3, entropy_share=0.3, per="step", sensitivity_only_weight=0.5),
    ),
    "cgpo": dict(response_shaping=dict(strength=0.1, share=0.4)),
    "selected average": dict(policy_tokens=dict(sensitivity_share=0.2, average="selected")),
    "all of them": dict(
        sensitivity=dict(formula="entropy_gap"),
        policy_tokens=dict(sensitivity_share=0.3, per="step"),
        trajectory_shaping=dict(lowest=0.7),
        token_shaping=dict(threshold=0.3, boost=1.0),
        response_shaping=dict(strength=0.2, share=0.5),
    ),
}


def by_loops(name, s, e):
    return {
        "vppo": lambda: naive.product(naive.selection(s, e, (4, None)), spread(naive.trajectory(s, 0.9), s)),
        "vppo by entropy": lambda: naive.selection(s, e, (None, 2)),
        "vppo by both": lambda: naive.product(naive.selection(s, e, (3, 2)), spread(naive.trajectory(s, 0.9), s)),
        "pgpo": lambda: [naive.token_shaping(x, 0.4, 2.0) for x in s],
        "tor": lambda: naive.selection(s, e, (3, 3), per="step", only=0.5),
        "cgpo": lambda: naive.response_shaping(s, 0.1, 4),
        "selected average": lambda: naive.selection(s, e, (2, None), renormalise=True),
        "all of them": lambda: naive.product(
            naive.selection(s, e, (3, None), per="step"),
            spread(naive.trajectory(s, 0.7), s),
            [naive.token_shaping(x, 0.3, 1.0) for x in s],
            naive.response_shaping(s, 0.2, 5),
        ),
    }[name]()


def spread(factors, s):
    return [[factor] * len(x) for factor, x in zip(factors, s)]


def example(seed=1, lengths=LENGTHS):
    rng = random.Random(seed)
    return [
        [
            {name: -rng.expovariate(0.4) for name in ("log_probs", "masked")}
            | {name: rng.uniform(0, 3) for name in ("entropy", "masked_entropy")}
            for _ in range(length)
        ]
        for length in lengths
    ]


def tensors(rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def ours(method, rollouts):
    objective = ObjectiveConfig(**METHODS[method])
    sensitivity = [
        sensitivity_of(
            objective,
            TwoViews(*tensors([[t[k] for t in r] for k in ("log_probs", "masked", "entropy", "masked_entropy")])),
        )
        for r in rollouts
    ]
    step = StepTokens(sensitivity, tensors([[t["entropy"] for t in r] for r in rollouts]))
    return token_weights_of(objective, step)["policy_weights"]


def theirs(method, rollouts):
    formula = METHODS[method].get("sensitivity", {}).get("formula", "k3")
    s = [naive.sensitivities(formula, r) for r in rollouts]
    return by_loops(method, s, [[t["entropy"] for t in r] for r in rollouts])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_weights_equal_the_loops(method, seed):
    rollouts = example(seed)
    for weights, expected in zip(ours(method, rollouts), theirs(method, rollouts), strict=True):
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_rollouts_is_no_matter(method):
    rollouts, order = example(), [3, 6, 0, 2, 5, 1, 4]
    weights = ours(method, rollouts)
    for i, moved in zip(order, ours(method, [rollouts[i] for i in order]), strict=True):
        torch.testing.assert_close(moved, weights[i], **EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_another(method):
    """Negative control: the weights of any other method are far off."""
    rollouts = example()
    flat = torch.cat(ours(method, rollouts))
    for other in METHODS:
        if other != method:
            difference = flat - torch.tensor([w for of_rollout in theirs(other, rollouts) for w in of_rollout])
            assert difference.abs().max() > 1e-3, other


@pytest.mark.parametrize("chunk", [1 << 20, 40], ids=["at once", "in chunks"])
def test_divergences_equal_the_loops(chunk):
    """Of both halves of the logits, KL, Jensen-Shannon divergence and Hellinger distance, and VEPO's score of them."""
    process_groups.connect()
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2 * 9, 6, generator=generator)
    weight, tokens = torch.randn(11, 6, generator=generator), torch.randint(11, (9,), generator=generator).repeat(2)
    world = torch.distributed.group.WORLD
    found = output_token_statistics(hidden, weight, tokens, world, divergences=True, chunk_elements=chunk)
    p, q = (hidden.double() @ weight.double().T).softmax(-1).split(9)
    expected = [naive.divergences(a.tolist(), b.tolist()) for a, b in zip(p, q)]
    torch.testing.assert_close(found.divergences.double().T, torch.tensor(expected).double(), rtol=1e-4, atol=1e-6)
    assert all(torch.tensor(expected).double().std(dim=0) > 1e-2)  # not all alike
    views = TwoViews(*found.log_probs.split(9), *found.entropy.split(9), found.divergences)
    entropy, other = ([-sum(x * math.log(x) for x in row) for row in side.tolist()] for side in (p, q))
    score = naive.vepo_scores(entropy, other, [jsd for _, jsd, _ in expected])
    ours = sensitivity_of(ObjectiveConfig(sensitivity=dict(formula="vepo")), views)
    torch.testing.assert_close(ours, torch.tensor(score).double(), rtol=1e-4, atol=1e-5)
    for place, formula in enumerate(("exact", "jsd", "hellinger")):
        of_formula = sensitivity_of(ObjectiveConfig(sensitivity=dict(formula=formula)), views)
        assert of_formula.equal(found.divergences[place].double())


@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.5000001, 10.0]), max_size=30), st.integers(1, 10))
def test_a_share_is_exact_and_the_first_of_equal_values_win(values, tenths):
    share = tenths / 10
    kept = largest(torch.tensor(values, dtype=torch.float64), share)
    assert kept.tolist() == [float(x) for x in naive.top(values, tenths)]
    assert kept.sum() == -(-tenths * len(values) // 10)


def test_a_share_is_counted_in_integers():
    """0.3 of 50 is 15, of which float32 makes 16, and 0.1 of 30 is 3, of which a float64 product may make 4."""
    assert [share_of(50, 0.3), share_of(90, 0.3), share_of(30, 0.1), share_of(1, 0.01), share_of(0, 0.4)] == [
        15, 27, 3, 1, 0
    ]  # fmt: skip
    assert math.ceil(torch.tensor(50) * torch.tensor(0.3, dtype=torch.float32)) == 16


def test_dealt_statistics_are_those_of_ranks_and_micro_batches():
    s = [naive.sensitivities("k3", r) for r in example(2, [4, 2, 0, 5, 3, 6, 1, 2, 7, 3, 1])]
    objective = ObjectiveConfig(
        trajectory_shaping=dict(statistics="dealt"), average_ranks=2, average_micro_batch_size=3
    )
    dealt = deal(len(s), 2, 3)
    weights = token_weights_of(objective, StepTokens(tensors(s)))["policy_weights"]
    expected = naive.trajectory(s, 0.9, dealt)
    for of_rollout, factor in zip(weights, expected):
        torch.testing.assert_close(of_rollout, torch.full_like(of_rollout, factor), **EXACT)
    whole = naive.trajectory(s, 0.9)
    assert max(abs(a - b) for a, b in zip(expected, whole)) > 0.05  # the split is another number


def test_trajectory_factors_have_mean_one():
    s = tensors([naive.sensitivities("k3", r) for r in example(4)])
    factors = TrajectoryShaping(0.8)(s)
    there = [i for i, length in enumerate(LENGTHS) if length]
    assert factors[there].mean().item() == pytest.approx(1.0, abs=1e-6)  # the 1e-8 in its denominator
    assert factors[there].min().item() == pytest.approx(0.8) and factors[2] == 1


NOTHING_TO_COMPARE = {
    "an empty response": [[]],
    "nothing at all": [[], []],
    "one response of one token": [[0.3]],
    "responses alike": [[0.2], [0.2]],
    "text alone": [[0.0, 0.0, 0.0], [0.0]],
}


@pytest.mark.parametrize("shaping", ["trajectory_shaping", "token_shaping", "response_shaping"])
@pytest.mark.parametrize("name", NOTHING_TO_COMPARE)
def test_where_there_is_nothing_to_compare_nothing_is_shaped(name, shaping):
    values = NOTHING_TO_COMPARE[name]
    weights = token_weights_of(ObjectiveConfig(**{shaping: {}}), StepTokens(tensors(values)))["policy_weights"]
    assert [w.tolist() for w in weights] == [[1.0] * len(of_response) for of_response in values]


def test_a_range_too_small_shapes_no_trajectory():
    assert TrajectoryShaping(0.9)(tensors([[0.2], [0.2 + 1e-7]])).tolist() == [1.0, 1.0]
    assert TrajectoryShaping(0.9)(tensors([[0.2], [0.2 + 1e-5]])).tolist() != [1.0, 1.0]


def test_a_response_of_one_token_keeps_it_and_one_of_none_nothing():
    objective = ObjectiveConfig(policy_tokens=dict(sensitivity_share=0.01))
    weights = token_weights_of(objective, StepTokens(tensors([[0.0], [], [0.1, 0.2]])))["policy_weights"]
    assert [w.tolist() for w in weights] == [[1.0], [], [0.0, 1.0]]


@pytest.mark.parametrize(
    "options, problem",
    [
        (dict(policy_tokens={}), "selects no token"),
        (dict(policy_tokens=dict(sensitivity_share=0.0)), "greater than 0"),
        (dict(policy_tokens=dict(sensitivity_share=0.2, average="selected"), average="sequence"), "average token"),
        (dict(kl_prcp_tokens=dict(entropy_share=0.2), kl_prcp_coef=0.0), "kl_prcp_coef above 0"),
    ],
    ids=["no share", "share 0", "another average", "no KL_prcp"],
)
def test_what_excludes_each_other_is_said_at_the_start(options, problem):
    with pytest.raises(ValidationError, match=problem):
        ObjectiveConfig(**options)

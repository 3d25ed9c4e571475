"""Mismatch of rollout engine and trainer, and the bias of truncated sampling, against plain loops and against drawing
from known policies."""

import math

import pytest
import torch

from megatron_papo.objective.papo_loss import truncated_importance_weights
from megatron_papo.objective.rollout_mismatch import (
    mismatch_metrics,
    mismatch_sums,
    sampling_bias_metrics,
    sampling_bias_sums,
)


def example():
    generator = torch.Generator().manual_seed(2)
    old = -3 * torch.rand(40, generator=generator)
    return old, old + 0.3 * torch.randn(40, generator=generator)


def added(first, second):
    return {name: first[name] + second[name] for name in first}


def test_metrics_equal_the_loops():
    old, rollout = example()
    pairs = list(zip(old.tolist(), rollout.tolist()))
    weights = [math.exp(o - r) for o, r in pairs]
    expected = {
        "rollout_log_prob_difference_mean": sum(abs(o - r) for o, r in pairs) / 40,
        "rollout_log_prob_difference_max": 1.5,
        "rollout_kl": sum(r - o for o, r in pairs) / 40,
        "rollout_kl_k3": sum(w - 1 - math.log(w) for w in weights) / 40,
        "rollout_effective_sample_size": sum(weights) ** 2 / sum(w * w for w in weights) / 40,
    }
    # two ranks' sums add up to those of all tokens
    found = mismatch_metrics(added(mismatch_sums(old[:13], rollout[:13]), mismatch_sums(old[13:], rollout[13:])), 1.5)
    assert found == pytest.approx(expected, rel=1e-5)
    other = mismatch_metrics(mismatch_sums(rollout, old), 1.5)  # negative control: the arguments exchanged
    assert abs(other["rollout_kl"] - found["rollout_kl"]) > 1e-3
    assert abs(other["rollout_effective_sample_size"] - found["rollout_effective_sample_size"]) > 1e-3


def test_equal_policies_and_no_tokens():
    old, _ = example()
    same = mismatch_metrics(mismatch_sums(old, old), 0.0)
    assert same["rollout_effective_sample_size"] == pytest.approx(1.0) and same["rollout_kl_k3"] == 0.0
    none = mismatch_metrics(mismatch_sums(old[:0], old[:0]), 0.0)
    assert all(math.isfinite(value) for value in none.values())
    far = mismatch_metrics(mismatch_sums(torch.tensor([-0.1, -torch.inf]), torch.tensor([-0.1, -0.1])), math.inf)
    assert math.isfinite(far["rollout_kl"]) and far["rollout_effective_sample_size"] == pytest.approx(0.5)


def test_kl_is_unbiased_under_samples_of_the_rollout_policy():
    generator = torch.Generator().manual_seed(5)
    p, q = (torch.randn(2, 30, generator=generator) * torch.tensor([[0.2], [1.2]])).log_softmax(
        -1
    )  # pi_rollout, pi_old
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)
    true_kl = float((p.exp() * (p - q)).sum())
    found = mismatch_metrics(mismatch_sums(q[tokens], p[tokens]), 0.0)
    assert found["rollout_kl"] == pytest.approx(true_kl, abs=0.02) and found["rollout_kl_k3"] == pytest.approx(
        true_kl, abs=0.02
    )
    assert abs(float((q.exp() * (q - p)).sum()) - true_kl) > 0.05  # the other direction would be seen


def test_truncated_weights_correct_the_expectation():
    """E_rollout[w f] = E_old[f] as long as no weight is cut; with a cap it is smaller."""
    generator = torch.Generator().manual_seed(5)
    p, q = (torch.randn(2, 30, generator=generator) * 0.5).log_softmax(-1)
    reward = torch.arange(30.0)
    weights = truncated_importance_weights(q, p, 100.0)
    assert float((p.exp() * weights * reward).sum()) == pytest.approx(float((q.exp() * reward).sum()), rel=1e-5)
    assert float((p.exp() * reward).sum()) != pytest.approx(float((q.exp() * reward).sum()), rel=1e-2)
    capped = truncated_importance_weights(q.requires_grad_(), p, 1.5)
    assert capped.max() == 1.5 < weights.max() and not capped.requires_grad


@pytest.mark.parametrize("top_p", [1.0, 0.99, 0.9])
def test_sampling_bias_shows_what_top_p_cuts_off(top_p):
    generator = torch.Generator().manual_seed(1)
    log_pi = (2 * torch.randn(100, generator=generator)).log_softmax(-1)
    ordered, place = log_pi.exp().sort(descending=True)
    kept = torch.where(ordered.cumsum(0) - ordered < top_p, ordered, 0.0)
    behaviour = torch.zeros(100).scatter(0, place, kept / kept.sum())
    tokens = torch.multinomial(behaviour, 100_000, replacement=True, generator=generator)
    entropy = -(log_pi.exp() * log_pi).sum()
    found = sampling_bias_metrics(sampling_bias_sums(log_pi[tokens], entropy.expand(len(tokens))))
    exact = float(-(behaviour * log_pi).sum() - entropy)
    assert found["sampling_bias"] == pytest.approx(exact, abs=4 * found["sampling_bias_error"])
    significant = found["sampling_bias"] < -5 * found["sampling_bias_error"]
    assert significant == (top_p < 1.0)
    deviation = float((-log_pi[tokens] - entropy).std()) / len(tokens) ** 0.5
    assert found["sampling_bias_error"] == pytest.approx(deviation, rel=1e-3)

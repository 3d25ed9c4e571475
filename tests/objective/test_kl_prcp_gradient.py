"""What the gradient of KL_prcp is, on categoricals in float64: with k3 and samples of the policy what is logged
estimates KL(pi || pi_mask), while the gradient is that of KL(pi_mask || pi) in the original branch and that of KL(pi ||
pi_mask) in the masked one. Only `exact` follows what it logs.

The expectation over samples is taken exactly: every token once, weighted by its probability, held fixed as samples are.
"""

import pytest
import torch

from megatron_papo.objective.papo_loss import kl_k3

SIZE = 7
TOLERANCE = dict(rtol=0.0, atol=1e-14)


@pytest.fixture(params=range(3))
def logits(request):
    """Of both branches, close enough that no clamp is active."""
    generator = torch.Generator().manual_seed(request.param)
    original, masked = torch.randn(2, SIZE, generator=generator, dtype=torch.float64)
    return original.requires_grad_(), masked.requires_grad_()


def gradients(value, logits):
    return torch.autograd.grad(value, logits)


def kl(p, q):
    """KL(p || q) from logits, by a sum over the vocabulary."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def expected_k3(original, masked):
    """E_{y ~ pi} k3(y), the samples' probabilities held fixed."""
    log_p, log_q = original.log_softmax(-1), masked.log_softmax(-1)
    return (log_p.exp().detach() * kl_k3(log_p, log_q)).sum()


def test_k3_logs_one_divergence_and_descends_another(logits):
    original, masked = logits
    value = expected_k3(original, masked)
    torch.testing.assert_close(value, kl(original, masked), **TOLERANCE)
    of_original, of_masked = gradients(value, logits)
    torch.testing.assert_close(of_original, gradients(kl(masked, original), logits)[0], **TOLERANCE)
    torch.testing.assert_close(of_masked, gradients(kl(original, masked), logits)[1], **TOLERANCE)


def test_it_is_not_the_gradient_of_what_is_logged(logits):
    """The control: in the original branch the two divergences' gradients are far apart."""
    of_logged = gradients(kl(*logits), logits)[0]
    of_k3 = gradients(expected_k3(*logits), logits)[0]
    assert (of_logged - of_k3).abs().max() > 1e-2


def test_exact_follows_what_it_logs(logits):
    """The product's own sum over the vocabulary, in fp32."""
    from megatron_papo.distributed import process_groups
    from megatron_papo.model.log_probs import token_statistics

    process_groups.connect()
    both = torch.stack(logits).detach().float().requires_grad_()
    positions, tokens = torch.arange(2), torch.zeros(2, dtype=torch.long)
    statistics = token_statistics(both, positions, tokens, torch.distributed.group.WORLD, kl_of_halves=True)
    [gradient] = torch.autograd.grad(statistics.kl.sum(), [both])
    expected = torch.stack(gradients(kl(*logits), logits))
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)

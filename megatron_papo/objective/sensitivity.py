"""How much each response token depends on the picture: from what one policy says about it with the picture (p) and with
another view (q). Constants: nothing here is differentiated. Tensors [T] or [B, T], in nats.

Which of them a method uses, and how well it was read: docs/family.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_papo.objective.papo_loss import kl_abs, kl_k3

ENTROPY_EPSILON = 1e-6


@dataclass(frozen=True)
class TwoViews:
    """What a policy says about response tokens with the picture, and with the other view of it."""

    log_probs: Tensor
    other_log_probs: Tensor
    entropy: Tensor
    """Over the whole vocabulary."""
    other_entropy: Tensor
    divergences: Tensor | None = None
    """[3, T] KL(p || q), Jensen-Shannon divergence, Hellinger distance over the whole vocabulary."""


def k3_sensitivity(views: TwoViews) -> Tensor:
    """Return e^d - d - 1, d = log q - log p clamped to [-20, 20], the value to [0, 10] (VPPO, arXiv 2510.09285; the
    clamps are its code's)."""
    return kl_k3(views.log_probs.double(), views.other_log_probs.double()).clamp(min=0.0)


def abs_sensitivity(views: TwoViews) -> Tensor:
    """Return |log p - log q| (ToR, arXiv 2603.25077)."""
    return kl_abs(views.log_probs.double(), views.other_log_probs.double())


def entropy_gap(views: TwoViews) -> Tensor:
    """Return max(H_q - H_p, 0) / (H_q + 1e-6), H over the vocabulary (CPPO's detector, arXiv 2601.00501)."""
    other = views.other_entropy.double()
    return (other - views.entropy.double()).clamp(min=0.0) / (other + ENTROPY_EPSILON)


def exact_kl(views: TwoViews) -> Tensor:
    """Return KL(p || q), over the vocabulary."""
    return _divergences(views)[0]


def jensen_shannon(views: TwoViews) -> Tensor:
    """Return the Jensen-Shannon divergence of p and q, over the vocabulary."""
    return _divergences(views)[1]


def hellinger(views: TwoViews) -> Tensor:
    """Return the Hellinger distance of p and q, over the vocabulary, from 0 to 1."""
    return _divergences(views)[2]


def vepo_score(views: TwoViews) -> Tensor:
    """Return VEPO's score of the tokens of one response, [T] (arXiv 2606.03937).

        H^ (1 - (1 - JSD^)^0.7 (1 - |dH|^)^0.3)

    Hats: scaled to 0..1 over the response; 0 where all are equal. How VEPO normalises is not known to us.
    """
    entropy, gap = views.entropy.double(), (views.other_entropy.double() - views.entropy.double()).abs()
    of_picture = (1 - _unit(jensen_shannon(views))) ** 0.7 * (1 - _unit(gap)) ** 0.3
    return _unit(entropy) * (1 - of_picture)


def _divergences(views: TwoViews) -> Tensor:
    if views.divergences is None:
        raise ValueError("the sensitivity needs divergences, which were not given")
    return views.divergences.double()


def _unit(values: Tensor) -> Tensor:
    if len(values) == 0 or values.max() == values.min():
        return torch.zeros_like(values)
    return (values - values.min()) / (values.max() - values.min())

"""How much each response token depends on the picture: from what one policy says about it with the picture (p) and with
another view (q). Constants: nothing here is differentiated. Tensors [T] or [B, T], in nats.

Which of them a method uses, and how well it was read: docs/family.md.
"""

from dataclasses import dataclass

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

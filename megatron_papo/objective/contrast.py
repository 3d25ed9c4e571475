"""CPPO's contrast of a kept and a removed view of the picture (arXiv 2601.00501; its authors' code at 77f8763): the
policy is to stay near itself where what matters is kept, and to leave where it is gone. Tensors [T] or [B, T]."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_papo.objective.dealt_average import dealt_denominators
from megatron_papo.objective.papo_loss import StepCounts, kl_k3, total


def contrast(log_probs: Tensor, kept_log_probs: Tensor, removed_log_probs: Tensor, temperature: float) -> Tensor:
    """Return softplus((KL(pi || pi_kept) - KL(pi || pi_removed)) / temperature) per token, KL by k3. [B, T] x 3 ->
    [B, T]. Gradient flows into all three.
    """
    difference = kl_k3(log_probs, kept_log_probs) - kl_k3(log_probs, removed_log_probs)
    return F.softplus(difference / temperature)


def detected(sensitivity: Tensor, share: float) -> Tensor:
    """Return 1.0 on a response's tokens at or above the k-th largest sensitivity, k = max(1, floor(share x number of
    tokens above 0)); ties are all kept, none is where no token is above 0. [T] -> float64 [T].

    Differs: the authors' code counts and ranks the position after the last token as well.
    """
    values = sensitivity.double()
    count = int((values > 0).sum())
    if count == 0:
        return torch.zeros_like(values)
    wanted = max(1, math.floor(count * Fraction(repr(share))))
    return (values >= values.topk(wanted).values[-1]).double()


def contrast_weights(
    selected: Sequence[Tensor], ranks: int | None = None, micro_batch_size: int | None = None
) -> list[Tensor]:
    """Return what sums the contrast over a step to its mean over the selected tokens.

    Args:
        selected: 1.0 on the selected tokens, one tensor [T] per rollout of the whole step.
        ranks, micro_batch_size: of the authors' average: the mean of each micro-batch, then over micro-batches, then
            over ranks (objective/dealt_average.py); a micro-batch without selected tokens adds 0. None: of the step.
    """
    counts = [StepCounts(float(of_response.sum()), 1) for of_response in selected]
    if ranks is None or micro_batch_size is None:
        denominators = [total(counts)] * len(counts)
    else:
        denominators = dealt_denominators(counts, ranks, micro_batch_size)
    return [s / max(float(counts.tokens), 1.0) for s, counts in zip(selected, denominators, strict=True)]

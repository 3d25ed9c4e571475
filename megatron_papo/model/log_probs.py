"""Log-probs, entropy and KL from vocabulary-sharded logits: each tensor-parallel rank holds [M, V / tp]; nothing of size V is gathered.

One pass over the logits in chunks of tokens, one collective of size O(N). Only the logits, which exist anyway, are kept for the
backward pass: probabilities are computed again there, chunk by chunk, so that the peak is one gradient of the logits' size and dtype
plus a few chunks. Arithmetic in fp32 whatever the dtype of the logits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather, all_reduce

CHUNK_ELEMENTS = 1 << 22
"""Logits of one chunk: 16 MiB in fp32."""
LOWEST = -1e4
"""Stands for log 0 inside the sums, where -inf would make 0 * -inf = nan; exp(-1e4) is 0 in fp32."""
LOG_RATIO_LIMIT = 20.0
"""|log pi - log pi_other| of one vocabulary entry is clamped to this in the exact KL, as the estimators clamp theirs."""


class TokenStatistics(NamedTuple):
    """Of the distributions that predict each response token, fp32."""

    log_probs: Tensor
    """[N] of the token itself."""
    entropy: Tensor
    """[N] over the whole vocabulary, in nats."""
    kl: Tensor | None
    """[N / 2] KL(first half || second half), where it was asked for."""


def token_statistics(
    logits: Tensor,
    positions: Tensor,
    tokens: Tensor,
    group: ProcessGroup,
    *,
    temperature: float = 1.0,
    kl_of_halves: bool = False,
    second_half_gradient: bool = True,
) -> TokenStatistics:
    """[M, V / tp] logits, [N] rows of it, [N] tokens -> TokenStatistics. Gradient flows through all three into the logits.

    logits: this rank's slice of the vocabulary, before the temperature. positions: the row that predicts each token. kl_of_halves:
    positions are two halves, the same tokens under two policies (the picture and the masked picture); then

        kl = sum_v pi(v) d(v),   d = clamp(log pi - log pi_other, -20, 20)

    second_half_gradient: False treats the second half as constants. Every rank of the group gets the same values.
    """
    log_probs, entropy, kl = _TokenStatistics.apply(logits, positions, tokens, group, temperature, kl_of_halves, second_half_gradient)
    return TokenStatistics(log_probs, entropy, kl if kl_of_halves else None)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, positions, tokens, group, temperature, kl_of_halves, second_half_gradient):
        local = tokens - group.rank() * logits.shape[-1]
        mine = (local >= 0) & (local < logits.shape[-1])
        local = local.clamp(0, logits.shape[-1] - 1)
        log_total, target, entropy = _sums(logits, positions, local, mine, temperature, group)
        kl = unclamped = logits.new_zeros(0, dtype=torch.float32)
        if kl_of_halves:
            kl, unclamped = _kl_sums(logits, positions, log_total, temperature, group)
        ctx.save_for_backward(logits, positions, local, mine, log_total, entropy, kl, unclamped)
        ctx.temperature, ctx.second_half_gradient = temperature, second_half_gradient
        ctx.set_materialize_grads(False)
        return target - log_total, entropy, kl

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy, grad_kl):
        logits, positions, local, mine, log_total, entropy, kl, unclamped = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        count = len(positions) // 2 if not ctx.second_half_gradient else len(positions)

        def add(rows: slice, values: Tensor) -> None:
            gradient.index_add_(0, positions[rows], values.mul_(1 / ctx.temperature).to(gradient.dtype))

        for rows in _chunks(count, logits) if grad_log_probs is not None or grad_entropy is not None else ():
            log_pi = _log_softmax(logits, positions[rows], log_total[rows], ctx.temperature)
            values = log_pi.exp()
            if grad_entropy is None:
                values.mul_(-grad_log_probs[rows, None])
            else:  # dH / dlogit = -pi (log pi + H)
                factor = log_pi.add_(entropy[rows, None]).mul_(-grad_entropy[rows, None])
                values.mul_(factor if grad_log_probs is None else factor.sub_(grad_log_probs[rows, None]))
            if grad_log_probs is not None:
                values.scatter_add_(-1, local[rows, None], (grad_log_probs[rows] * mine[rows])[:, None])
            add(rows, values)

        for rows in _chunks(len(kl), logits) if grad_kl is not None else ():
            other = slice(rows.start + len(kl), rows.stop + len(kl))
            log_pi = _log_softmax(logits, positions[rows], log_total[rows], ctx.temperature)
            log_other = _log_softmax(logits, positions[other], log_total[other], ctx.temperature)
            pi, inside = log_pi.exp(), (log_pi - log_other).abs_() < LOG_RATIO_LIMIT
            moves, weight = pi * inside, grad_kl[rows, None]
            if ctx.second_half_gradient:  # dKL / dlogit_other = pi_other U - pi u
                add(other, log_other.exp().mul_(unclamped[rows, None]).sub_(moves).mul_(weight))
            # dKL / dlogit = pi (d - KL) + pi u - pi U;  u = 1 where d is not clamped, U = sum pi u
            difference = log_pi.sub_(log_other).clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            add(rows, difference.sub_((kl[rows] + unclamped[rows])[:, None]).mul_(pi).add_(moves).mul_(weight))
        return gradient, None, None, None, None, None, None


def _chunks(count: int, logits: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _scaled(logits: Tensor, positions: Tensor, temperature: float) -> Tensor:
    """[n, V / tp] fp32, a copy."""
    return logits.index_select(0, positions).float().mul_(1 / temperature)


def _log_softmax(logits: Tensor, positions: Tensor, log_total: Tensor, temperature: float) -> Tensor:
    """[n, V / tp] log pi, LOWEST for -inf; a tensor of its own."""
    return _scaled(logits, positions, temperature).sub_(log_total[:, None]).clamp_(min=LOWEST)


def _sums(logits, positions, local, mine, temperature, group) -> tuple[Tensor, Tensor, Tensor]:
    """[N] log of the sum of exponentials, [N] the token's logit, [N] entropy: over the whole vocabulary.

    Each rank sums relative to its own maximum m; the ranks' sums are then brought to the common one.
    """
    mine_of_rank = logits.new_empty(4, len(positions), dtype=torch.float32)
    maximum, total, weighted, target = mine_of_rank
    for rows in _chunks(len(positions), logits):
        scaled = _scaled(logits, positions[rows], temperature)
        target[rows] = torch.where(mine[rows], scaled.gather(-1, local[rows, None])[:, 0], 0.0)
        maximum[rows] = scaled.max(dim=-1).values.clamp_(min=torch.finfo(torch.float32).min / 4)  # a shard may be all -inf
        shifted = scaled.sub_(maximum[rows, None]).clamp_(min=LOWEST)
        exponentials = shifted.exp()
        total[rows] = exponentials.sum(-1)
        weighted[rows] = exponentials.mul_(shifted).sum(-1)
    ranks = [mine_of_rank]
    if group.size() > 1:
        ranks = [torch.empty_like(mine_of_rank) for _ in range(group.size())]
        all_gather(ranks, mine_of_rank, group=group)
    maximum, total, weighted, target = torch.stack(ranks).unbind(1)
    common = maximum.max(0).values
    below = (maximum - common).clamp(min=LOWEST)
    scale = below.exp()
    weighted = (scale * (weighted + below * total)).sum(0)
    total = (scale * total).sum(0)
    log_total = total.log() + common
    return log_total, target.sum(0), total.log() - weighted / total


def _kl_sums(logits, positions, log_total, temperature, group) -> tuple[Tensor, Tensor]:
    """[N / 2] KL of the first half from the second, [N / 2] the probability of the entries whose log-ratio is not clamped."""
    half = len(positions) // 2
    sums = logits.new_empty(2, half, dtype=torch.float32)
    for rows in _chunks(half, logits):
        other = slice(rows.start + half, rows.stop + half)
        log_pi = _log_softmax(logits, positions[rows], log_total[rows], temperature)
        difference = log_pi - _log_softmax(logits, positions[other], log_total[other], temperature)
        pi = log_pi.exp_()
        sums[1, rows] = (pi * (difference.abs() < LOG_RATIO_LIMIT)).sum(-1)
        sums[0, rows] = difference.clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).mul_(pi).sum(-1)
    if group.size() > 1:
        all_reduce(sums, group=group)
    return sums[0], sums[1]

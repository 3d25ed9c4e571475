"""Log-probs, entropy and KL from vocabulary-sharded logits: each tensor-parallel rank holds [M, V / tp]; nothing of
size V is gathered.

One pass over the logits in chunks of tokens, one collective of size O(N). Only the logits, which exist anyway, are kept
for the backward pass: probabilities are computed again there, chunk by chunk, so that the peak is one gradient of the
logits' size and dtype plus a few chunks. Arithmetic in fp32 whatever the dtype of the logits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather, all_reduce
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 22
"""Logits of one chunk: 16 MiB in fp32, large enough to fill a GPU."""
CPU_CHUNK_ELEMENTS = 1 << 19
"""On a CPU: 2 MiB, so that the passes over a chunk find it in the cache; larger ones take up to twice as long."""
OUTPUT_CHUNK_ELEMENTS = 1 << 27
"""Logits that output_token_statistics lets exist at once: 256 MiB in bf16."""
LOWEST = -1e4
"""Stands for log 0 inside the sums, where -inf would make 0 * -inf = nan; exp(-1e4) is 0 in fp32."""
one_for_all: ContextVar[Callable[[int], AbstractContextManager[None]] | None] = ContextVar("one_for_all", default=None)
"""Set by a plan, which looks at one of many chunks that are alike: makes what happens within count so many times."""
LOG_RATIO_LIMIT = 20.0
"""|log pi - log pi_other| of one vocabulary entry is clamped to this in the exact KL, as the estimators clamp
theirs."""


class TokenStatistics(NamedTuple):
    """What the last stage says about the distributions that predict the response tokens, fp32."""

    log_probs: Tensor
    """[N], of the token itself."""
    entropy: Tensor
    """[N], over the whole vocabulary, in nats."""
    kl: Tensor | None = None
    """[N / 2] KL(first half || second half), where it was asked for."""
    allowed_log_probs: Tensor | None = None
    """[N] log_probs over the tokens that are not forbidden, without gradient; None where none is."""
    allowed_entropy: Tensor | None = None
    divergences: Tensor | None = None
    """[3, N / 2] of the first half from the second, without gradient, where they were asked for: KL, Jensen-Shannon
    divergence, Hellinger distance."""


def token_statistics(
    logits: Tensor,
    positions: Tensor,
    tokens: Tensor,
    group: ProcessGroup,
    *,
    temperature: float = 1.0,
    kl_of_halves: bool = False,
    second_half_gradient: bool = True,
    forbidden: Sequence[int] = (),
    divergences: bool = False,
) -> TokenStatistics:
    """Return log-probs, entropy and KL of the response tokens. Gradient flows through all three into the logits.

    Args:
        logits: [M, V / tp], this rank's slice of the vocabulary, before the temperature.
        positions: [N], the row of the logits that predicts each token.
        tokens: [N] ids in the whole vocabulary.
        group: the tensor-parallel ranks, each of which gets the same values.
        temperature: what the logits are divided by.
        kl_of_halves: positions are two halves, the same tokens under two policies (the picture and the masked
            picture); then kl = sum_v pi(v) d(v),   d = clamp(log pi - log pi_other, -20, 20)
        second_half_gradient: False treats the second half as constants.
        forbidden: token ids that the rollout engine never samples. If there are any, the same is also said about the
            distributions over all other tokens; a forbidden token has log-prob -inf there.
        divergences: positions are two halves, as for kl_of_halves, whose divergences are wanted.
    """
    log_probs, entropy, kl = _TokenStatistics.apply(
        logits, positions, tokens, group, temperature, kl_of_halves, second_half_gradient
    )
    statistics = TokenStatistics(log_probs, entropy, kl if kl_of_halves else None)
    if divergences:
        with torch.no_grad():
            values = _divergences(logits, positions, tokens, temperature, group)
        statistics = statistics._replace(divergences=values)
    if not forbidden:
        return statistics
    with torch.no_grad():
        local, is_local = _local_tokens(logits, tokens, group)
        log_total, target, allowed_entropy = _sums(
            logits, positions, local, is_local, temperature, group, _local_ids(logits, forbidden, group)
        )
    return statistics._replace(allowed_log_probs=target - log_total, allowed_entropy=allowed_entropy)


def output_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    group: ProcessGroup,
    *,
    temperature: float = 1.0,
    kl_of_halves: bool = False,
    second_half_gradient: bool = True,
    forbidden: Sequence[int] = (),
    divergences: bool = False,
    chunk_elements: int = OUTPUT_CHUNK_ELEMENTS,
) -> TokenStatistics:
    """Return token_statistics of logits = hidden weight^T that never exist whole.

    Args:
        hidden: [N, h], the state that predicts each token, the same on every rank of the group, and so is its gradient.
        weight: [V / tp, h], this rank's slice of the output layer.
        tokens: [N] ids in the whole vocabulary.
        group, temperature, kl_of_halves, second_half_gradient, forbidden, divergences: as in token_statistics.
        chunk_elements: logits that exist at once. They are computed again, chunk by chunk, in the backward pass, so
            that memory does not grow with N x V.
    """

    def of_chunk(hidden: Tensor, weight: Tensor, tokens: Tensor) -> TokenStatistics:
        return token_statistics(
            F.linear(hidden, weight),
            torch.arange(len(tokens), device=tokens.device),
            tokens,
            group,
            temperature=temperature,
            kl_of_halves=kl_of_halves,
            second_half_gradient=second_half_gradient,
            forbidden=forbidden,
            divergences=divergences,
        )

    hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    pairs = kl_of_halves or divergences or not second_half_gradient  # both halves of a token must meet in one chunk
    count = len(tokens) // 2 if pairs else len(tokens)
    size = max(1, chunk_elements // weight.shape[0] // (2 if pairs else 1))
    if count <= size:
        return of_chunk(hidden, weight, tokens)

    parts = []
    for start in range(0, count, size):
        rows = torch.arange(start, min(start + size, count), device=tokens.device)
        if pairs:
            rows = torch.cat([rows, rows + count])
        parts.append(
            checkpoint(of_chunk, hidden[rows], weight, tokens[rows], use_reentrant=False, preserve_rng_state=False)
        )

    def joined(values: list[Tensor]) -> Tensor:
        if not pairs:
            return torch.cat(values)
        first, second = zip(*(value.chunk(2) for value in values), strict=True)
        return torch.cat([*first, *second])

    return TokenStatistics(
        joined([part.log_probs for part in parts]),
        joined([part.entropy for part in parts]),
        torch.cat([part.kl for part in parts]) if kl_of_halves else None,
        joined([part.allowed_log_probs for part in parts]) if forbidden else None,
        joined([part.allowed_entropy for part in parts]) if forbidden else None,
        torch.cat([part.divergences for part in parts], dim=1) if divergences else None,
    )


def _local_tokens(logits: Tensor, tokens: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the tokens' places in this rank's slice of the vocabulary, and which of them lie there."""
    local = tokens - group.rank() * logits.shape[-1]
    is_local = (local >= 0) & (local < logits.shape[-1])
    return local.clamp(0, logits.shape[-1] - 1), is_local


def _local_ids(logits: Tensor, token_ids: Sequence[int], group: ProcessGroup) -> Tensor:
    """Return the places of those token ids that lie in this rank's slice of the vocabulary."""
    first, size = group.rank() * logits.shape[-1], logits.shape[-1]
    local = [token - first for token in token_ids if first <= token < first + size]
    return torch.tensor(local, dtype=torch.long, device=logits.device)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        positions: Tensor,
        tokens: Tensor,
        group: ProcessGroup,
        temperature: float,
        kl_of_halves: bool,
        second_half_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        local, is_local = _local_tokens(logits, tokens, group)
        log_total, target, entropy = _sums(logits, positions, local, is_local, temperature, group)
        kl = unclamped = logits.new_zeros(0, dtype=torch.float32)
        if kl_of_halves:
            kl, unclamped = _kl_sums(logits, positions, log_total, temperature, group)
        ctx.save_for_backward(logits, positions, local, is_local, log_total, entropy, kl, unclamped)
        ctx.temperature, ctx.second_half_gradient = temperature, second_half_gradient
        ctx.set_materialize_grads(False)
        return target - log_total, entropy, kl

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, grad_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, positions, local, is_local, log_total, entropy, kl, unclamped = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        half = len(positions) // 2

        def log_pi(rows: slice) -> Tensor:
            return _log_softmax(logits, positions[rows], log_total[rows], ctx.temperature)

        def add(rows: slice, values: Tensor) -> None:
            gradient.index_add_(0, positions[rows], values.mul_(1 / ctx.temperature).to(gradient.dtype))

        def of_log_probs_and_entropy(rows: slice, log_pi: Tensor) -> Tensor:
            """d log pi(token) / dlogit = [token] - pi;  dH / dlogit = -pi (log pi + H)."""
            values = log_pi.exp()
            if grad_entropy is not None:
                per_token = 0.0 if grad_log_probs is None else grad_log_probs[rows, None]
                values.mul_((log_pi + entropy[rows, None]).mul_(-grad_entropy[rows, None]).sub_(per_token))
            elif grad_log_probs is not None:
                values.mul_(-grad_log_probs[rows, None])
            else:
                values.zero_()
            if grad_log_probs is not None:
                values.scatter_add_(-1, local[rows, None], (grad_log_probs[rows] * is_local[rows])[:, None])
            return values

        if grad_kl is None:
            for rows in _chunks(len(positions) if ctx.second_half_gradient else half, logits):
                add(rows, of_log_probs_and_entropy(rows, log_pi(rows)))
            return gradient, None, None, None, None, None, None

        for rows in _chunks(half, logits):
            other, weight = slice(rows.start + half, rows.stop + half), grad_kl[rows, None]
            log_first, log_second = log_pi(rows), log_pi(other)
            first, difference = log_first.exp(), log_first - log_second
            moves = first * (difference.abs() < LOG_RATIO_LIMIT)
            # dKL / dlogit = pi (d - KL) + pi u - pi U;  u = 1 where d is not clamped, U = sum pi u
            difference.clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).sub_((kl[rows] + unclamped[rows])[:, None])
            add(rows, of_log_probs_and_entropy(rows, log_first).add_(difference.mul_(first).add_(moves).mul_(weight)))
            if ctx.second_half_gradient:  # dKL / dlogit_other = pi_other U - pi u
                of_kl = log_second.exp().mul_(unclamped[rows, None]).sub_(moves).mul_(weight)
                add(other, of_log_probs_and_entropy(other, log_second).add_(of_kl))
        return gradient, None, None, None, None, None, None


def _chunks(count: int, logits: Tensor) -> Iterator[slice]:
    elements = CHUNK_ELEMENTS if logits.is_cuda else CPU_CHUNK_ELEMENTS
    size = max(1, elements // logits.shape[-1])
    starts, once_for = range(0, count, size), one_for_all.get()
    if once_for is None or len(starts) < 3:
        yield from (slice(start, min(start + size, count)) for start in starts)
        return
    with once_for(len(starts) - 1):
        yield slice(0, size)
    yield slice(starts[-1], count)


def _scaled(logits: Tensor, positions: Tensor, temperature: float) -> Tensor:
    """[n, V / tp] fp32, a copy."""
    return logits.index_select(0, positions).float().mul_(1 / temperature)


def _log_softmax(logits: Tensor, positions: Tensor, log_total: Tensor, temperature: float) -> Tensor:
    """[n, V / tp] log pi, LOWEST for -inf; a tensor of its own."""
    return _scaled(logits, positions, temperature).sub_(log_total[:, None]).clamp_(min=LOWEST)


def _sums(
    logits: Tensor,
    positions: Tensor,
    local: Tensor,
    is_local: Tensor,
    temperature: float,
    group: ProcessGroup,
    forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [N] log of the sum of exponentials, [N] the token's logit, [N] entropy, over the whole vocabulary.

    Each rank sums relative to its own maximum m; the ranks' sums are then brought to the common one.

    Args:
        logits, positions, temperature, group: as in token_statistics.
        local, is_local: [N] the tokens' places in this rank's slice, and which of them lie there.
        forbidden: columns of the logits that are taken for -inf.
    """
    of_rank = logits.new_empty(4, len(positions), dtype=torch.float32)
    maximum, total, weighted, target = of_rank
    for rows in _chunks(len(positions), logits):
        scaled = _scaled(logits, positions[rows], temperature)
        if forbidden is not None:
            scaled.index_fill_(-1, forbidden, -torch.inf)
        target[rows] = torch.where(is_local[rows], scaled.gather(-1, local[rows, None])[:, 0], 0.0)
        maximum[rows] = scaled.amax(-1).clamp_(min=torch.finfo(torch.float32).min / 4)  # a shard may be all -inf
        shifted = scaled.sub_(maximum[rows, None]).clamp_(min=LOWEST)
        exponentials = shifted.exp()
        total[rows] = exponentials.sum(-1)
        weighted[rows] = exponentials.mul_(shifted).sum(-1)
    ranks = [of_rank]
    if group.size() > 1:
        ranks = [torch.empty_like(of_rank) for _ in range(group.size())]
        all_gather(ranks, of_rank, group=group)
    maximum, total, weighted, target = torch.stack(ranks).unbind(1)
    common = maximum.max(0).values
    below = (maximum - common).clamp(min=LOWEST)
    scale = below.exp()
    weighted = (scale * (weighted + below * total)).sum(0)
    total = (scale * total).sum(0)
    log_total = total.log() + common
    return log_total, target.sum(0), total.log() - weighted / total


def _kl_sums(
    logits: Tensor, positions: Tensor, log_total: Tensor, temperature: float, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return [N / 2] KL of the first half from the second, and [N / 2] the probability of the entries whose log-ratio
    is not clamped."""
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


def _divergences(logits: Tensor, positions: Tensor, tokens: Tensor, temperature: float, group: ProcessGroup) -> Tensor:
    """Return [3, N / 2] KL, Jensen-Shannon divergence and Hellinger distance of the first half from the second.

    JSD = (KL(p || m) + KL(q || m)) / 2,  m = (p + q) / 2;    Hellinger = sqrt(1 - sum sqrt(p q))
    """
    local, is_local = _local_tokens(logits, tokens, group)
    log_total, _, _ = _sums(logits, positions, local, is_local, temperature, group)
    half = len(positions) // 2
    sums = logits.new_zeros(3, half, dtype=torch.float32)
    for rows in _chunks(half, logits):
        other = slice(rows.start + half, rows.stop + half)
        log_p = _log_softmax(logits, positions[rows], log_total[rows], temperature)
        log_q = _log_softmax(logits, positions[other], log_total[other], temperature)
        p, q = log_p.exp(), log_q.exp()
        log_m = ((p + q) / 2).clamp(min=torch.finfo(torch.float32).tiny).log()
        sums[0, rows] = (p * (log_p - log_q).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)).sum(-1)
        sums[1, rows] = (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2
        sums[2, rows] = (p.sqrt() - q.sqrt()).square().sum(-1) / 2  # 1 - sum sqrt(p q), without its cancellation
    if group.size() > 1:
        all_reduce(sums, group=group)
    sums[2] = sums[2].clamp(0.0, 1.0).sqrt()
    return sums

"""Log-probs and entropy from vocabulary-sharded logits: each tensor-parallel rank holds [N, V / tp]; nothing is gathered."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce


class _VocabParallelLogProbs(torch.autograd.Function):
    """log_softmax(logits)[token] over a sharded vocabulary; in fp32 whatever the logits' dtype. Two collectives of size O(N)."""

    @staticmethod
    def forward(ctx, logits, tokens, group):
        shard = logits.shape[-1]
        first = group.rank() * shard
        local = tokens - first
        mine = (local >= 0) & (local < shard)
        local = local.clamp(0, shard - 1)

        logits = logits.float()
        maximum = logits.max(dim=-1).values
        all_reduce(maximum, ReduceOp.MAX, group=group)
        shifted = logits - maximum[:, None]
        exponentials = shifted.exp()
        target = torch.where(mine, shifted.gather(-1, local[:, None])[:, 0], 0.0)
        # -inf logits (a forbidden token) have weight 0 in the entropy, not 0 * -inf = nan
        weighted = torch.where(exponentials > 0, exponentials * shifted, 0.0).sum(-1)
        sums = torch.stack([exponentials.sum(-1), weighted, target])
        all_reduce(sums, group=group)
        total, weighted, target = sums
        log_total = total.log()

        ctx.save_for_backward(exponentials / total[:, None], local, mine)
        entropy = log_total - weighted / total
        ctx.mark_non_differentiable(entropy)
        return target - log_total, entropy

    @staticmethod
    def backward(ctx, grad, _):
        probabilities, local, mine = ctx.saved_tensors
        gradient = -probabilities * grad[:, None]
        gradient.scatter_add_(-1, local[:, None], (grad * mine)[:, None])
        return gradient, None, None


def vocab_parallel_log_probs(logits: Tensor, tokens: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Log-prob of each token and the true entropy of each distribution. [N, V / tp], [N], group -> [N], [N], both fp32.

    logits: this rank's slice of the vocabulary, already divided by the temperature. Gradient flows through the log-probs only; the
    entropy (over the whole vocabulary, in nats) is for monitoring. Every rank of the group gets the same values.
    """
    return _VocabParallelLogProbs.apply(logits, tokens, group)

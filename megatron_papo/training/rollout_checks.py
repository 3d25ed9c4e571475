"""What the first sweep over the rollouts tells about them: were they sampled from the policy that is about to be
trained?

Two causes make SGLang's log-prob of a token differ from Megatron's. One is a fault: other weights, another picture,
other positions, kernels that round differently. The other is not: SGLang never samples vision tokens (logit_bias), so
its log-probs are over the allowed tokens, Megatron's over the whole vocabulary. Where the comparison is a gate it is
therefore made over the allowed tokens on both sides (Seen.allowed_log_probs), so that its limit can be tight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megatron_papo.data.chat import forbidden_tokens
from megatron_papo.distributed import collectives, process_groups
from megatron_papo.errors import UserError
from megatron_papo.objective.rollout_mismatch import (
    mismatch_metrics,
    mismatch_sums,
    sampling_bias_metrics,
    sampling_bias_sums,
)
from megatron_papo.training.forward_step import Seen
from megatron_papo.training.rows import TrainingRollout

WORST_SHOWN = 5
CONTEXT_TOKENS = 6
PARITY_ROLLOUTS = 64
"""Rollouts that are compared where that needs a pass of its own: spread evenly over the batch, all ranks together."""


@dataclass(frozen=True)
class Vocabulary:
    """What the comparison with the server has to know about the tokens."""

    forbidden: tuple[int, ...]
    """Ids that the server is told never to sample."""
    decode: Callable[[list[int]], str]
    """Token ids -> text."""


def read_vocabulary(hf_files: Path) -> Vocabulary:
    """Return the vocabulary of the checkpoint whose config.json and tokenizer.json lie in a directory."""
    tokenizer = Tokenizer.from_file(str(hf_files / "tokenizer.json"))
    forbidden = forbidden_tokens(hf_files, tokenizer.get_vocab(with_added_tokens=True))
    return Vocabulary(tuple(forbidden), tokenizer.decode)


def parity_sample(rows: Sequence[TrainingRollout], count: int = PARITY_ROLLOUTS) -> list[TrainingRollout]:
    """Return this rank's share of `count` rollouts, evenly spread over rows; at least one where there are any."""
    share = min(len(rows), max(1, count // process_groups.dp_group().size()))
    return [rows[i * len(rows) // share] for i in range(share)]


@dataclass(frozen=True)
class TokenDifference:
    """One response token, as both sides saw it."""

    row: TrainingRollout
    position: int
    """In the response, from 0."""
    by_megatron: float
    by_server: float

    @property
    def size(self) -> float:
        return abs(self.by_megatron - self.by_server)

    def in_context(self, decode: Callable[[list[int]], str] | None = None, judge: str = "Megatron") -> str:
        """Return one line. decode: token ids -> text; without it the ids are shown. judge: who says what is called
        by_megatron."""
        ids, at = self.row.rollout.response_token_ids, self.position
        before, token, after = ids[max(0, at - CONTEXT_TOKENS) : at], ids[at], ids[at + 1 : at + 1 + CONTEXT_TOKENS]
        if decode is None:
            shown = " ".join([*map(str, before), f">>{token}<<", *map(str, after)])
        else:
            shown = repr(f"{decode(before)}>>{decode([token])}<<{decode(after)}")
        place = f"{self.row.rollout.prompt_id} sample {self.row.rollout.sample} token {at}"
        return f"{place}: {self.size:.3g} (SGLang {self.by_server:.4f}, {judge} {self.by_megatron:.4f}) in {shown}"


def worst_tokens(
    rows: Sequence[TrainingRollout], log_probs: Sequence[Tensor], count: int = WORST_SHOWN
) -> list[TokenDifference]:
    """Return the tokens with the largest differences, the largest first.

    Args:
        rows: rollouts.
        log_probs: Megatron's, one [response_length] per rollout.
        count: how many.
    """
    differences = [
        TokenDifference(row, position, by_megatron, by_server)
        for row, values in zip(rows, log_probs, strict=True)
        for position, (by_megatron, by_server) in enumerate(
            zip(values.tolist(), row.rollout.rollout_log_probs, strict=True)
        )
    ]
    return sorted(differences, key=lambda difference: -difference.size)[:count]


def compare_with_server(
    rows: Sequence[TrainingRollout],
    log_probs: Sequence[Tensor],
    limit: float | None = None,
    decode: Callable[[list[int]], str] | None = None,
    prefix: str = "rollout",
) -> dict[str, float]:
    """Measure how far SGLang's log-probs are from Megatron's: the first sign of a wrong picture, weight or position.

    Args:
        rows: this rank's rollouts.
        log_probs: Megatron's, one [response_length] per rollout on the last stage, else [].
        limit: of the mean difference, in nats; None: no limit.
        decode: token ids -> text, for the worst tokens in the message; without it ids are shown.
        prefix: the first word of the metrics' names.

    Returns objective.rollout_mismatch's metrics over the response tokens of all ranks' rollouts. Collective over all
    ranks. Raises UserError, listing the worst tokens in their context, where the mean difference exceeds the limit.
    """
    compared = rows if process_groups.is_last_stage() else []
    by_megatron = _joined(log_probs)
    by_server = torch.tensor([value for row in compared for value in row.rollout.rollout_log_probs])
    differences = (by_megatron - by_server).abs()
    sums = collectives.sum_from_last_stage(mismatch_sums(by_megatron, by_server))
    largest = differences.max().item() if len(differences) else 0.0
    metrics = mismatch_metrics(sums, collectives.max_over_ranks(largest))
    mean, maximum = metrics["rollout_log_prob_difference_mean"], metrics["rollout_log_prob_difference_max"]
    if limit is not None and not mean <= limit:  # nan fails too
        worst = "; ".join(token.in_context(decode) for token in worst_tokens(compared, log_probs))
        raise UserError(
            f"log-probs of the rollouts differ by {mean:.3g} nats on average, {maximum:.3g} at most (limit {limit}):"
            " the server did not run these weights or did not see these pictures (find out with: python -m"
            f" tools.check_parity). Worst here: {worst}"
        )
    return {name.replace("rollout", prefix, 1): value for name, value in metrics.items()}


def sampling_bias(old: Seen) -> dict[str, float]:
    """Return sampling_bias and its error over the rollouts of all ranks: see objective.rollout_mismatch.

    Collective over all ranks.
    """
    log_probs, entropy = _joined(old.log_probs), _joined(old.entropy)
    return sampling_bias_metrics(collectives.sum_from_last_stage(sampling_bias_sums(log_probs, entropy)))


def sampling_bias_message(checks: dict[str, float], top_p: float) -> str | None:
    """Return what to tell the user about the bias that top_p makes; None if it makes none."""
    if top_p == 1:
        return None
    return (
        f"rollout.top_p {top_p}: the sampled tokens are {-checks['sampling_bias']:.4f} +-"
        f" {checks['sampling_bias_error']:.4f} nats less surprising on average than samples of the policy that is"
        " trained: a bias of the gradient; 1.0 has none"
    )


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Return the tokens of all rollouts in one tensor on the host."""
    return torch.cat([torch.zeros(0), *(tensor.cpu() for tensor in values)])

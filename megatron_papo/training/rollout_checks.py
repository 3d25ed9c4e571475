"""What the first sweep over the rollouts tells about them: were they sampled from the policy that is about to be
trained?

Two causes make SGLang's log-prob of a token differ from Megatron's. One is a fault: other weights, another picture,
other positions, kernels that round differently. The other is not: SGLang never samples vision tokens (logit_bias), so
its log-probs are over the allowed tokens, Megatron's over the whole vocabulary. `only_allowed_tokens` removes the
second, exactly, so that a limit can be tight.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_papo.data.chat import forbidden_tokens
from megatron_papo.distributed import collectives, process_groups
from megatron_papo.errors import UserError
from megatron_papo.objective.rollout_mismatch import (
    mismatch_metrics,
    mismatch_sums,
    sampling_bias_metrics,
    sampling_bias_sums,
)
from megatron_papo.training.rows import TrainingRollout

WORST_SHOWN = 5
CONTEXT_TOKENS = 6
PARITY_ROLLOUTS = 64
"""Rollouts of an iteration that the gate looks at: spread evenly over the batch, all ranks together."""


@contextmanager
def only_allowed_tokens(model: torch.nn.Module, forbidden: Sequence[int]) -> Iterator[None]:
    """Within it the model's logits of forbidden tokens are -inf: its log-probs are over the allowed tokens, as SGLang's
    are.

    model: Qwen2_5_VL or a wrapper of it, any layout. Only for sweeps without gradient.
    """
    while hasattr(model, "module"):
        model = model.module
    if not process_groups.is_last_stage() or not forbidden:
        yield
        return
    weight = model.language_model.output_weight()
    first = process_groups.tp_group().rank() * weight.shape[0]
    local = [token - first for token in forbidden if first <= token < first + weight.shape[0]]
    with _WithoutLogits(weight, torch.tensor(local, dtype=torch.long, device=weight.device)):
        yield


class _WithoutLogits(TorchFunctionMode):
    """Sets some outputs of the linear layer with this weight to -inf, wherever it is applied."""

    def __init__(self, weight: Tensor, outputs: Tensor):
        super().__init__()
        self.weight, self.outputs = weight, outputs

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear and args[1].data_ptr() == self.weight.data_ptr():
            return result.index_fill(-1, self.outputs, -torch.inf)
        return result


def parity_sample(rows: Sequence[TrainingRollout], count: int = PARITY_ROLLOUTS) -> list[TrainingRollout]:
    """This rank's share of `count` rollouts, evenly spread over rows; at least one where there are any."""
    mine = min(len(rows), max(1, count // process_groups.dp_group().size()))
    return [rows[i * len(rows) // mine] for i in range(mine)]


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

    def in_context(self, decode: Callable[[list[int]], str] | None = None) -> str:
        """One line. decode: token ids -> text; without it the ids are shown."""
        ids, at = self.row.rollout.response_token_ids, self.position
        before, token, after = ids[max(0, at - CONTEXT_TOKENS) : at], ids[at], ids[at + 1 : at + 1 + CONTEXT_TOKENS]
        if decode is None:
            shown = " ".join([*map(str, before), f">>{token}<<", *map(str, after)])
        else:
            shown = repr(f"{decode(before)}>>{decode([token])}<<{decode(after)}")
        where = f"{self.row.rollout.prompt_id} sample {self.row.rollout.sample} token {at}"
        return f"{where}: {self.size:.3g} (SGLang {self.by_server:.4f}, Megatron {self.by_megatron:.4f}) in {shown}"


def worst_tokens(
    rows: Sequence[TrainingRollout], log_probs: Sequence[Tensor], count: int = WORST_SHOWN
) -> list[TokenDifference]:
    """The largest differences first. log_probs: one [response_length] per row."""
    found = [
        TokenDifference(row, position, ours, theirs)
        for row, values in zip(rows, log_probs)
        for position, (ours, theirs) in enumerate(zip(values.tolist(), row.rollout.rollout_log_probs))
    ]
    return sorted(found, key=lambda one: -one.size)[:count]


def compare_with_server(
    rows: list[TrainingRollout],
    old_log_probs: list[Tensor],
    limit: float | None,
    decode: Callable[[list[int]], str] | None = None,
    prefix: str = "rollout",
) -> dict[str, float]:
    """How far SGLang's log-probs are from Megatron's: the first sign of a wrong picture, weight or position.

    -> objective.rollout_mismatch's metrics over the response tokens of all ranks' rows, with `prefix` for the first
    word of their names.

    old_log_probs: one [response_length] per row on the last stage, else []. Collective over all ranks. Raises
    UserError, listing the worst tokens in their context (as text where `decode` turns ids into it), where the mean
    difference exceeds limit.
    """
    ours = torch.cat([torch.zeros(0), *(values.cpu() for values in old_log_probs)])
    theirs = torch.tensor([value for row, _ in zip(rows, old_log_probs) for value in row.rollout.rollout_log_probs])
    differences = (ours - theirs).abs()
    sums = collectives.sum_from_last_stage(mismatch_sums(ours, theirs))
    metrics = mismatch_metrics(sums, collectives.max_over_ranks(differences.max().item() if len(differences) else 0.0))
    mean, maximum = metrics["rollout_log_prob_difference_mean"], metrics["rollout_log_prob_difference_max"]
    if limit is not None and not mean <= limit:  # nan fails too
        worst = "; ".join(one.in_context(decode) for one in worst_tokens(rows, old_log_probs))
        raise UserError(
            f"log-probs of the rollouts differ by {mean:.3g} nats on average, {maximum:.3g} at most (limit {limit}):"
            " the server did not run"
            " these weights or did not see these pictures (find out with: python -m tools.check_parity). Worst here:"
            f" {worst}"
        )
    return {name.replace("rollout", prefix, 1): value for name, value in metrics.items()}


def parity_gate(
    model: torch.nn.Module,
    sweep: Callable[[torch.nn.Module, list[TrainingRollout]], dict[str, list[Tensor]]],
    rows: Sequence[TrainingRollout],
    hf_files: Path,
    limit: float | None,
) -> dict[str, float]:
    """compare_with_server for a sample of the rollouts, over the tokens that the server may sample: 0 but for rounding
    if all is well.

    -> parity_log_prob_difference_mean, _max, ... sweep: computes log_probs of rows. hf_files: directory with
    config.json and tokenizer.json of the checkpoint. Collective over all ranks. Raises UserError as compare_with_server
    does.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(hf_files / "tokenizer.json"))
    sample = parity_sample(rows)
    with only_allowed_tokens(model, forbidden_tokens(hf_files, tokenizer.get_vocab(with_added_tokens=True))):
        log_probs = sweep(model, sample)["log_probs"]
    return compare_with_server(sample, log_probs, limit, tokenizer.decode, "parity")


def check_old_policy(rows: list[TrainingRollout], old: dict[str, list[Tensor]], top_p: float) -> dict[str, float]:
    """Return what the old policy's log-probs and entropies say about the server's log-probs and about the sampling.

    Collective over all ranks.
    """
    return compare_with_server(rows, old["log_probs"], limit=None) | measure_sampling_bias(old, top_p)


def measure_sampling_bias(old: dict[str, list[Tensor]], top_p: float) -> dict[str, float]:
    """sampling_bias of the rollouts of all ranks; said aloud where top_p makes one. old: compute_log_probs of the old
    policy.

    Collective over all ranks.
    """
    log_probs, entropy = (
        torch.cat([torch.zeros(0), *(values.cpu() for values in old[name])]) for name in ("log_probs", "entropy")
    )
    metrics = sampling_bias_metrics(collectives.sum_from_last_stage(sampling_bias_sums(log_probs, entropy)))
    if top_p < 1 and process_groups.is_main_rank():
        print(
            f"rollout.top_p {top_p}: the sampled tokens are {-metrics['sampling_bias']:.4f} +-"
            f" {metrics['sampling_bias_error']:.4f} nats less"
            " surprising on average than samples of the policy that is trained: a bias of the gradient; 1.0 has none",
            flush=True,
        )
    return metrics

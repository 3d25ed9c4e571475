"""How far SGLang's log-probs of the rollouts are from Megatron's: the first sign of a wrong picture, weight or position."""

import torch
from torch import Tensor

from megatron_papo.errors import UserError
from megatron_papo.training import collectives
from megatron_papo.training.batching import Row

WORST_SHOWN = 5


def compare_with_server(rows: list[Row], old_log_probs: list[Tensor], limit: float | None) -> dict[str, float]:
    """-> mean and maximum of |log-prob by SGLang - log-prob by Megatron| in nats over the response tokens of all ranks' rows.

    old_log_probs: one [response_length] per row on the last stage, else []. Collective over all ranks. Raises UserError, listing the
    worst tokens, where the mean exceeds limit.
    """
    found = [
        (abs(ours - theirs), row.rollout, position)
        for row, values in zip(rows, old_log_probs)
        for position, (ours, theirs) in enumerate(zip(values.tolist(), row.rollout.rollout_log_probs))
    ]
    sums = collectives.sum_from_last_stage({"sum": torch.tensor(sum(d for d, _, _ in found)), "tokens": torch.tensor(float(len(found)))})
    mean = sums["sum"] / max(sums["tokens"], 1)
    maximum = collectives.max_over_ranks(max((d for d, _, _ in found), default=0.0))
    if limit is not None and mean > limit:
        worst = sorted(found, key=lambda row: -row[0])[:WORST_SHOWN]
        shown = "; ".join(f"{r.prompt_id} sample {r.sample} token {p}: {d:.3g}" for d, r, p in worst)
        raise UserError(
            f"log-probs of the rollouts differ by {mean:.3g} nats on average, {maximum:.3g} at most (limit {limit}): the server did not run"
            f" these weights or did not see these pictures. Worst here: {shown}"
        )
    return {"rollout_log_prob_difference_mean": mean, "rollout_log_prob_difference_max": maximum}

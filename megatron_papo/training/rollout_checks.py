"""What the first sweep over the rollouts tells about them: were they sampled from the policy that is about to be trained?"""

import torch
from torch import Tensor

from megatron_papo.errors import UserError
from megatron_papo.objective.rollout_mismatch import mismatch_metrics, mismatch_sums, sampling_bias_metrics, sampling_bias_sums
from megatron_papo.training import collectives, parallel
from megatron_papo.training.batching import Row

WORST_SHOWN = 5


def compare_with_server(rows: list[Row], old_log_probs: list[Tensor], limit: float | None) -> dict[str, float]:
    """How far SGLang's log-probs are from Megatron's: the first sign of a wrong picture, weight or position.

    -> objective.rollout_mismatch's metrics over the response tokens of all ranks' rows.

    old_log_probs: one [response_length] per row on the last stage, else []. Collective over all ranks. Raises UserError, listing the
    worst tokens, where the mean difference exceeds limit.
    """
    ours = torch.cat([torch.zeros(0), *(values.cpu() for values in old_log_probs)])
    theirs = torch.tensor([value for row, _ in zip(rows, old_log_probs) for value in row.rollout.rollout_log_probs])
    differences = (ours - theirs).abs()
    sums = collectives.sum_from_last_stage(mismatch_sums(ours, theirs))
    metrics = mismatch_metrics(sums, collectives.max_over_ranks(differences.max().item() if len(differences) else 0.0))
    mean, maximum = metrics["rollout_log_prob_difference_mean"], metrics["rollout_log_prob_difference_max"]
    if limit is not None and mean > limit:
        tokens = [(row.rollout, position) for row, _ in zip(rows, old_log_probs) for position in range(row.response_length)]
        worst = differences.topk(min(WORST_SHOWN, len(differences))).indices.tolist()
        shown = "; ".join(f"{tokens[i][0].prompt_id} sample {tokens[i][0].sample} token {tokens[i][1]}: {differences[i]:.3g}" for i in worst)
        raise UserError(
            f"log-probs of the rollouts differ by {mean:.3g} nats on average, {maximum:.3g} at most (limit {limit}): the server did not run"
            f" these weights or did not see these pictures. Worst here: {shown}"
        )
    return metrics


def measure_sampling_bias(old: dict[str, list[Tensor]], top_p: float) -> dict[str, float]:
    """sampling_bias of the rollouts of all ranks; said aloud where top_p makes one. old: compute_log_probs of the old policy.

    Collective over all ranks.
    """
    log_probs, entropy = (torch.cat([torch.zeros(0), *(values.cpu() for values in old[name])]) for name in ("log_probs", "entropy"))
    metrics = sampling_bias_metrics(collectives.sum_from_last_stage(sampling_bias_sums(log_probs, entropy)))
    if top_p < 1 and parallel.is_main_rank():
        print(
            f"rollout.top_p {top_p}: the sampled tokens are {-metrics['sampling_bias']:.4f} +- {metrics['sampling_bias_error']:.4f} nats less"
            " surprising on average than samples of the policy that is trained: a bias of the gradient; 1.0 has none",
            flush=True,
        )
    return metrics

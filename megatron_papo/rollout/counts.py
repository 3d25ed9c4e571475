"""What stage 4 says of an iteration: counts for the manifest, and the same in words."""

from collections.abc import Sequence

from megatron_papo.rollout.dynamic_sampling import Batch
from megatron_papo.rollout.groups import Graded
from megatron_papo.sglang.client import Traffic

Counts = dict[str, float | int]


def summary(responses: Sequence[Graded]) -> Counts:
    """Return means and counts over responses, for manifests and metrics."""
    number = len(responses)
    return {
        "responses": number,
        "mean_reward": sum(response.rewards.overall for response in responses) / number,
        "accuracy": sum(response.rewards.accuracy for response in responses) / number,
        "format": sum(response.rewards.format for response in responses) / number,
        "cut_off_share": sum(response.sample.finish_reason == "length" for response in responses) / number,
        "mean_response_tokens": sum(response.sample.num_tokens for response in responses) / number,
        "timed_out": sum(response.rewards.timed_out for response in responses),
    }


def batch_counts(batch: Batch, prompts_drawn: int, traffic: Traffic, seconds: float) -> Counts:
    """Return the counts of an iteration: of groups, of responses (_sampled: all, _kept: in the file), of requests.

    Args:
        batch: the groups of the iteration.
        prompts_drawn: from the data order; those that are not in batch.sampled were cancelled.
        traffic: what became of the requests.
        seconds: that sampling and grading took.
    """
    counts: Counts = {
        "prompts": len(batch.kept),
        "rounds": batch.rounds,
        "prompts_used": prompts_drawn,
        "prompts_cancelled": prompts_drawn - len(batch.sampled),
        "groups_all_right": batch.all_right,
        "groups_all_wrong": batch.all_wrong,
        "groups_surplus": batch.surplus,
    }
    for suffix, groups in (("sampled", batch.sampled), ("kept", batch.kept)):
        part = summary([response for group in groups for response in group.graded])
        counts |= {f"{name}_{suffix}": value for name, value in part.items()}
    tokens = sum(response.sample.num_tokens for group in batch.sampled for response in group.graded)
    counts |= {
        "response_tokens_sampled": tokens,
        "tokens_per_second": round((tokens - traffic.stored_tokens) / seconds, 1),
    }
    return counts | {f"requests_{name}": value for name, value in vars(traffic).items()}


def in_words(counts: Counts) -> str:
    """Return the line that stage 4 prints of batch_counts."""
    return (
        f"{counts['prompts']} groups kept of {counts['prompts_used']} prompts used in {counts['rounds']} round(s):"
        f" {counts['groups_all_right']} all right, {counts['groups_all_wrong']} all wrong,"
        f" {counts['groups_surplus']} surplus;"
        f" accuracy {counts['accuracy_sampled']:.3f} of all sampled, {counts['accuracy_kept']:.3f} of the kept;"
        f" format {counts['format_sampled']:.3f} of all sampled, {counts['format_kept']:.3f} of the kept;"
        f" cut off {counts['cut_off_share_sampled']:.3f}, {counts['tokens_per_second']:.0f} tokens/s{_troubles(counts)}"
    )


def _troubles(counts: Counts) -> str:
    cancelled = counts["requests_cancelled_running"] + counts["requests_cancelled_waiting"]
    words = ""
    if counts["requests_stored"]:
        words += f"; {counts['requests_stored']} samples of an attempt before"
    if cancelled:
        words += f"; {counts['prompts_cancelled']} prompts not finished, {cancelled} requests cancelled"
    if counts["requests_servers_lost"]:
        words += f"; {counts['requests_servers_lost']} server(s) lost, {counts['requests_resent']} requests sent again"
    return words

"""The groups of an iteration: requests for the prompts that were drawn, graded responses, the records of stage 4."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_papo.config import RewardConfig
from megatron_papo.rollout.pictures import Pictures
from megatron_papo.rollout.rewards import with_overlong_penalty
from megatron_papo.run.records import Prompt, Rewards, Rollout
from megatron_papo.seeds import derive_seed
from megatron_papo.sglang.answers import Sample
from megatron_papo.sglang.requests import Request, Sampling


@dataclass(frozen=True)
class Graded:
    """A response with its text and its rewards."""

    sample: Sample
    text: str
    """Decoded without special tokens: what was graded."""
    rewards: Rewards


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, as drawn in one epoch."""

    epoch: int
    requests: Sequence[Request]
    graded: Sequence[Graded]

    @property
    def accuracy(self) -> float:
        """Mean over the responses, 0 to 1; neither format nor length counts."""
        return sum(response.rewards.accuracy for response in self.graded) / len(self.graded)


def requests_of_round(
    drawn: Sequence[tuple[int, Prompt]], pictures: Pictures, *, iteration: int, seed: int, group_size: int
) -> list[Request]:
    """Return group_size requests for each prompt of a round, prompt by prompt.

    Args:
        drawn: epoch and prompt of each draw.
        pictures: gives a prompt's pictures.
        iteration: number of the iteration, from 1.
        seed: of the run. A response's seed follows from it and from iteration, epoch, prompt and sample.
        group_size: responses per prompt.
    """
    return [
        Request(
            prompt,
            derive_seed(seed, "sampling", iteration, epoch, prompt.id, sample),
            pictures.of(prompt),
            group=place,
            sample=sample,
        )
        for place, (epoch, prompt) in enumerate(drawn)
        for sample in range(group_size)
    ]


def complete_groups(
    drawn: Sequence[tuple[int, Prompt]], requests: Sequence[Request], graded: Sequence[Graded | None], group_size: int
) -> list[Group]:
    """Return the groups of a round, in the order drawn; one with a response that was cancelled (None) is left out."""
    groups = []
    for place, (epoch, _) in enumerate(drawn):
        members = slice(place * group_size, (place + 1) * group_size)
        finished = [response for response in graded[members] if response is not None]
        if len(finished) == group_size:
            groups.append(Group(epoch, requests[members], finished))
    return groups


def punish_overlong(group: Group, max_response_tokens: int, reward: RewardConfig) -> Group:
    """Return the group with the soft overlong punishment in its rewards, where `reward` asks for it."""
    punished = [
        replace(
            response,
            rewards=with_overlong_penalty(response.rewards, response.sample.num_tokens, max_response_tokens, reward),
        )
        for response in group.graded
    ]
    return replace(group, graded=punished)


def rollout_records(
    groups: Sequence[Group], sampling: Sampling, *, seed: int, iteration: int, staleness: int
) -> Iterator[Rollout]:
    """Yield the record of each response, group by group; the groups are numbered from 0.

    Args:
        groups: those to be trained on, in the order drawn.
        sampling: how the responses were sampled.
        seed: of the run. A masked image's seed follows from it and from prompt and epoch.
        iteration: number of the iteration, from 1.
        staleness: how many iterations older the sampling weights are than those that are trained first.
    """
    for number, group in enumerate(groups):
        for request, response in zip(group.requests, group.graded, strict=True):
            prompt = request.prompt
            yield Rollout(
                prompt_id=prompt.id,
                iteration=iteration,
                epoch=group.epoch,
                group=number,
                sample=request.sample,
                answer=prompt.answer,
                prompt_token_ids=prompt.token_ids,
                prompt_num_tokens=prompt.num_tokens,
                images=prompt.images,
                saliency=prompt.saliency,
                response_token_ids=response.sample.token_ids,
                rollout_log_probs=response.sample.log_probs,
                text=response.text,
                finish_reason=response.sample.finish_reason,
                rewards=response.rewards,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                sampling_seed=request.seed,
                masked_image_seed=derive_seed(seed, "masked_image", prompt.id, group.epoch),
                weight_version=response.sample.weight_version,
                staleness=staleness,
            )

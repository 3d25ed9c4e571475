"""Rollouts of given lengths and nothing else: what a plan computes with in place of an iteration's own."""

from dataclasses import dataclass

from megatron_papo.config import Config
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.run.records import Rewards, Rollout
from megatron_papo.training import accounting
from megatron_papo.training.collator import kinds_of
from megatron_papo.training.rows import Grid, TrainingRollout

CELL = 28
"""Pixels along each side of an image token."""


@dataclass(frozen=True)
class Lengths:
    """Of every rollout."""

    prompt_tokens: int
    """Image tokens included."""
    response_tokens: int
    picture: Grid
    """(1, rows, columns) of the patches of a picture; (1, 0, 0): none."""
    pictures: int = 1
    """Of each prompt, all of one size."""

    @property
    def image_tokens(self) -> int:
        """Of a prompt."""
        return self.pictures * (self.picture[1] * self.picture[2] // 4)

    @property
    def pixels(self) -> str:
        return f"{self.picture[2] * CELL // 2} x {self.picture[1] * CELL // 2}"


def longest(config: Config) -> Lengths:
    """Return the longest rollout that a configuration admits, with as much of pictures as its prompt can hold."""
    return filled(config, config.data.max_prompt_tokens, config.rollout.max_response_tokens)


def filled(config: Config, prompt_tokens: int, response_tokens: int) -> Lengths:
    """Return rollouts whose prompts are pictures but for a few tokens, of a size that the configuration admits."""
    largest, smallest = config.data.max_pixels // CELL**2, -(-config.data.min_pixels // CELL**2)
    room = prompt_tokens - 1
    count = -(-room // largest) if largest else 0
    while count and room // count < smallest:
        count -= 1
    if count == 0:
        return Lengths(prompt_tokens, response_tokens, (1, 0, 0))
    return Lengths(prompt_tokens, response_tokens, picture_of(min(largest, room // count)), count)


def copies_in_update(config: Config) -> int:
    """Return how many rows of each rollout a micro-batch of an update has: its own, and those of its other views."""
    return len(kinds_of(accounting.update(config.objective, config.training).pictures))


def fullest(config: Config, copies: int) -> list[Lengths]:
    """Return rollouts whose micro-batches hold most: no others that a configuration admits make fuller ones.

    In the plain layout a micro-batch is so many rollouts, and the longest are the worst. In the group layout it is so
    many tokens; what they are decides what is held beside the decoder's share: nearly all of them responses (logits),
    or nearly all pictures, of many groups with short responses (vision tower). Between those two all grows evenly.

    Args:
        config: limits of prompts, responses and pictures, and the layout.
        copies: rows of each rollout in a micro-batch, as copies_in_update.
    """
    worst, size = longest(config), config.rollout.group_size
    if config.training.layout == "plain" or config.training.max_tokens_per_micro_batch is None:
        return [worst]
    room = config.training.max_tokens_per_micro_batch // copies
    if room <= worst.prompt_tokens + worst.response_tokens:  # such a rollout is a micro-batch of its own
        return [worst]
    of_group = room // -(-room // (1 + size * worst.response_tokens))
    response = min(worst.response_tokens, max(1, (of_group - 1) // size))
    prompt = min(worst.prompt_tokens, max(1, of_group - size * response))
    in_group = room // -(-room // (worst.prompt_tokens + size))
    return [
        Lengths(prompt, response, (1, 0, 0)),
        filled(config, max(1, min(worst.prompt_tokens, in_group - size)), 1),
    ]


def usual(config: Config, prompt_tokens: int, response_tokens: int, picture_tokens: int) -> Lengths:
    """Return rollouts of these lengths with one picture, or of what the configuration admits where that is less."""
    prompt = min(prompt_tokens, config.data.max_prompt_tokens)
    picture = picture_of(min(picture_tokens, config.data.max_pixels // CELL**2, max(0, prompt - 1)))
    return Lengths(prompt, min(response_tokens, config.rollout.max_response_tokens), picture)


def picture_of(tokens: int) -> Grid:
    """Return the patches of the picture of at most so many image tokens: the most, of the sizes not longer than twice
    their width."""
    if tokens < 1:
        return 1, 0, 0
    sizes = [(rows, min(tokens // rows, 2 * rows)) for rows in range(1, int(tokens**0.5) + 1)]
    rows, columns = max(sizes, key=lambda size: (size[0] * size[1], size[0]))
    return 1, 2 * rows, 2 * columns


def rows_of(hf: HFConfig, config: Config, lengths: Lengths, groups: range) -> list[TrainingRollout]:
    """Return groups of rollouts with these numbers, one after the other, each group with pictures of its own.

    Raises UserError where the picture does not fit into the prompt.
    """
    text = lengths.prompt_tokens - lengths.image_tokens
    if text < 1:
        raise UserError(
            f"a prompt of {lengths.prompt_tokens} tokens cannot hold pictures of {lengths.image_tokens}: give a"
            " smaller picture or a longer prompt"
        )
    token = 0 if hf.image_token_id else 1
    prompt = [hf.image_token_id] * lengths.image_tokens + [token] * text
    response, log_probs = [token] * lengths.response_tokens, [-1.0] * lengths.response_tokens
    grids = [lengths.picture] * lengths.pictures if lengths.image_tokens else []
    rewards = Rewards(overall=1.0, accuracy=1.0, format=1.0)
    rows = []
    for group in groups:
        for sample in range(config.rollout.group_size):
            rollout = Rollout.model_construct(
                prompt_id=str(group),
                iteration=1,
                epoch=0,
                group=group,
                sample=sample,
                answer="",
                prompt_token_ids=prompt,
                prompt_num_tokens=len(prompt),
                images=[f"{group}_{number}.png" for number in range(len(grids))],
                saliency=[],
                response_token_ids=response,
                rollout_log_probs=log_probs,
                text="",
                finish_reason="stop",
                rewards=rewards,
                temperature=1.0,
                top_p=1.0,
                sampling_seed=0,
                masked_image_seed=group,
                weight_version="",
                staleness=0,
            )
            rows.append(TrainingRollout(rollout, prompt, grids, 1.0))
    return rows

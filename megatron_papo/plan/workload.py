"""Rollouts that are nothing but long: what a plan computes with in place of an iteration's own."""

from dataclasses import dataclass

from megatron_papo.config import Config
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.run.records import Rewards, Rollout
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
    """(1, rows, columns) of the patches of a prompt's one picture; (1, 0, 0): none."""

    @property
    def image_tokens(self) -> int:
        return self.picture[1] * self.picture[2] // 4

    @property
    def pixels(self) -> str:
        return f"{self.picture[2] * CELL // 2} x {self.picture[1] * CELL // 2}"


def longest(config: Config) -> Lengths:
    """Return the longest rollout that a configuration admits."""
    tokens, largest = config.data.max_prompt_tokens, config.data.max_pixels // CELL**2
    return Lengths(tokens, config.rollout.max_response_tokens, picture_of(min(largest, max(0, tokens - 1))))


def usual(config: Config, prompt_tokens: int, response_tokens: int, picture_tokens: int) -> Lengths:
    """Return rollouts of these lengths, or of what the configuration admits where that is less."""
    most = longest(config)
    prompt = min(prompt_tokens, most.prompt_tokens)
    picture = picture_of(min(picture_tokens, most.image_tokens, max(0, prompt - 1)))
    return Lengths(prompt, min(response_tokens, most.response_tokens), picture)


def picture_of(tokens: int) -> Grid:
    """Return the patches of the picture of at most so many image tokens: the most, of the sizes not longer than twice
    their width."""
    if tokens < 1:
        return 1, 0, 0
    sizes = [(rows, min(tokens // rows, 2 * rows)) for rows in range(1, int(tokens**0.5) + 1)]
    rows, columns = max(sizes, key=lambda size: (size[0] * size[1], size[0]))
    return 1, 2 * rows, 2 * columns


def rows_of(hf: HFConfig, config: Config, lengths: Lengths, groups: int) -> list[TrainingRollout]:
    """Return so many groups of rollouts, one after the other, each group with a picture of its own.

    Raises UserError where the picture does not fit into the prompt.
    """
    text = lengths.prompt_tokens - lengths.image_tokens
    if text < 1:
        raise UserError(
            f"a prompt of {lengths.prompt_tokens} tokens cannot hold a picture of {lengths.image_tokens}: give a"
            " smaller picture or a longer prompt"
        )
    token = 0 if hf.image_token_id else 1
    prompt = [hf.image_token_id] * lengths.image_tokens + [token] * text
    response, log_probs = [token] * lengths.response_tokens, [-1.0] * lengths.response_tokens
    grids = [lengths.picture] if lengths.image_tokens else []
    rewards = Rewards(overall=1.0, accuracy=1.0, format=1.0)
    rows = []
    for group in range(groups):
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
                images=[f"{group}.png"] if grids else [],
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

"""Rollout records, checked against their pictures, with their advantages: what a training step is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_papo.config import Config
from megatron_papo.data.chat import expand_image_pads
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.objective.advantages import advantages_of
from megatron_papo.pictures import preprocess
from megatron_papo.run.records import Rollout, groups_of

Grid = tuple[int, int, int]
"""(1, rows, columns) of a picture's patches."""


@dataclass(frozen=True)
class TrainingRollout:
    """One rollout, ready for training."""

    rollout: Rollout
    prompt_token_ids: list[int]
    """The prompt with every image-pad token repeated for its image's tokens."""
    grids: list[Grid]
    """One for each picture of the prompt."""
    advantage: float
    counts: bool = True
    """False: it was cut off and objective.overlong_filtering leaves it out of the loss and of every denominator."""

    @property
    def response_length(self) -> int:
        return len(self.rollout.response_token_ids)

    @property
    def is_correct(self) -> bool:
        return self.rollout.rewards.accuracy == 1.0


def make_rows(
    rollouts: Sequence[Rollout], advantages: Sequence[float], data_root: Path, config: Config, hf: HFConfig, file: Path
) -> list[TrainingRollout]:
    """Check every rollout against its pictures and give it its advantage.

    Args:
        rollouts: the records, in the order of the file.
        advantages: one per rollout.
        data_root: the directory that the pictures' paths start from.
        config: pixel limits, the masked image, overlong filtering.
        hf: the model, for its image tokens.
        file: what error messages call the file.

    Raises UserError naming the record.
    """
    rows: list[TrainingRollout] = []
    prompts: dict[str, tuple[list[int], list[Grid]]] = {}
    for number, (rollout, advantage) in enumerate(zip(rollouts, advantages, strict=True), 1):
        place = f"{file}:{number}"
        if rollout.prompt_id not in prompts:
            prompts[rollout.prompt_id] = _expanded_prompt(rollout, data_root, config, hf, place)
        prompt, grids = prompts[rollout.prompt_id]
        _check(rollout, prompt, hf, place)
        counts = not (config.objective.overlong_filtering and rollout.finish_reason == "length")
        rows.append(TrainingRollout(rollout, prompt, grids, advantage, counts))
    return rows


def _expanded_prompt(
    rollout: Rollout, data_root: Path, config: Config, hf: HFConfig, place: str
) -> tuple[list[int], list[Grid]]:
    """Return the prompt's token ids with the image tokens that its pictures make, and the pictures' grids."""
    settings = preprocess.PictureSettings.of(config.data)
    grids = [preprocess.grid_of_file(data_root, name, settings) for name in rollout.images]
    if rollout.prompt_token_ids.count(hf.image_token_id) != len(grids):
        raise UserError(f"{place}: {len(grids)} images but another number of image tokens: make the file again")
    if config.objective.uses_masked_image:
        preprocess.require_saliency(config.masked_image, rollout.images, rollout.saliency)
    if config.kept_image is not None:
        preprocess.require_saliency(config.kept_image, rollout.images, rollout.saliency)
    return expand_image_pads(rollout.prompt_token_ids, hf.image_token_id, grids), grids


def _check(rollout: Rollout, prompt: list[int], hf: HFConfig, place: str) -> None:
    if len(prompt) != rollout.prompt_num_tokens:
        raise UserError(
            f"{place}: the server counted {rollout.prompt_num_tokens} prompt tokens, here they are {len(prompt)}: make"
            " the file again"
        )
    if len(rollout.rollout_log_probs) != len(rollout.response_token_ids):
        raise UserError(
            f"{place}: {len(rollout.response_token_ids)} response tokens but {len(rollout.rollout_log_probs)} log-probs"
        )
    beyond = [token for token in rollout.response_token_ids if not 0 <= token < hf.text.vocab_size]
    if beyond:
        raise UserError(
            f"{place}: the response holds token {beyond[0]}, where the vocabulary has {hf.text.vocab_size}: make the"
            " file again"
        )
    if hf.image_token_id in rollout.response_token_ids or hf.video_token_id in rollout.response_token_ids:
        raise UserError(
            f"{place}: the response holds an image or video token, which no model input can match: make the file again"
        )


def rollout_advantages(rollouts: list[Rollout], group_size: int, estimator: str, file: Path) -> list[float]:
    """Return one advantage per rollout, from the overall rewards.

    Args:
        rollouts: whole groups, one after the other.
        group_size: rollouts per group.
        estimator: objective.advantage.
        file: what error messages call the file.

    Raises UserError for an empty or incomplete group.
    """
    groups = list(groups_of(rollouts, group_size, file))
    rewards = torch.tensor([[rollout.rewards.overall for rollout in group] for group in groups])
    lengths = torch.tensor([[len(rollout.response_token_ids) for rollout in group] for group in groups])
    return advantages_of(estimator, rewards, lengths).flatten().tolist()

"""Rollouts as a kind of pictures shows them, where that changes more than pixels: no picture at all, or another one for
each response. Then they are other rows: of other prompts."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_papo.config import Config
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.pictures.masking import seed_of_response
from megatron_papo.training.rows import TrainingRollout

SAMPLES = 1 << 20
"""More than a group has."""


def rows_as_seen(rows: Sequence[TrainingRollout], kind: str, config: Config, hf: HFConfig) -> list[TrainingRollout]:
    """Return the rollouts with the prompts and seeds that they have with these pictures.

    Args:
        rows: the rollouts, with the prompts of the original pictures.
        kind: original, masked, kept.
        config: its section masked_image. Those that ride in an update (kept among them) share the original's prompt.
        hf: the model, for the tokens around a picture.
    """
    masking = config.masked_image
    if kind != "masked" or config.objective.masked_rows_ride:
        return [*rows]
    if masking.strategy == "none":
        return [_without_pictures(row, hf) for row in rows]
    if masking.per == "response":
        return [_with_own_pictures(row) for row in rows]
    return [*rows]


def _without_pictures(row: TrainingRollout, hf: HFConfig) -> TrainingRollout:
    """A picture's tokens and the two around it are taken out, as a prompt without pictures has none."""
    left_out = (hf.image_token_id, hf.vision_start_token_id, hf.vision_end_token_id)
    prompt = [token for token in row.prompt_token_ids if token not in left_out]
    rollout = row.rollout.model_copy(update={"images": [], "saliency": []})
    return replace(row, rollout=rollout, prompt_token_ids=prompt, grids=[])


def _with_own_pictures(row: TrainingRollout) -> TrainingRollout:
    """Its prompt shows other pictures than those of its group: it shares it with nobody."""
    rollout = row.rollout
    own = {
        "group": rollout.group * SAMPLES + rollout.sample,
        "masked_image_seed": seed_of_response(rollout.masked_image_seed, rollout.sample),
    }
    return replace(row, rollout=rollout.model_copy(update=own))

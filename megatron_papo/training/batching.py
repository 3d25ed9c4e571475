"""Rollout records as padded micro-batches: one row per rollout, prompt (images expanded) + response, padded on the right."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_papo import images
from megatron_papo.config import Config
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.model.position_ids import mrope_position_ids
from megatron_papo.objective.advantages import advantages_of
from megatron_papo.records import Rollout, groups_of


@dataclass(frozen=True)
class Row:
    """One rollout, ready for training."""

    rollout: Rollout
    prompt_token_ids: list[int]
    """Every image-pad token repeated for its image's tokens."""
    grids: list[tuple[int, int, int]]
    advantage: float
    counts: bool = True
    """False: it was cut off and objective.overlong_filtering leaves it out of the loss and of every denominator."""

    @property
    def response_length(self) -> int:
        return len(self.rollout.response_token_ids)

    @property
    def is_correct(self) -> bool:
        return self.rollout.rewards.accuracy == 1.0


@dataclass
class MicroBatch:
    """b rows padded to s tokens; T is the longest response, N the number of response tokens."""

    rows: Sequence[Row]
    input_ids: Tensor
    """[b, s]"""
    position_ids: Tensor
    """[3, b, s]"""
    pixel_values: Tensor | None
    """[patches, 1176]; None where there are no images and on later pipeline stages."""
    image_grids: list[tuple[int, int, int]]
    response_positions: Tensor
    """[N]: index into the flattened [b * s] of the position whose logits predict each response token."""
    response_tokens: Tensor
    """[N]"""
    response_mask: Tensor
    """[b, T], 1.0 on response tokens."""
    has_twins: bool = False
    """The b rows are followed by the same b rows with masked images: input_ids is [2b, s], response_positions and response_tokens [2N]."""
    cached: dict[str, Tensor] = field(default_factory=dict)
    """Per-token tensors [b, T] for the loss, by papo_loss's names: old_log_probs, ref_log_probs, ..."""


def expand_image_pads(token_ids: Sequence[int], image_token_id: int, grids: Sequence[tuple[int, int, int]]) -> list[int]:
    """One image-pad token per image becomes as many as the image has tokens."""
    expanded, remaining = [], iter(grids)
    for token in token_ids:
        expanded += [token] * images.num_image_tokens(next(remaining)) if token == image_token_id else [token]
    return expanded


def make_rows(rollouts: list[Rollout], advantages: list[float], data_root: Path, config: Config, hf: HFConfig, where: Path) -> list[Row]:
    """Checks every rollout against its images and gives it its advantage. Raises UserError naming the record."""
    rows, expanded, grids_of = [], {}, {}
    for number, (rollout, advantage) in enumerate(zip(rollouts, advantages, strict=True), 1):
        if rollout.prompt_id not in expanded:
            grids = [images.grid_of_file(data_root, name, config.data.min_pixels, config.data.max_pixels) for name in rollout.images]
            if rollout.prompt_token_ids.count(hf.image_token_id) != len(grids):
                raise UserError(f"{where}:{number}: {len(grids)} images but another number of image tokens: make the file again")
            if config.objective.uses_masked_image:
                images.require_saliency(config.masked_image, rollout.images, rollout.saliency)
            grids_of[rollout.prompt_id] = grids
            expanded[rollout.prompt_id] = expand_image_pads(rollout.prompt_token_ids, hf.image_token_id, grids)
        prompt, grids = expanded[rollout.prompt_id], grids_of[rollout.prompt_id]
        _check(rollout, prompt, hf, f"{where}:{number}")
        counts = not (config.objective.overlong_filtering and rollout.finish_reason == "length")
        rows.append(Row(rollout, prompt, grids, advantage, counts))
    return rows


def _check(rollout: Rollout, prompt: list[int], hf: HFConfig, where: str) -> None:
    if len(prompt) != rollout.prompt_num_tokens:
        raise UserError(f"{where}: the server counted {rollout.prompt_num_tokens} prompt tokens, here they are {len(prompt)}: make the file again")
    if len(rollout.rollout_log_probs) != len(rollout.response_token_ids):
        raise UserError(f"{where}: {len(rollout.response_token_ids)} response tokens but {len(rollout.rollout_log_probs)} log-probs")
    if hf.image_token_id in rollout.response_token_ids or hf.video_token_id in rollout.response_token_ids:
        raise UserError(f"{where}: the response holds an image or video token, which no model input can match: make the file again")


def rollout_advantages(rollouts: list[Rollout], group_size: int, estimator: str, where: Path) -> list[float]:
    """One per rollout, from the overall rewards. Raises UserError for an empty or incomplete group."""
    groups = list(groups_of(rollouts, group_size, where))
    rewards = torch.tensor([[rollout.rewards.overall for rollout in group] for group in groups])
    lengths = torch.tensor([[len(rollout.response_token_ids) for rollout in group] for group in groups])
    return advantages_of(estimator, rewards, lengths).flatten().tolist()


Pictures = Literal["original", "masked", "both"]


class Collator:
    """Makes micro-batches of rows on this rank: pixels only where the vision tower lives, each distinct picture read once."""

    def __init__(self, config: Config, hf: HFConfig, data_root: Path, *, with_pixels: bool, device: torch.device, dtype: torch.dtype):
        self.config, self.hf, self.data_root = config, hf, data_root
        self.with_pixels, self.device, self.dtype = with_pixels, device, dtype
        parallel = config.parallel
        self.length_multiple = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1

    def batches(self, rows: Sequence[Row], micro_batch_size: int, pictures: Pictures = "original") -> Iterator[MicroBatch]:
        """The rows in order, micro_batch_size at a time."""
        for start in range(0, len(rows), micro_batch_size):
            yield self.collate(rows[start : start + micro_batch_size], pictures)

    def collate(self, rows: Sequence[Row], pictures: Pictures = "original") -> MicroBatch:
        """masked: with the masked images of each rollout's seed. both: the original rows, then their masked twins."""
        tokens = [row.prompt_token_ids + row.rollout.response_token_ids for row in rows]
        longest = max(len(t) for t in tokens)
        length = -(-longest // self.length_multiple) * self.length_multiple
        input_ids = torch.zeros(len(rows), length, dtype=torch.long)
        position_ids = torch.zeros(3, len(rows), length, dtype=torch.long)
        response_mask = torch.zeros(len(rows), max(1, *(row.response_length for row in rows)))
        positions = []
        copies = 2 if pictures == "both" else 1
        for i, (row, ids) in enumerate(zip(rows, tokens)):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            position_ids[:, i, : len(ids)] = mrope_position_ids(ids, row.grids, self.hf.image_token_id)
            response_mask[i, : row.response_length] = 1.0
            first = i * length + len(row.prompt_token_ids) - 1
            positions.append(torch.arange(first, first + row.response_length))
        response_positions = torch.cat(positions)
        twins = torch.cat([response_positions + copy * input_ids.numel() for copy in range(copies)])
        response_tokens = torch.tensor([t for row in rows for t in row.rollout.response_token_ids], dtype=torch.long)
        return MicroBatch(
            rows,
            input_ids.repeat(copies, 1).to(self.device),
            position_ids.repeat(1, copies, 1).to(self.device),
            self._pixel_values(rows, pictures),
            [grid for row in rows for grid in row.grids] * copies,
            twins.to(self.device),
            response_tokens.repeat(copies).to(self.device),
            response_mask.to(self.device),
            has_twins=copies == 2,
        )

    def _pixel_values(self, rows: Sequence[Row], pictures: Pictures) -> Tensor | None:
        if not self.with_pixels or not any(row.grids for row in rows):
            return None
        kinds = ("original", "masked") if pictures == "both" else (pictures,)
        return torch.cat([p for kind in kinds for p in self._patches(rows, masked=kind == "masked")]).to(self.device, self.dtype)

    def _patches(self, rows: Sequence[Row], masked: bool) -> list[Tensor]:
        """Of every picture of every row in order; each distinct picture is read once."""
        data, patches = self.config.data, {}
        for row in rows:
            if _pictures_key(row) not in patches:
                rollout = row.rollout
                masking = dict(masking=self.config.masked_image, seed=rollout.masked_image_seed, saliency=rollout.saliency) if masked else {}
                pictures = images.load_images(self.data_root, rollout.images, data.min_pixels, data.max_pixels, **masking)
                patches[_pictures_key(row)] = [torch.from_numpy(images.to_patches(picture)) for picture in pictures]
        return [patch for row in rows for patch in patches[_pictures_key(row)]]


def _pictures_key(row: Row) -> tuple[str, int]:
    return row.rollout.prompt_id, row.rollout.masked_image_seed


def pad_responses(values: Sequence[Tensor], response_mask: Tensor) -> Tensor:
    """One [response_length] tensor per row -> [b, T], zeros on padding."""
    return response_mask.new_zeros(response_mask.shape).masked_scatter(response_mask.bool(), torch.cat(list(values)))

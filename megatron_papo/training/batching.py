"""Rollout records as padded micro-batches: one row per rollout, prompt (images expanded) + response, padded on the right."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_papo import images
from megatron_papo.config import Config
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.model.position_ids import mrope_position_ids
from megatron_papo.records import Rollout, groups_of


@dataclass(frozen=True)
class Row:
    """One rollout, ready for training."""

    rollout: Rollout
    prompt_token_ids: list[int]
    """Every image-pad token repeated for its image's tokens."""
    grids: list[tuple[int, int, int]]
    advantage: float

    @property
    def response_length(self) -> int:
        return len(self.rollout.response_token_ids)


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
    log_probs: dict[str, Tensor] = field(default_factory=dict)
    """Cached per-token tensors [b, T] for the loss: old_log_probs, ref_log_probs, masked_image_log_probs."""


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
            grids_of[rollout.prompt_id] = grids
            expanded[rollout.prompt_id] = expand_image_pads(rollout.prompt_token_ids, hf.image_token_id, grids)
        prompt, grids = expanded[rollout.prompt_id], grids_of[rollout.prompt_id]
        _check(rollout, prompt, hf, f"{where}:{number}")
        rows.append(Row(rollout, prompt, grids, advantage))
    return rows


def _check(rollout: Rollout, prompt: list[int], hf: HFConfig, where: str) -> None:
    if len(prompt) != rollout.prompt_num_tokens:
        raise UserError(f"{where}: the server counted {rollout.prompt_num_tokens} prompt tokens, here they are {len(prompt)}: make the file again")
    if len(rollout.rollout_log_probs) != len(rollout.response_token_ids):
        raise UserError(f"{where}: {len(rollout.response_token_ids)} response tokens but {len(rollout.rollout_log_probs)} log-probs")
    if hf.image_token_id in rollout.response_token_ids or hf.video_token_id in rollout.response_token_ids:
        raise UserError(f"{where}: the response holds an image or video token, which no model input can match: make the file again")


def group_rewards(rollouts: list[Rollout], group_size: int, where: Path) -> Tensor:
    """[groups, group_size] overall rewards. Raises UserError for an empty or incomplete group."""
    return torch.tensor([[rollout.rewards.overall for rollout in group] for group in groups_of(rollouts, group_size, where)])


class Collator:
    """Makes micro-batches of rows on this rank: pixels only where the vision tower lives, each distinct picture read once."""

    def __init__(self, config: Config, hf: HFConfig, data_root: Path, *, with_pixels: bool, device: torch.device, dtype: torch.dtype):
        self.config, self.hf, self.data_root = config, hf, data_root
        self.with_pixels, self.device, self.dtype = with_pixels, device, dtype
        parallel = config.parallel
        self.length_multiple = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1

    def batches(self, rows: Sequence[Row], micro_batch_size: int, *, masked: bool = False) -> Iterator[MicroBatch]:
        """The rows in order, micro_batch_size at a time. masked: with the masked image of each rollout's seed."""
        for start in range(0, len(rows), micro_batch_size):
            yield self.collate(rows[start : start + micro_batch_size], masked=masked)

    def collate(self, rows: Sequence[Row], *, masked: bool = False) -> MicroBatch:
        tokens = [row.prompt_token_ids + row.rollout.response_token_ids for row in rows]
        longest = max(len(t) for t in tokens)
        length = -(-longest // self.length_multiple) * self.length_multiple
        input_ids = torch.zeros(len(rows), length, dtype=torch.long)
        position_ids = torch.zeros(3, len(rows), length, dtype=torch.long)
        response_mask = torch.zeros(len(rows), max(1, *(row.response_length for row in rows)))
        positions = []
        for i, (row, ids) in enumerate(zip(rows, tokens)):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            position_ids[:, i, : len(ids)] = mrope_position_ids(ids, row.grids, self.hf.image_token_id)
            response_mask[i, : row.response_length] = 1.0
            first = i * length + len(row.prompt_token_ids) - 1
            positions.append(torch.arange(first, first + row.response_length))
        return MicroBatch(
            rows,
            input_ids.to(self.device),
            position_ids.to(self.device),
            self._pixel_values(rows, masked),
            [grid for row in rows for grid in row.grids],
            torch.cat(positions).to(self.device),
            torch.tensor([t for row in rows for t in row.rollout.response_token_ids], dtype=torch.long, device=self.device),
            response_mask.to(self.device),
        )

    def _pixel_values(self, rows: Sequence[Row], masked: bool) -> Tensor | None:
        if not self.with_pixels or not any(row.grids for row in rows):
            return None
        data, patches = self.config.data, {}
        for row in rows:
            if _pictures_key(row) not in patches:
                masking = dict(masking=self.config.masked_image, seed=row.rollout.masked_image_seed) if masked else {}
                pictures = images.load_images(self.data_root, row.rollout.images, data.min_pixels, data.max_pixels, **masking)
                patches[_pictures_key(row)] = [torch.from_numpy(images.to_patches(picture)) for picture in pictures]
        return torch.cat([p for row in rows for p in patches[_pictures_key(row)]]).to(self.device, self.dtype)


def _pictures_key(row: Row) -> tuple[str, int]:
    return row.rollout.prompt_id, row.rollout.masked_image_seed


def pad_responses(values: Sequence[Tensor], response_mask: Tensor) -> Tensor:
    """One [response_length] tensor per row -> [b, T], zeros on padding."""
    return response_mask.new_zeros(response_mask.shape).masked_scatter(response_mask.bool(), torch.cat(list(values)))

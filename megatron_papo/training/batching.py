"""Rollout records as micro-batches, in one of two layouts that give the same numbers.

plain: one row per rollout, prompt (images expanded) + response, padded on the right.
group: one row for all, in which each prompt stands once and its responses follow it (model/group_attention.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_papo.config import Config, TrainingConfig
from megatron_papo.data.chat import expand_image_pads
from megatron_papo.distributed.balance import balanced
from megatron_papo.errors import UserError
from megatron_papo.model.group_attention import GroupSegments
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.model.position_ids import mrope_position_ids
from megatron_papo.objective.advantages import advantages_of
from megatron_papo.pictures import preprocess
from megatron_papo.run.records import Rollout, groups_of


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
    """B rollouts in b rows of s tokens; T is the longest response, N the number of response tokens. b is B, or 1 in the
    group layout."""

    rows: Sequence[Row]
    """The B rollouts."""
    input_ids: Tensor
    """[b, s]"""
    position_ids: Tensor
    """[3, b, s]"""
    pixel_values: Tensor | None
    """[patches, 1176] of the distinct pictures; None where there are no images and on later pipeline stages."""
    image_grids: list[tuple[int, int, int]]
    """Of the distinct pictures."""
    pictures: list[int]
    """Which of them stands at each place for a picture, in reading order."""
    response_positions: Tensor
    """[N]: index into the flattened [b * s] of the position that predicts each response token."""
    response_tokens: Tensor
    """[N]"""
    response_mask: Tensor
    """[B, T], 1.0 on response tokens."""
    groups: GroupSegments | None = None
    """Of the group layout."""
    has_twins: bool = False
    """The b rows are followed by the same b rows with masked images: input_ids is [2b, s], response_positions and
    response_tokens [2N]."""
    cached: dict[str, Tensor] = field(default_factory=dict)
    """Per-token tensors [B, T] for the loss, by papo_loss's names: old_log_probs, ref_log_probs, ..."""


def make_rows(
    rollouts: list[Rollout], advantages: list[float], data_root: Path, config: Config, hf: HFConfig, where: Path
) -> list[Row]:
    """Checks every rollout against its images and gives it its advantage. Raises UserError naming the record."""
    rows, expanded, grids_of = [], {}, {}
    for number, (rollout, advantage) in enumerate(zip(rollouts, advantages, strict=True), 1):
        if rollout.prompt_id not in expanded:
            grids = [
                preprocess.grid_of_file(data_root, name, config.data.min_pixels, config.data.max_pixels)
                for name in rollout.images
            ]
            if rollout.prompt_token_ids.count(hf.image_token_id) != len(grids):
                raise UserError(
                    f"{where}:{number}: {len(grids)} images but another number of image tokens: make the file again"
                )
            if config.objective.uses_masked_image:
                preprocess.require_saliency(config.masked_image, rollout.images, rollout.saliency)
            grids_of[rollout.prompt_id] = grids
            expanded[rollout.prompt_id] = expand_image_pads(rollout.prompt_token_ids, hf.image_token_id, grids)
        prompt, grids = expanded[rollout.prompt_id], grids_of[rollout.prompt_id]
        _check(rollout, prompt, hf, f"{where}:{number}")
        counts = not (config.objective.overlong_filtering and rollout.finish_reason == "length")
        rows.append(Row(rollout, prompt, grids, advantage, counts))
    return rows


def _check(rollout: Rollout, prompt: list[int], hf: HFConfig, where: str) -> None:
    if len(prompt) != rollout.prompt_num_tokens:
        raise UserError(
            f"{where}: the server counted {rollout.prompt_num_tokens} prompt tokens, here they are {len(prompt)}: make"
            " the file again"
        )
    if len(rollout.rollout_log_probs) != len(rollout.response_token_ids):
        raise UserError(
            f"{where}: {len(rollout.response_token_ids)} response tokens but {len(rollout.rollout_log_probs)} log-probs"
        )
    if hf.image_token_id in rollout.response_token_ids or hf.video_token_id in rollout.response_token_ids:
        raise UserError(
            f"{where}: the response holds an image or video token, which no model input can match: make the file again"
        )


def rollout_advantages(rollouts: list[Rollout], group_size: int, estimator: str, where: Path) -> list[float]:
    """One per rollout, from the overall rewards. Raises UserError for an empty or incomplete group."""
    groups = list(groups_of(rollouts, group_size, where))
    rewards = torch.tensor([[rollout.rewards.overall for rollout in group] for group in groups])
    lengths = torch.tensor([[len(rollout.response_token_ids) for rollout in group] for group in groups])
    return advantages_of(estimator, rewards, lengths).flatten().tolist()


Pictures = Literal["original", "masked", "both"]


def plan_micro_batches(
    rows: Sequence[Row], training: TrainingConfig, micro_batch_size: int, copies: int = 1
) -> list[Sequence[Row]]:
    """The rows in order, cut into micro-batches. copies: 2 if each carries its masked-image twin.

    plain: micro_batch_size rollouts each. group: as many groups, or parts of one, as max_tokens_per_micro_batch holds;
    a single rollout that is longer is a micro-batch of its own.
    """
    if training.layout == "plain":
        return [rows[start : start + micro_batch_size] for start in range(0, len(rows), micro_batch_size)]
    plan, tokens = [], 0
    for row in rows:
        shares_prompt = plan and plan[-1][-1].rollout.group == row.rollout.group
        with_prompt = copies * (len(row.prompt_token_ids) + row.response_length)
        cost = copies * row.response_length if shares_prompt else with_prompt
        if not plan or tokens + cost > training.max_tokens_per_micro_batch:
            plan.append([])
            tokens, cost = 0, with_prompt
        plan[-1].append(row)
        tokens += cost
    return plan


def split_over_ranks(step: Sequence[Row], layout: str, ranks: int) -> list[list[Row]]:
    """Each data-parallel rank's rollouts of a step. plain: every ranks-th. group: whole groups, the longest first to
    the least loaded rank."""
    if layout == "plain":
        return [list(step[rank::ranks]) for rank in range(ranks)]
    groups = [list(rows) for _, rows in groupby(step, key=lambda row: row.rollout.group)]
    cost = [len(group[0].prompt_token_ids) + sum(row.response_length for row in group) for group in groups]
    return [[row for number in share for row in groups[number]] for share in balanced(cost, ranks)]


KEPT_PICTURE_BYTES = 2 << 30
"""Prepared pictures that a rank remembers, so that the sweeps and the steps of an iteration do not load and resize them
again."""


class Collator:
    """Makes micro-batches of rows on this rank: pixels only where the vision tower lives, each distinct picture
    once."""

    def __init__(
        self,
        config: Config,
        hf: HFConfig,
        data_root: Path,
        *,
        with_pixels: bool,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.config, self.hf, self.data_root = config, hf, data_root
        self.with_pixels, self.device, self.dtype = with_pixels, device, dtype
        parallel = config.parallel
        self.length_multiple = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        self._kept: dict[tuple, list[Tensor]] = {}
        self._kept_bytes = 0

    def plan(self, rows: Sequence[Row], micro_batch_size: int, pictures: Pictures = "original") -> list[Sequence[Row]]:
        return plan_micro_batches(rows, self.config.training, micro_batch_size, 2 if pictures == "both" else 1)

    def collate(self, rows: Sequence[Row], pictures: Pictures = "original") -> MicroBatch:
        """masked: with the masked images of each rollout's seed. both: the original rows, then their masked twins."""
        if self.config.training.layout == "group":
            groups = [list(group) for _, group in groupby(rows, key=lambda row: row.rollout.group)]
        else:
            groups = [[row] for row in rows]
        laid_out = [self._lay_out(group) for group in groups]
        segments = None
        if self.config.training.layout == "group":
            lengths = [(len(group[0].prompt_token_ids), [row.response_length for row in group]) for group in groups]
            segments = GroupSegments(qkv_format="sbhd", groups=lengths)
            starts = torch.tensor([0, *(len(ids) for ids, _, _ in laid_out)]).cumsum(0).tolist()
            predicting = [positions + start for (_, _, positions), start in zip(laid_out, starts)]
            laid_out = [
                (
                    torch.cat([ids for ids, _, _ in laid_out]),
                    torch.cat([where for _, where, _ in laid_out], dim=1),
                    torch.cat(predicting),
                )
            ]
        longest = max(len(ids) for ids, _, _ in laid_out)
        length = -(-longest // self.length_multiple) * self.length_multiple
        input_ids = torch.zeros(len(laid_out), length, dtype=torch.long)
        position_ids = torch.zeros(3, len(laid_out), length, dtype=torch.long)
        for i, (ids, where, _) in enumerate(laid_out):
            input_ids[i, : len(ids)] = ids
            position_ids[:, i, : len(ids)] = where
        response_positions = torch.cat([i * length + positions for i, (_, _, positions) in enumerate(laid_out)])
        response_tokens = torch.tensor([t for row in rows for t in row.rollout.response_token_ids], dtype=torch.long)
        response_mask = torch.zeros(len(rows), max(1, *(row.response_length for row in rows)))
        for i, row in enumerate(rows):
            response_mask[i, : row.response_length] = 1.0
        kinds = ("original", "masked") if pictures == "both" else (pictures,)
        pixel_values, image_grids, places = self._pictures([group[0] for group in groups], kinds)
        copies = len(kinds)
        return MicroBatch(
            rows,
            input_ids.repeat(copies, 1).to(self.device),
            position_ids.repeat(1, copies, 1).to(self.device),
            pixel_values,
            image_grids,
            places,
            torch.cat([response_positions + copy * input_ids.numel() for copy in range(copies)]).to(self.device),
            response_tokens.repeat(copies).to(self.device),
            response_mask.to(self.device),
            segments,
            has_twins=copies == 2,
        )

    def _lay_out(self, group: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """A prompt and its responses one after the other: token ids [n], rotary positions [3, n], what predicts each
        response token [N].

        Every response's positions go on from the prompt's, and its first token is predicted by the prompt's last.
        """
        prompt = group[0].prompt_token_ids
        longest = max(group, key=lambda row: row.response_length).rollout.response_token_ids
        where = mrope_position_ids(prompt + longest, group[0].grids, self.hf.image_token_id)
        lengths = [row.response_length for row in group]
        ids = torch.tensor(prompt + [token for row in group for token in row.rollout.response_token_ids])
        positions = torch.cat(
            [where[:, : len(prompt)], *(where[:, len(prompt) : len(prompt) + length] for length in lengths)], dim=1
        )
        predicting, start = [], len(prompt)
        for length in lengths:
            predicting += [len(prompt) - 1, *range(start, start + length - 1)] if length else []
            start += length
        return ids, positions, torch.tensor(predicting, dtype=torch.long)

    def _pictures(
        self, rows: Sequence[Row], kinds: Sequence[str]
    ) -> tuple[Tensor | None, list[tuple[int, int, int]], list[int]]:
        """Patches and grids of the distinct pictures that the rows show in each kind, and which of them stands at each
        place."""
        if not self.with_pixels or not any(row.grids for row in rows):
            return None, [], []
        distinct, patches, grids, places = {}, [], [], []
        for kind in kinds:
            for row in rows:
                key = self._key(row.rollout, kind)
                if key not in distinct:
                    distinct[key] = range(len(patches), len(patches) + len(row.rollout.images))
                    patches += self._patches(row.rollout, kind)
                    grids += row.grids
                places += distinct[key]
        return (torch.cat(patches).to(self.device) if patches else None), grids, places

    def _key(self, rollout: Rollout, kind: str) -> tuple:
        return (kind, *rollout.images, *([rollout.masked_image_seed] if kind == "masked" else []))

    def _patches(self, rollout: Rollout, kind: str) -> list[Tensor]:
        """[patches, 1176] of each of the rollout's pictures, on the host, in the model's dtype. Kept, while there is
        room."""
        key = self._key(rollout, kind)
        if key in self._kept:
            return self._kept[key]
        data = self.config.data
        masking = (
            dict(masking=self.config.masked_image, seed=rollout.masked_image_seed, saliency=rollout.saliency)
            if kind == "masked"
            else {}
        )
        pictures = preprocess.load_images(self.data_root, rollout.images, data.min_pixels, data.max_pixels, **masking)
        made = [torch.from_numpy(preprocess.to_patches(picture)).to(self.dtype) for picture in pictures]
        size = sum(each.nbytes for each in made)
        if self._kept_bytes + size <= KEPT_PICTURE_BYTES:
            self._kept[key], self._kept_bytes = made, self._kept_bytes + size
        return made


def pad_responses(values: Sequence[Tensor], response_mask: Tensor) -> Tensor:
    """One [response_length] tensor per row -> [b, T], zeros on padding."""
    return response_mask.new_zeros(response_mask.shape).masked_scatter(response_mask.bool(), torch.cat(list(values)))

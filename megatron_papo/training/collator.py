"""Rollouts as tensors: micro-batches with the pictures that the vision tower sees, in the configured layout."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_papo.config import Config, MaskedImageConfig
from megatron_papo.distributed import process_groups
from megatron_papo.distributed.transfer import to_device
from megatron_papo.model.group_attention import GroupSegments
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.model.position_ids import mrope_position_ids
from megatron_papo.objective.papo_loss import StepCounts
from megatron_papo.pictures import preprocess
from megatron_papo.pictures.masking import seed_of_kept
from megatron_papo.run.records import Rollout
from megatron_papo.training.encoded_pictures import EncodedPictures
from megatron_papo.training.layouts import InputRow, RotaryPositions, layout_of
from megatron_papo.training.prepared_pictures import Prepare, PreparedPictures, normalised, threads_for
from megatron_papo.training.rows import Grid, TrainingRollout
from megatron_papo.training.views import rows_as_seen

Kind = Literal["original", "masked", "kept"]
"""The pictures as they are, or corrupted by each rollout's seed: as section masked_image, or kept_image, says."""
KINDS: tuple[Kind, ...] = ("original", "masked", "kept")
Pictures = Literal["original", "masked", "kept", "both", "all"]
"""both: the original rows of a micro-batch, then their masked-image twins. all: and then those with kept images."""
KEPT_PICTURE_BYTES = 2 << 30
"""Prepared pictures that a rank remembers, so that the sweeps and the steps of an iteration do not load and resize them
again: about 900 of the published size, 2.1 MB each."""


@dataclass
class MicroBatch:
    """B rollouts in b rows of s tokens; T is the longest response, N the number of response tokens. b is B, or 1 in the
    group layout."""

    rows: Sequence[TrainingRollout]
    """The B rollouts."""
    input_ids: Tensor
    """[b, s]"""
    position_ids: Tensor
    """[3, b, s]"""
    pixel_values: Tensor | None
    """[patches, 1176] of the distinct pictures; None where there are no images and on later pipeline stages."""
    encoded_pictures: Tensor | None
    """In place of pixel_values where the vision tower is frozen: what it says about the distinct pictures."""
    image_grids: list[Grid]
    """One for each distinct picture."""
    pictures: list[int]
    """Which of the distinct pictures stands at each place for a picture, in reading order."""
    response_positions: Tensor
    """[N]: index into the flattened [b * s] of the position that predicts each response token."""
    response_tokens: Tensor
    """[N]"""
    response_mask: Tensor
    """[B, T], 1.0 on response tokens."""
    num_image_tokens: int
    """In input_ids."""
    groups: GroupSegments | None = None
    """What attends to what, in the group layout."""
    kinds: tuple[Kind, ...] = ("original",)
    """The pictures that the rows show. With k kinds the b rows are followed by the same b rows with other images, their
    twins: input_ids is [k b, s], response_positions and response_tokens [k N]."""
    constants: dict[str, Tensor] = field(default_factory=dict)
    """Per-token tensors [B, T] that are constants of the loss: old_log_probs, ref_log_probs, ..."""
    denominators: StepCounts | None = None
    """Of the loss, [B, 1]: where it is computed, in an update on the last pipeline stage."""

    @property
    def has_twins(self) -> bool:
        return len(self.kinds) > 1

    @property
    def num_response_tokens(self) -> int:
        """N, from the records: no tensor has to be looked into."""
        return sum(row.response_length for row in self.rows)


class Collator:
    """Makes micro-batches of rollouts on this rank: pixels only where the vision tower lives, each distinct picture
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
        rotary_positions: RotaryPositions | None = None,
        encoded: EncodedPictures | None = None,
    ):
        """Prepare for the micro-batches of any rollouts.

        Args:
            config: layout, pixel limits, the masked image, sequence parallelism.
            hf: the model.
            data_root: the directory that the pictures' paths start from.
            with_pixels: whether this rank holds the vision tower.
            device, dtype: of the tensors that the model gets.
            rotary_positions: the model's own where it is None.
            encoded: of a frozen vision tower.
        """
        self.config, self.hf, self.data_root = config, hf, data_root
        self.with_pixels, self.device, self.dtype = with_pixels, device, dtype
        self.layout, self.encoded = layout_of(config.training), encoded
        self.rotary_positions = rotary_positions or partial(mrope_position_ids, image_token_id=hf.image_token_id)
        parallel = config.parallel
        self.length_multiple = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        kept = KEPT_PICTURE_BYTES if encoded is None else 0  # what an encoded picture was made of is not wanted again
        self._prepared = PreparedPictures(kept, threads_for(process_groups.local_world_size()))

    def plan(
        self, rows: Sequence[TrainingRollout], micro_batch_size: int, pictures: Pictures = "original"
    ) -> list[Sequence[TrainingRollout]]:
        """Cut the rollouts into micro-batches, as Layout.plan."""
        return self.layout.plan(rows, micro_batch_size, len(kinds_of(pictures)))

    def rows_as_seen(self, rows: Sequence[TrainingRollout], kind: Pictures) -> list[TrainingRollout]:
        """Return the rollouts as pictures of this kind alone show them: training/views.py."""
        return rows_as_seen(rows, kind, self.config, self.hf)

    def expect(self, parts: Sequence[Sequence[TrainingRollout]], pictures: Pictures) -> None:
        """Say which micro-batches a pass is going to ask for: threads prepare those of their pictures that are not
        there."""
        if not self.with_pixels:
            return
        wanted: dict[Hashable, Prepare] = {}
        for part in parts:
            for kind in kinds_of(pictures):
                for rollout in (row.rollout for row in part if row.grids):
                    key = _picture_key(rollout, kind)
                    if self.encoded is None or not self.encoded.knows(key):
                        wanted.setdefault(key, partial(self._prepare, rollout, kind))
        self._prepared.expect(wanted)

    def collate(self, rows: Sequence[TrainingRollout], pictures: Pictures = "original") -> MicroBatch:
        """Return the rollouts of one micro-batch as tensors on the device."""
        kinds = kinds_of(pictures)
        copies = len(kinds)
        arranged = self.layout.arrange(rows, self.rotary_positions)
        input_ids, position_ids, predicting = self._pad(arranged.rows)
        response_tokens = torch.tensor([t for row in rows for t in row.rollout.response_token_ids], dtype=torch.long)
        response_mask = torch.zeros(len(rows), max(1, *(row.response_length for row in rows)))
        for i, row in enumerate(rows):
            response_mask[i, : row.response_length] = 1.0
        first_of_prompts = [of_prompt[0] for of_prompt in self.layout.by_prompt(rows)]
        of_pictures, image_grids, places = self._pictures(first_of_prompts, kinds)
        return MicroBatch(
            rows,
            to_device(input_ids.repeat(copies, 1), self.device),
            to_device(position_ids.repeat(1, copies, 1), self.device),
            of_pictures if self.encoded is None else None,
            None if self.encoded is None else of_pictures,
            image_grids,
            places,
            to_device(torch.cat([predicting + copy * input_ids.numel() for copy in range(copies)]), self.device),
            to_device(response_tokens.repeat(copies), self.device),
            to_device(response_mask, self.device),
            copies * int((input_ids == self.hf.image_token_id).sum()),
            arranged.segments,
            kinds,
        )

    def _pad(self, rows: Sequence[InputRow]) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids [b, s], positions [3, b, s], and [N] the places in [b * s] that predict response tokens."""
        longest = max(len(row.token_ids) for row in rows)
        length = -(-longest // self.length_multiple) * self.length_multiple
        input_ids = torch.zeros(len(rows), length, dtype=torch.long)
        position_ids = torch.zeros(3, len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            input_ids[i, : len(row.token_ids)] = row.token_ids
            position_ids[:, i, : len(row.token_ids)] = row.position_ids
        return input_ids, position_ids, torch.cat([i * length + row.predicting for i, row in enumerate(rows)])

    def _pictures(
        self, rows: Sequence[TrainingRollout], kinds: Sequence[Kind]
    ) -> tuple[Tensor | None, list[Grid], list[int]]:
        """Return patches (of a frozen tower: what it makes of them) and grids of the distinct pictures that the rows
        show in each kind, and which of them stands at each place."""
        if not self.with_pixels or not any(row.grids for row in rows):
            return None, [], []
        distinct: dict[tuple, range] = {}
        patches: list[Tensor] = []  # or encoded
        grids: list[Grid] = []
        places: list[int] = []
        for kind in kinds:
            for row in rows:
                key = _picture_key(row.rollout, kind)
                if key not in distinct:
                    distinct[key] = range(len(patches), len(patches) + len(row.rollout.images))
                    if self.encoded is None:
                        patches += self._patches(row.rollout, kind)
                    else:
                        encodable = partial(self._encodable, row.rollout, kind)
                        encoded = self.encoded.of(key, encodable, row.grids)
                        patches += [to_device(of_picture, self.device) for of_picture in encoded]
                    grids += row.grids
                places += distinct[key]
        if self.encoded is None:
            return normalised(to_device(torch.cat(patches), self.device), self.dtype), grids, places
        return torch.cat(patches), grids, places

    def _patches(self, rollout: Rollout, kind: Kind) -> list[Tensor]:
        """Return uint8 [patches, 588] of each of the rollout's pictures, on the host."""
        return self._prepared.of(_picture_key(rollout, kind), partial(self._prepare, rollout, kind))

    def _encodable(self, rollout: Rollout, kind: Kind) -> list[Tensor]:
        """Return [patches, 1176] of each of them, on the device, in the model's dtype."""
        return [normalised(to_device(patches, self.device), self.dtype) for patches in self._patches(rollout, kind)]

    def _prepare(self, rollout: Rollout, kind: Kind) -> list[Tensor]:
        """Return uint8 [patches, 588] of each of the rollout's pictures, loaded, resized and masked."""
        settings = preprocess.PictureSettings.of(self.config.data)
        masking, seed = view_of(self.config, rollout, kind)
        pictures = preprocess.load_images(
            self.data_root, rollout.images, settings, masking=masking, seed=seed, saliency=rollout.saliency
        )
        return [torch.from_numpy(preprocess.to_patch_bytes(picture)) for picture in pictures]


def kinds_of(pictures: Pictures) -> tuple[Kind, ...]:
    """Return the kinds of pictures in a micro-batch, one copy of its rows for each."""
    if pictures == "all":
        return KINDS
    return ("original", "masked") if pictures == "both" else (pictures,)


def view_of(config: Config, rollout: Rollout, kind: Kind) -> tuple[MaskedImageConfig | None, int | None]:
    """Return how a kind of pictures is corrupted, and the seed; None for the pictures as they are."""
    if kind == "original":
        return None, None
    if kind == "masked":
        return config.masked_image, rollout.masked_image_seed
    return config.kept_image, seed_of_kept(rollout.masked_image_seed)


def _picture_key(rollout: Rollout, kind: Kind) -> tuple:
    seed = [] if kind == "original" else [rollout.masked_image_seed]
    return (kind, *rollout.images, *seed)


def pad_responses(values: Sequence[Tensor], response_mask: Tensor) -> Tensor:
    """[response_length] of each rollout -> [B, T], zeros on padding."""
    return response_mask.new_zeros(response_mask.shape).masked_scatter(response_mask.bool(), torch.cat(list(values)))

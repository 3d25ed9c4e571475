"""Qwen2.5-VL's vision tower on megatron-core's TransformerBlock: tensor-parallel, on the first pipeline stage.

Pictures of any number and size go through as one sequence of patches. Most layers attend within windows of 112 x 112
pixels, a few within the whole picture (arXiv 2502.13923, section 2.1.1). Four patches of a 2 x 2 cell make one image
token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_papo.distributed.transfer import to_device
from megatron_papo.model import varlen
from megatron_papo.model.hf_config import VisionConfig
from megatron_papo.model.layer_specs import Recompute, RMSNorm, transformer_config, transformer_layer
from megatron_papo.model.rotary import Rotary

ROPE_BASE = 10000.0


@dataclass
class Segments:
    """A cut of the patch sequence into stretches that attend to themselves, equal lengths side by side."""

    order: torch.Tensor | None
    """[patches] gathers the sequence so that segments of equal length are neighbours; None where they are already."""
    counts: list[tuple[int, int]]
    """(number of segments, length) in that order."""
    back: torch.Tensor | None = None
    """[patches] undoes `order`."""
    table: varlen.Table | None = None
    """Of the segments, where the kernel takes all of them in one call."""

    def on(self, device: torch.device) -> "Segments":
        """Return the segments for patches on a device."""
        back = None if self.order is None else to_device(torch.argsort(self.order), device)
        order = None if self.order is None else to_device(self.order, device)
        lengths = [length for count, length in self.counts for _ in range(count)]
        return Segments(order, self.counts, back, varlen.Table.of(lengths, lengths, None, device))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the attention within the segments, by one call of the kernel where it takes them together, else by one
        per distinct length. [patches, heads, d] three times -> the same shape."""
        query, key, value = (x if self.order is None else x[self.order] for x in (query, key, value))
        if self.table is not None and varlen.has_kernel(query):
            out = varlen.attend(query, key, value, self.table, is_causal=False)
        else:
            out = self._by_length(query, key, value)
        return out if self.back is None else out[self.back]

    def _by_length(self, *qkv: torch.Tensor) -> torch.Tensor:
        outs, start = [], 0
        for count, length in self.counts:
            batched = [x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2) for x in qkv]
            outs.append(F.scaled_dot_product_attention(*batched).transpose(1, 2).flatten(0, 1))
            start += count * length
        return outs[0] if len(outs) == 1 else torch.cat(outs)


NO_SEGMENTS = Segments(None, [])


@dataclass
class VisionSegments(PackedSeqParams):
    """Travels through TransformerBlock to the attention of each layer."""

    windows: Segments = field(default_factory=lambda: NO_SEGMENTS)
    pictures: Segments = field(default_factory=lambda: NO_SEGMENTS)
    rotary: Rotary | None = None


class _SegmentAttention(MegatronModule):
    def __init__(self, config: TransformerConfig, **_: object):
        super().__init__(config)

    def _attend(
        self,
        segments: Segments,
        rotary: Rotary | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        if rotary is not None:
            query, key = rotary.rotate(query), rotary.rotate(key)
        return segments.attend(query.squeeze(1), key.squeeze(1), value.squeeze(1)).flatten(1).unsqueeze(1)


class WindowAttention(_SegmentAttention):
    """[patches, 1, heads, d] -> [patches, 1, heads * d], each patch seeing its window."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: VisionSegments,
        **_: object,
    ) -> torch.Tensor:
        return self._attend(packed_seq_params.windows, packed_seq_params.rotary, query, key, value)


class PictureAttention(_SegmentAttention):
    """[patches, 1, heads, d] -> [patches, 1, heads * d], each patch seeing its picture."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: VisionSegments,
        **_: object,
    ) -> torch.Tensor:
        return self._attend(packed_seq_params.pictures, packed_seq_params.rotary, query, key, value)


@dataclass
class Geometry:
    """Where the patches of some pictures belong; all on the CPU."""

    positions: torch.Tensor
    """[patches, 2] row and column of each patch, in the order of the pixels."""
    cells: torch.Tensor
    """[cells] gathers cells (2 x 2 patches, neighbours in the pixels) into window order, equal window sizes side by
    side."""
    windows: Segments
    pictures: Segments


def geometry(config: VisionConfig, image_grids: list[tuple[int, int, int]]) -> Geometry:
    """Return where the patches of pictures with these (1, rows, columns) belong, one picture after the other."""
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size
    positions, windows, picture_of_cell, first = [], [], [], 0
    for number, (time, rows, columns) in enumerate(image_grids):
        if time != 1 or rows % merge or columns % merge:
            raise ValueError(
                f"image grid {(time, rows, columns)}: expected (1, multiple of {merge}, multiple of {merge})"
            )
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(
            rows // merge, merge, columns // merge, merge, 2
        )
        positions.append(grid.transpose(1, 2).reshape(-1, 2))
        cells = first + torch.arange(rows * columns // merge**2).view(rows // merge, columns // merge)
        for band in cells.split(side, dim=0):
            windows += [window.flatten() for window in band.split(side, dim=1)]
        picture_of_cell.append(torch.full((cells.numel(),), number))
        first += cells.numel()
    windows.sort(key=len)  # stable: window layers then need no gather
    order = torch.cat(windows)
    patches = merge**2
    picture = torch.cat(picture_of_cell)[order].repeat_interleave(patches)
    return Geometry(
        positions=torch.cat(positions),
        cells=order,
        windows=Segments(None, _runs([len(window) * patches for window in windows])),
        pictures=_picture_segments(picture),
    )


def _picture_segments(picture: torch.Tensor) -> Segments:
    """Return the cut into pictures. picture: [patches] number of the picture that each patch of the sequence belongs
    to."""
    lengths = torch.bincount(picture)
    by_length = torch.argsort(lengths, stable=True)
    rank = torch.argsort(by_length)
    order = torch.argsort(rank[picture], stable=True)
    in_order = bool((order == torch.arange(len(order))).all())
    return Segments(None if in_order else order, _runs(lengths[by_length].tolist()))


def _runs(sorted_lengths: list[int]) -> list[tuple[int, int]]:
    return [(sorted_lengths.count(length), length) for length in sorted(set(sorted_lengths))]


def check_patches(pixel_values: torch.Tensor, image_grids: Sequence[tuple[int, int, int]]) -> None:
    """Raises ValueError, with both numbers, if the patches are not those of the grids."""
    expected = sum(time * rows * columns for time, rows, columns in image_grids)
    if pixel_values.shape[0] != expected:
        raise ValueError(
            f"pixel_values holds {pixel_values.shape[0]} patches, the image grids {list(image_grids)} have {expected}"
        )


class VisionTower(MegatronModule):
    """Patches of any number of pictures -> image tokens in the decoder's width. groups: the weights are sharded over
    groups.tp."""

    def __init__(
        self,
        vision: VisionConfig,
        *,
        dtype: torch.dtype,
        recompute: Recompute,
        groups: ProcessGroupCollection | None = None,
    ):
        groups = ProcessGroupCollection.use_mpu_process_groups() if groups is None else groups
        config = transformer_config(
            dtype=dtype,
            recompute=recompute,
            tensor_model_parallel_size=groups.tp.size(),
            num_layers=vision.depth,
            hidden_size=vision.hidden_size,
            num_attention_heads=vision.num_heads,
            kv_channels=vision.head_dim,
            ffn_hidden_size=vision.intermediate_size,
            layernorm_epsilon=1e-6,
            add_bias_linear=True,
        )
        super().__init__(config)
        self.vision = vision
        # The convolution of the published model has stride = kernel: on flattened patches it is this linear map.
        self.patch_embed = torch.nn.Linear(
            vision.patch_values, vision.hidden_size, bias=False, dtype=dtype, device=torch.cuda.current_device()
        )
        windowed, whole = (
            transformer_layer(core, AttnMaskType.no_mask) for core in (WindowAttention, PictureAttention)
        )
        layers = [whole if number in vision.full_attention_layers else windowed for number in range(vision.depth)]
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
            pg_collection=groups,
        )
        cell = vision.spatial_merge_size**2 * vision.hidden_size
        linear = dict(config=config, init_method=config.init_method, bias=True, skip_bias_add=False, tp_group=groups.tp)
        self.merger_fc1 = ColumnParallelLinear(cell, cell, gather_output=False, **linear)
        self.merger_fc2 = RowParallelLinear(cell, vision.out_hidden_size, input_is_parallel=True, **linear)

    def forward(self, pixel_values: torch.Tensor, image_grids: list[tuple[int, int, int]]) -> torch.Tensor:
        """Return the image tokens of some pictures, [patches / 4, out_hidden_size], in the pixels' order.

        Args:
            pixel_values: [patches, patch_values].
            image_grids: (1, rows, columns) of each picture.

        Raises ValueError if the patches are not those of the grids.
        """
        encoded, cells = self._encode(pixel_values, image_grids)
        return self.merge(encoded)[torch.argsort(cells)]

    def encode(self, pixel_values: torch.Tensor, image_grid: tuple[int, int, int]) -> torch.Tensor:
        """Return what the merger makes the image tokens of one picture from, [cells, 4 * hidden_size], in the pixels'
        order.

        Args:
            pixel_values: [patches, patch_values].
            image_grid: (1, rows, columns).
        """
        encoded, cells = self._encode(pixel_values, [image_grid])
        return encoded[torch.argsort(cells)]

    def merge(self, encoded: torch.Tensor) -> torch.Tensor:
        """Return image tokens [cells, out_hidden_size] from [cells, 4 * hidden_size]."""
        tokens, _ = self.merger_fc1(encoded)
        tokens, _ = self.merger_fc2(F.gelu(tokens))
        return tokens

    def _encode(
        self, pixel_values: torch.Tensor, image_grids: list[tuple[int, int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [cells, 4 * hidden_size] in the order of the windows, and [cells] that order: Geometry.cells."""
        check_patches(pixel_values, image_grids)
        places, device = geometry(self.vision, image_grids), pixel_values.device
        cells, merge = to_device(places.cells, device), self.vision.spatial_merge_size**2
        hidden = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        hidden = hidden.unflatten(0, (-1, merge))[cells].flatten(0, 1).unsqueeze(1)
        angles = self._rotary_angles(to_device(places.positions, device)).unflatten(0, (-1, merge))[cells].flatten(0, 1)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            packed_seq_params=VisionSegments(
                qkv_format="sbhd",
                windows=places.windows.on(device),
                pictures=places.pictures.on(device),
                rotary=Rotary.of(angles[:, None, None, :], hidden.dtype),
            ),
        )
        return hidden.reshape(cells.numel(), -1), cells

    def _rotary_angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Return float32 [patches, head_dim] from [patches, 2]: half of the frequencies turn with the row, half with
        the column."""
        width = self.vision.head_dim // 2
        frequencies = ROPE_BASE ** (-torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width)
        return (positions[..., None] * frequencies).flatten(1).repeat(1, 2)

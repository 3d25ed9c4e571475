"""The vision tower with its pictures, not its weights, spread over the tensor-parallel ranks (parallel.vision_tower:
spread).

Every rank holds the whole tower and encodes its share of a micro-batch's distinct pictures; the image tokens are then
exchanged. One collective per micro-batch instead of four per layer, and sizes need not be divisible by the
tensor-parallel size; but all weights on every rank, and with fewer pictures than ranks some have nothing to do.

Gradients. Where image tokens enter the decoder, every rank holds the whole gradient of the loss, the same on all of
them: a tensor-parallel region begins with an all-reduce in the backward pass, a sequence-parallel one
(scatter_to_sequence_parallel_region) with an all-gather. So each rank takes the rows of its own pictures from it, once.
What its weights then get covers its own pictures: the sum over the ranks is the gradient, and `finalize_gradients`
makes it, once per optimizer step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.distributed import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_papo.distributed import process_groups
from megatron_papo.distributed.balance import balanced
from megatron_papo.model.hf_config import VisionConfig
from megatron_papo.model.layer_specs import Recompute
from megatron_papo.model.vision import VisionTower, check_patches


class SpreadVisionTower(VisionTower):
    """VisionTower whose forward is collective over the tensor-parallel group. Its checkpoints are VisionTower's."""

    def __init__(self, vision: VisionConfig, *, dtype: torch.dtype, recompute: Recompute):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        ranks = groups.tp
        groups.tp = process_groups.single_rank_group()  # the weights stay whole
        super().__init__(vision, dtype=dtype, recompute=recompute, groups=groups)
        self.ranks = ranks
        for parameter in self.parameters():
            parameter.tensor_model_parallel = False  # the gradient norm counts it once, not once per rank

    def forward(self, pixel_values: Tensor, image_grids: list[tuple[int, int, int]]) -> Tensor:
        """Return VisionTower's image tokens of all pictures on every rank, from the same arguments on every rank."""
        check_patches(pixel_values, image_grids)
        patches = [time * rows * columns for time, rows, columns in image_grids]
        merge = self.vision.spatial_merge_size**2
        share = balanced(patches, self.ranks.size())[self.ranks.rank()]
        places = torch.arange(sum(patches) // merge, device=pixel_values.device).split(
            [count // merge for count in patches]
        )
        if not share:
            own = self.patch_embed.weight.new_zeros(0, self.vision.out_hidden_size)
            return _Exchange.apply(own, places[0][:0], sum(patches) // merge, self.ranks)
        pixels = pixel_values.split(patches)
        own = super().forward(torch.cat([pixels[i] for i in share]), [image_grids[i] for i in share])
        return _Exchange.apply(own, torch.cat([places[i] for i in share]), sum(patches) // merge, self.ranks)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The tensors are whole; the first tensor-parallel rank is the one that saves them."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for entry in nested_values(state):
            pipeline, _, data = entry.replica_id
            entry.replica_id = (pipeline, self.ranks.rank(), data)
        return state


class _Exchange(torch.autograd.Function):
    """Gives every rank the rows of all. own [n, h], places [n] of them in the result, number of all rows -> [rows, h].

    Adding zeros is exact, so an all-reduce gives every rank the bits that the owner of a row computed. Backward: see
    the module.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, places: Tensor, rows: int, ranks: ProcessGroup) -> Tensor:
        ctx.save_for_backward(places)
        all_rows = own.new_zeros(rows, own.shape[1])
        all_rows[places] = own
        torch.distributed.all_reduce(all_rows, group=ranks)
        return all_rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient[ctx.saved_tensors[0]], None, None, None


def finalize_gradients(model: Sequence[torch.nn.Module], *args: object, **options: object) -> None:
    """Do megatron-core's finalize_model_grads, then sum the spread tower's gradients over the tensor-parallel
    ranks.

    All ranks get the same bits, so that their towers stay equal. After the data-parallel reduction: with
    DistributedOptimizer a rank then holds the sum of its own stretch of the buffer, and its tensor-parallel neighbours
    hold the same stretch.
    """
    finalize_model_grads(model, *args, **options)
    towers = [module for chunk in model for module in chunk.modules() if isinstance(module, SpreadVisionTower)]
    group = parallel_state.get_tensor_model_parallel_group()
    for tower in towers:
        pending = [
            torch.distributed.all_reduce(parameter.main_grad, group=group, async_op=True)
            for parameter in tower.parameters()
            if parameter.requires_grad
        ]
        for work in pending:
            work.wait()

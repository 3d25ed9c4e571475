"""Optimizer state for torch_dist checkpoints, for FP32Optimizer, Float16OptimizerWithFloat16Params and
DistributedOptimizer.

The first two are megatron-core's own. DistributedOptimizer gives each data-parallel rank a range of every flattened
parameter that it owns values of. megatron-core 0.16.1's fully_reshardable format holds whole tensors, and megatron-core
gathers them for it: 12 bytes for every parameter of the model-parallel shard in the host memory of every data-parallel
rank, twice. Here each rank writes and reads the boxes (boxes.py) that its ranges consist of, which is the same format
to whoever reads it, and nothing is gathered.

Over torch's AdamW (neither TransformerEngine nor apex there) DistributedOptimizer does not resume as it is; `_prepare`
and `load` mend it:

- its state_dict() wants a `step` before the first step was made;
- afterwards all parameters share one `step` tensor, so that AdamW advances it once per parameter and corrects its bias
  wrongly.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

from megatron_papo.checkpoint.boxes import Box, of_at_most, of_flat_range
from megatron_papo.checkpoint.torch_dist_files import TorchDistCheckpoint
from megatron_papo.checkpoint.torch_dist_writer import CHUNK_BYTES
from megatron_papo.errors import UserError

FORMAT = "fully_reshardable"
"""As megatron-core calls it, whose own loader reads it."""
_NOT_IN_BOXES = "step"
"""The one entry of a parameter's state that is no tensor of its shape; a parameter group has it, too."""


def distributed_part(optimizer: MegatronOptimizer) -> DistributedOptimizer | None:
    """Return the DistributedOptimizer that an optimizer is; None for the others."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    if not any(isinstance(part, DistributedOptimizer) for part in parts):
        return None
    [part] = parts
    assert isinstance(part, DistributedOptimizer)
    return part


def sharded_state(part: DistributedOptimizer, model_state: dict) -> dict:
    """Return the optimizer's part of a state dict to save: views of what this rank owns. No communication, no memory.

    Args:
        part: the optimizer.
        model_state: the model's sharded state dict, factories not applied yet.
    """
    _prepare(part)
    boxes = {number: _sharded_tensors(number_of) for number, number_of in enumerate(_owned(part, model_state))}
    return {**part.state_dict(), "param_state": boxes, "param_state_sharding_type": FORMAT}


def load(part: DistributedOptimizer, model_state: dict, stored: TorchDistCheckpoint) -> None:
    """Fill main parameters, moments and steps in place. Each rank reads what it owns, CHUNK_BYTES at a time.

    Args:
        part: the optimizer.
        model_state: the model's sharded state dict, factories not applied yet.
        stored: the checkpoint, saved in any layout.

    Raises UserError where the checkpoint holds another kind of optimizer's state, or not all of it.
    """
    _prepare(part)
    part.load_state_dict({key: value for key, value in stored.common["optimizer"].items() if key != "param_state"})
    for state in part.optimizer.state.values():
        if isinstance(step := state.get(_NOT_IN_BOXES), torch.Tensor):  # one for all parameters
            state[_NOT_IN_BOXES] = step.clone()
    with torch.no_grad():
        for owned in _owned(part, model_state):
            for name, values in owned.values.items():
                for box, start in owned.boxes:
                    key = owned.key(name)
                    if key not in stored.tensors or stored.tensors[key].shape != owned.tensor.global_shape:
                        raise UserError(
                            f"{stored.directory}: holds no {key} {list(owned.tensor.global_shape)}: give a checkpoint"
                            " of the same model, saved with the same model.dtype and optimizer.distributed"
                        )
                    values[start : start + box.numel].copy_(stored.read_box(key, box).flatten())


@dataclass
class _Owned:
    """What this rank owns of one tensor of the checkpoint, and the state that belongs to it."""

    tensor: ShardedTensor
    """The parameter's, or a part of it where the checkpoint has that elsewhere (gate and up)."""
    boxes: list[tuple[Box, int]]
    """In the whole tensor; and where each begins in `values`."""
    values: dict[str, torch.Tensor]
    """Flat main parameter and moments, as megatron-core names them in a checkpoint."""

    def key(self, name: str) -> str:
        return f"optimizer.state.{name}.{self.tensor.key}"


def _owned(part: DistributedOptimizer, model_state: dict) -> Iterator[_Owned]:
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    of_parameter = {entry.data: entry for entry in nested_values(sharded)}
    for parameter, first, last in _ranges(part):
        state = part._get_main_param_and_optimizer_states(parameter)
        values = {name: value.detach() for name, value in state.items() if name != _NOT_IN_BOXES}
        for tensor, start in _tensors(of_parameter[parameter]):
            begin, end = max(first - start, 0), min(last - start, tensor.data.numel())
            boxes, at = [], start + begin - first
            for local in of_flat_range(begin, end, tensor.local_shape):
                for box in of_at_most(CHUNK_BYTES // 4, local):  # fp32
                    for _ in range(tensor.prepend_axis_num):
                        box = box.below(0)
                    boxes.append((box.moved(tensor.global_offset), at))
                    at += box.numel
            if boxes:
                yield _Owned(tensor, boxes, values)


def _ranges(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Return the parameters of which this rank owns values, and which [first, last) of the flattened parameter."""
    for by_dtype in part.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _tensors(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[ShardedTensor, int]]:
    """Return the tensors of the checkpoint that a parameter lies in, and where each begins in the flat parameter."""
    built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
    for tensor in nested_values(built):
        assert tensor.data.is_contiguous() and tensor.data.untyped_storage() == entry.data.untyped_storage()
        yield tensor, tensor.data.storage_offset() - entry.data.storage_offset()


def _sharded_tensors(owned: _Owned) -> list[ShardedTensor]:
    """Return megatron-core's description of each box. Nobody else owns it, whatever replicas the weights have; only
    where the parameter itself lies on several model-parallel ranks, one of them saves."""
    stacked = owned.tensor.prepend_axis_num
    return [
        replace(
            owned.tensor,
            key=owned.key(name),
            data=values[start : start + box.numel].view(box.sizes[stacked:]),
            dtype=values.dtype,
            local_shape=box.sizes[stacked:],
            global_offset=box.offsets,
            axis_fragmentations=None,
            replica_id=(*owned.tensor.replica_id[:2], 0),
        )
        for name, values in owned.values.items()
        for box, start in owned.boxes
    ]


def _prepare(part: DistributedOptimizer) -> None:
    """Give parameters that have made no step yet the state from which AdamW would begin."""
    if HAVE_APEX_OR_TE:
        return
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            state = part.optimizer.state[parameter]
            state.setdefault("step", torch.tensor(0.0))
            state.setdefault("exp_avg", torch.zeros_like(parameter))
            state.setdefault("exp_avg_sq", torch.zeros_like(parameter))

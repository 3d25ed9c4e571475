"""Optimizer state for torch_dist checkpoints: FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer.

The first two need nothing. DistributedOptimizer of megatron-core 0.16.1 over torch's AdamW (neither TransformerEngine
nor apex there) does not resume as it is; `_prepare`, `load` and `_give_each_parameter_its_step` mend it:

    its state_dict() wants a `step` before the first step was made;
    loading copies into parameters that require grad, in place;
    `fully_reshardable` stores no `step` per parameter and looks for it when loading;
    afterwards all parameters share one `step` tensor, so that AdamW advances it once per parameter and corrects its
    bias wrongly.
"""

import torch
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_state(optimizer: MegatronOptimizer, model_state: dict, is_loading: bool) -> dict:
    """Return the optimizer's part of a dist_checkpointing state dict. Collective.

    Args:
        optimizer: of megatron-core.
        model_state: the model's sharded state dict.
        is_loading: whether it is to be filled.
    """
    if is_loading:
        for part in _torch_distributed_parts(optimizer):
            _prepare(part)
    with torch.no_grad():
        return optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=_METADATA)


def load(optimizer: MegatronOptimizer, state: dict) -> None:
    """Put what dist_checkpointing.load returned for sharded_state() into the optimizer. Collective."""
    with torch.no_grad():
        optimizer.load_state_dict(state)
    for part in _torch_distributed_parts(optimizer):
        _give_each_parameter_its_step(part)


def _torch_distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if isinstance(part, DistributedOptimizer) and not HAVE_APEX_OR_TE]


def _prepare(part: DistributedOptimizer) -> None:
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            state = part.optimizer.state[parameter]
            state.setdefault("step", torch.tensor(0.0))
            state.setdefault("exp_avg", torch.zeros_like(parameter))
            state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
    if not isinstance(part, _WithStep):
        part.__class__ = _WithStep


class _WithStep(DistributedOptimizer):
    def _set_main_param_and_optimizer_states(self, model_param: torch.Tensor, tensors: dict) -> None:
        own = self._get_main_param_and_optimizer_states(model_param)
        super()._set_main_param_and_optimizer_states(model_param, {"step": own["step"], **tensors})


def _give_each_parameter_its_step(part: DistributedOptimizer) -> None:
    for state in part.optimizer.state.values():
        state["step"] = state["step"].clone()

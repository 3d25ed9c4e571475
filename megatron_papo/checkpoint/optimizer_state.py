"""Optimizer state for torch_dist checkpoints, for FP32Optimizer, Float16OptimizerWithFloat16Params and
DistributedOptimizer.

The first two need nothing. DistributedOptimizer of megatron-core 0.16.1 over torch's AdamW (neither TransformerEngine
nor apex there) does not resume as it is; `_prepare` and `_load_parameters` mend it:

- its state_dict() wants a `step` before the first step was made;
- loading copies into parameters that require grad, in place;
- `fully_reshardable` stores no `step` per parameter and looks for it when loading;
- afterwards all parameters share one `step` tensor, so that AdamW advances it once per parameter and corrects its bias
  wrongly.
"""

import torch
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_state(optimizer: MegatronOptimizer, model_state: dict, is_loading: bool) -> dict:
    """Return the optimizer's part of a dist_checkpointing state dict. Collective.

    model_state: the model's sharded state dict.
    """
    if is_loading:
        for part in _torch_distributed_parts(optimizer):
            _prepare(part)
    with torch.no_grad():
        return optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=_METADATA)


def load(optimizer: MegatronOptimizer, state: dict) -> None:
    """Put what dist_checkpointing.load returned for sharded_state() into the optimizer. Collective."""
    parts = _torch_distributed_parts(optimizer)
    parameters = [part_state.pop("param_state") for part_state in _states_of(optimizer, state, parts)]
    with torch.no_grad():
        optimizer.load_state_dict(state)
        for part, tensors in zip(parts, parameters, strict=True):
            _load_parameters(part, tensors)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _torch_distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    if HAVE_APEX_OR_TE:
        return []
    return [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]


def _states_of(optimizer: MegatronOptimizer, state: dict, wanted: list[DistributedOptimizer]) -> list[dict]:
    """Return the state dicts of the wanted parts. A chain of several keeps them under 0, 1, ..."""
    parts = _parts(optimizer)
    states = [state] if len(parts) == 1 else [state[number] for number in range(len(parts))]
    return [of_part for part, of_part in zip(parts, states, strict=True) if part in wanted]


def _prepare(part: DistributedOptimizer) -> None:
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            state = part.optimizer.state[parameter]
            state.setdefault("step", torch.tensor(0.0))
            state.setdefault("exp_avg", torch.zeros_like(parameter))
            state.setdefault("exp_avg_sq", torch.zeros_like(parameter))


def _load_parameters(part: DistributedOptimizer, tensors: dict) -> None:
    """Fill main parameters and moments. load_state_dict has given all parameters one `step` between them: each gets its
    own, and meanwhile none has any, since the tensors do not."""
    steps = {parameter: state.pop("step") for parameter, state in part.optimizer.state.items()}
    part.load_parameter_state_from_fully_reshardable(tensors)
    for parameter, step in steps.items():
        part.optimizer.state[parameter]["step"] = step.clone()

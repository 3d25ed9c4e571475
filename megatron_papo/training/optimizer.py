"""Megatron's data-parallel wrapper and AdamW around a model, and the learning-rate schedule."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.module import MegatronModule

from megatron_papo.config import OptimizerConfig
from megatron_papo.distributed import process_groups

LOWEST_DECAY = 0.1


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Return the learning rate of optimizer step 0, 1, ... of the run: linear warm-up over warmup_steps, times the
    linear decay if decay_steps is given."""
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    decay = 1.0 if config.decay_steps is None else max(LOWEST_DECAY, 1.0 - step / config.decay_steps)
    return config.learning_rate * warmup * decay


def uses_distributed_optimizer(config: OptimizerConfig) -> bool:
    return torch.cuda.is_available() if config.distributed is None else config.distributed


def build_optimizer(
    model: MegatronModule, config: OptimizerConfig, dtype: torch.dtype
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """Return the model wrapped in DistributedDataParallel, and Megatron's optimizer of it.

    AdamW with decoupled weight decay on all parameters, as the authors' torch AdamW has it: megatron-core marks biases
    and norm weights with wd_mult 0, but only its own learning-rate scheduler, which is not used here, looks at that.
    bfloat16 models get fp32 main parameters and fp32 gradient accumulation. Apex's or TransformerEngine's fused Adam is
    used where megatron-core finds it.
    """
    distributed = uses_distributed_optimizer(config)
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed),
        model,
    )
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_epsilon,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
        ),
        [wrapped],
        use_gloo_process_groups=process_groups.has_gloo_groups(),
    )
    model.config.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer


def set_learning_rate(optimizer: MegatronOptimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value

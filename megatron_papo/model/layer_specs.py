"""The parts that Qwen2.5-VL's decoder and vision tower are built from: megatron-core's layers, our norm, PyTorch's
attention kernels.

TransformerEngine's layers are not used: torch alone runs everywhere. Fusions that need an extension are switched on
where it imports.
"""

import importlib
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

Recompute = Literal["none", "full"]
"""What the backward pass computes again: nothing, or each layer from its input."""


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, made for megatron-core: its own torch norm refuses sequence parallelism.

    Under sequence parallelism each rank's gradient covers its share of the tokens; the mark makes finalize_model_grads
    add them up.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron-core's mark


def transformer_layer(core_attention: type, mask_type: AttnMaskType) -> ModuleSpec:
    """Return the spec of a pre-norm layer: RMSNorm, attention with `core_attention`, RMSNorm, SwiGLU."""
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=core_attention,
        linear_proj=RowParallelLinear,
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=SelfAttention, params={"attn_mask_type": mask_type}, submodules=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def transformer_config(*, dtype: torch.dtype, recompute: Recompute, **sizes: object) -> TransformerConfig:
    """Return what decoder and tower have in common, with `sizes` of one of them.

    Without tensor_model_parallel_size among the sizes it is the layout's. Ready for megatron-core's schedules and
    optimizers: finalize_model_grads_func, pipeline_dtype and variable sequence lengths are set.
    """
    fused_kernels = torch.cuda.is_available() and _imports("triton")
    if fused_kernels:
        # A fused function is compiled once per kind of input (gradient or not, one row or more, recompute, padding);
        # torch gives up on it, without a word, at 8.
        torch._dynamo.config.recompile_limit = 64
    recompute_all = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    tp = parallel_state.get_tensor_model_parallel_world_size()
    return TransformerConfig(
        **{"tensor_model_parallel_size": tp, **sizes},
        **(recompute_all if recompute == "full" else {}),
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # megatron-core asks for it with variable lengths, experts or not
        finalize_model_grads_func=finalize_model_grads,
        bias_activation_fusion=fused_kernels,
        bias_dropout_fusion=fused_kernels,
        gradient_accumulation_fusion=torch.cuda.is_available() and _imports("fused_weight_gradient_mlp_cuda"),
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )


def _imports(module: str) -> bool:
    """Return whether an optional extension is really there: being listed as installed is not enough."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True

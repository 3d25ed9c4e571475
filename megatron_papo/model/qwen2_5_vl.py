"""Qwen2.5-VL as one pipeline stage of megatron-core: vision tower and embeddings on the first, logits from the last.

Equal to transformers' Qwen2_5_VLForConditionalGeneration in logits and in every gradient (tests/test_model_parity.py).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_papo.model.hf_config import HFConfig
from megatron_papo.model.layer_specs import CausalAttention, RMSNorm, transformer_config, transformer_layer
from megatron_papo.model.vision import VisionTower


def build_model(hf: HFConfig, *, dtype: torch.dtype, sequence_parallel: bool, recompute: Literal["none", "full"]) -> "Qwen2_5_VL":
    """This rank's pipeline stage, on its device, with weights that a checkpoint must still be loaded into."""
    config = transformer_config(
        dtype=dtype,
        recompute=recompute,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        num_layers=hf.text.num_layers,
        hidden_size=hf.text.hidden_size,
        num_attention_heads=hf.text.num_heads,
        num_query_groups=hf.text.num_kv_groups,
        kv_channels=hf.text.head_dim,
        ffn_hidden_size=hf.text.intermediate_size,
        layernorm_epsilon=hf.text.rms_norm_eps,
        mrope_section=list(hf.text.mrope_section),
        add_bias_linear=False,
    )
    return Qwen2_5_VL(config, hf, recompute)


class Qwen2_5_VL(MegatronModule):
    """One pipeline stage: `vision_model` (first stage only) and `language_model`, megatron-core's GPTModel."""

    def __init__(self, config: TransformerConfig, hf: HFConfig, recompute: str):
        super().__init__(config)
        self.hf = hf
        self.pre_process, self.post_process = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        self.model_type = ModelType.encoder_or_decoder
        self.vision_model = VisionTower(hf.vision, dtype=config.params_dtype, recompute=recompute) if self.pre_process else None
        layer = transformer_layer(CausalAttention, AttnMaskType.causal)
        self.language_model = GPTModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules([layer] * get_num_layers_to_build(config), layer_norm=RMSNorm),
            vocab_size=hf.text.vocab_size,
            max_sequence_length=hf.text.max_position_embeddings,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
            position_embedding_type="mrope",
            rotary_base=hf.text.rope_theta,
            scatter_embedding_sequence_parallel=False,
        )
        # finalize_model_grads asks the wrapped model for these two.
        self.share_embeddings_and_output_weights = hf.tie_word_embeddings
        self.shared_embedding_or_output_weight = self.language_model.shared_embedding_or_output_weight

    def set_input_tensor(self, input_tensor) -> None:
        """Called by the pipeline schedules with the previous stage's output."""
        self.language_model.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_grids: Sequence[tuple[int, int, int]],
    ) -> torch.Tensor:
        """[b, s] right-padded rows, [3, b, s], [patches, 1176] of all pictures in reading order, their (1, rows, columns).

        Last stage: logits [b, s, vocab / tp_size], this rank's slice of the vocabulary, in the model's dtype. Others: hidden states.
        Pixels matter to the first stage only: the others may pass None. With sequence parallelism s must be a multiple of tp_size.
        Raises ValueError where image tokens and pixels do not match.
        """
        tp = self.config.tensor_model_parallel_size
        if self.config.sequence_parallel and input_ids.shape[1] % tp:
            raise ValueError(f"sequence parallelism needs rows of a multiple of {tp} tokens, got {input_ids.shape[1]}: pad them")
        embeddings = self._embed(input_ids, pixel_values, image_grids) if self.pre_process else None
        return self.language_model(input_ids, position_ids, attention_mask=None, decoder_input=embeddings)

    def _embed(self, input_ids, pixel_values, image_grids) -> torch.Tensor:
        """Token embeddings [s, b, h] (this rank's share of s with sequence parallelism), image tokens replaced by the tower's output."""
        if (pixel_values is None) != (len(image_grids) == 0):
            raise ValueError(f"{len(image_grids)} image grids were given {'without' if pixel_values is None else 'with'} pixel_values")
        embeddings = self.language_model.embedding(input_ids=input_ids, position_ids=None)
        is_image = input_ids == self.hf.image_token_id
        cells = sum(time * rows * columns for time, rows, columns in image_grids) // self.hf.vision.spatial_merge_size**2
        if int(is_image.sum()) != cells:
            raise ValueError(f"input_ids holds {int(is_image.sum())} image tokens, the image grids {list(image_grids)} make {cells}")
        if pixel_values is not None:
            image_embeddings = self.vision_model(pixel_values, list(image_grids))
            row_first = embeddings.transpose(0, 1).contiguous()
            row_first = row_first.masked_scatter(is_image[..., None], image_embeddings.to(row_first.dtype))
            embeddings = row_first.transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
        return embeddings

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """For dist_checkpointing. Without the _extra_state entries, which carry something only for TransformerEngine's fp8."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {name: value for name, value in state.items() if not name.endswith("_extra_state")}

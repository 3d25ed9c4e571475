"""Qwen2.5-VL as one pipeline stage of megatron-core: vision tower and embeddings on the first, logits from the last.

Equal to transformers' Qwen2_5_VLForConditionalGeneration in logits and in every gradient (tests/model/test_parity.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_papo.model.freezing import freeze
from megatron_papo.model.group_attention import GroupAttention, GroupSegments
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.model.layer_specs import Recompute, RMSNorm, transformer_config, transformer_layer
from megatron_papo.model.log_probs import TokenStatistics, output_token_statistics
from megatron_papo.model.rotary import Rotary
from megatron_papo.model.spread_vision import SpreadVisionTower, finalize_gradients
from megatron_papo.model.vision import VisionTower


def build_model(
    hf: HFConfig,
    *,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute: Recompute,
    vision_tower: Literal["sharded", "spread"] = "sharded",
    frozen: Sequence[str] = (),
) -> "Qwen2_5_VL":
    """Return this rank's pipeline stage, on its device, with weights that a checkpoint must still be loaded into.

    Args:
        hf: sizes of the model.
        dtype: of the weights.
        sequence_parallel: whether activations between the layers are split over the tensor-parallel ranks.
        recompute: model.recompute.
        vision_tower: parallel.vision_tower. Gradients of a spread tower are whole only after
            config.finalize_model_grads_func, which megatron-core's schedules call.
        frozen: model.freeze.
    """
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
    if vision_tower == "spread":
        config.finalize_model_grads_func = finalize_gradients
    model = Qwen2_5_VL(config, hf, recompute, SpreadVisionTower if vision_tower == "spread" else VisionTower)
    freeze(model, frozen, hf.tie_word_embeddings)
    return model


@dataclass(frozen=True)
class Responses:
    """What the last stage is asked about the response tokens, instead of logits."""

    positions: torch.Tensor
    """[N]: index into the flattened [b * s] of the position that predicts each token."""
    tokens: torch.Tensor
    """[N]"""
    temperature: float
    kl_of_halves: bool = False
    second_half_gradient: bool = True
    forbidden: tuple[int, ...] = ()
    divergences: bool = False
    """See model.log_probs.token_statistics."""


class Decoder(GPTModel):
    """megatron-core's GPTModel whose last stage ends with the hidden states: most positions need no logits. Its layers
    get cosines and sines of the positions, in GroupSegments, in place of angles."""

    def _preprocess(self, *args: Any, packed_seq_params: GroupSegments, **others: Any) -> tuple:
        hidden, angles, *rest = super()._preprocess(*args, packed_seq_params=packed_seq_params, **others)
        packed_seq_params.rotary = Rotary.of(angles, self.config.params_dtype)
        return hidden, None, *rest

    def _postprocess(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden_states

    def output_weight(self) -> torch.Tensor:
        """Return [vocab / tp_size, h], on the last stage."""
        return (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )


class Qwen2_5_VL(MegatronModule):
    """One pipeline stage: `vision_model` (first stage only) and `language_model`, megatron-core's GPTModel."""

    def __init__(self, config: TransformerConfig, hf: HFConfig, recompute: Recompute, tower: type[VisionTower]):
        super().__init__(config)
        self.hf = hf
        self.pre_process, self.post_process = (
            parallel_state.is_pipeline_first_stage(),
            parallel_state.is_pipeline_last_stage(),
        )
        self.model_type = ModelType.encoder_or_decoder
        self.vision_model = (
            tower(hf.vision, dtype=config.params_dtype, recompute=recompute) if self.pre_process else None
        )
        layer = transformer_layer(GroupAttention, AttnMaskType.causal)
        self.language_model = Decoder(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                [layer] * get_num_layers_to_build(config), layer_norm=RMSNorm
            ),
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

    def set_input_tensor(self, input_tensor: list[torch.Tensor]) -> None:
        """Take the previous stage's output; the pipeline schedules call it."""
        self.language_model.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_grids: Sequence[tuple[int, int, int]],
        *,
        encoded_pictures: torch.Tensor | None = None,
        pictures: Sequence[int] | None = None,
        num_image_tokens: int | None = None,
        groups: GroupSegments | None = None,
        responses: Responses | None = None,
    ) -> torch.Tensor | TokenStatistics:
        """Compute this stage's part of a forward pass.

        Args:
            input_ids: [b, s], rows padded on the right; with sequence parallelism s must be a multiple of tp_size.
            position_ids: [3, b, s], rotary positions.
            pixel_values: [patches, 1176] of all distinct pictures; only the first stage looks at them.
            image_grids: (1, rows, columns) of each distinct picture.
            encoded_pictures: [cells, 4 * vision width] of them by VisionTower.encode, in place of pixel_values.
            pictures: which of them each place for a picture shows, in reading order; None: each its own.
            num_image_tokens: in input_ids; None: they are counted, for which the thread waits for the GPU.
            groups: the one row holds prompts, each followed by several responses to it.
            responses: what the last stage is asked.

        Returns, from the last stage, TokenStatistics of the responses where they are asked for, else logits [b, s,
        vocab / tp_size], this rank's slice of the vocabulary, in the model's dtype; from other stages hidden states.
        Raises ValueError where image tokens and pixels do not match.
        """
        tp = self.config.tensor_model_parallel_size
        if self.config.sequence_parallel and input_ids.shape[1] % tp:
            raise ValueError(
                f"sequence parallelism needs rows of a multiple of {tp} tokens, got {input_ids.shape[1]}: pad them"
            )
        embeddings = None
        if self.pre_process:
            embeddings = self._embed(input_ids, pixel_values, encoded_pictures, image_grids, pictures, num_image_tokens)
        segments = GroupSegments(qkv_format="sbhd", groups=None if groups is None else groups.groups)
        hidden = self.language_model(
            input_ids, position_ids, attention_mask=None, decoder_input=embeddings, packed_seq_params=segments
        )
        if not self.post_process:
            return hidden
        weight = self.language_model.output_weight()
        if responses is None:
            logits, _ = self.language_model.output_layer(hidden, weight=weight)
            return logits.transpose(0, 1).contiguous()
        if (
            self.config.sequence_parallel
        ):  # output_token_statistics adds up the gradient of all ranks, so each keeps its share of it
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        predicting = hidden.transpose(0, 1).flatten(0, 1).index_select(0, responses.positions)
        return output_token_statistics(
            predicting,
            weight,
            responses.tokens,
            parallel_state.get_tensor_model_parallel_group(),
            temperature=responses.temperature,
            kl_of_halves=responses.kl_of_halves,
            second_half_gradient=responses.second_half_gradient,
            divergences=responses.divergences,
            forbidden=responses.forbidden,
        )

    def _embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        encoded_pictures: torch.Tensor | None,
        image_grids: Sequence[tuple[int, int, int]],
        pictures: Sequence[int] | None,
        num_image_tokens: int | None,
    ) -> torch.Tensor:
        """Return token embeddings [s, b, h] (this rank's share of s with sequence parallelism), with the tower's output
        in place of image tokens."""
        if (pixel_values is None and encoded_pictures is None) != (len(image_grids) == 0):
            raise ValueError(
                f"{len(image_grids)} image grids were given {'without' if pixel_values is None else 'with'}"
                " pixel_values"
            )
        embeddings = self.language_model.embedding(input_ids=input_ids, position_ids=None)
        is_image = input_ids == self.hf.image_token_id
        lengths = [time * rows * columns // self.hf.vision.spatial_merge_size**2 for time, rows, columns in image_grids]
        pictures = list(range(len(image_grids))) if pictures is None else pictures
        cells = sum(lengths[picture] for picture in pictures)
        held = int(is_image.sum()) if num_image_tokens is None else num_image_tokens
        if held != cells:
            raise ValueError(f"input_ids holds {held} image tokens, the image grids {list(image_grids)} make {cells}")
        if image_grids:
            assert self.vision_model is not None  # it is the first stage
            if encoded_pictures is not None:
                image_tokens = self.vision_model.merge(encoded_pictures)
            else:
                image_tokens = self.vision_model(pixel_values, list(image_grids))
            of_pictures = image_tokens.split(lengths)
            image_embeddings = torch.cat([of_pictures[picture] for picture in pictures])
            row_first = embeddings.transpose(0, 1).contiguous()
            row_first = row_first.masked_scatter(is_image[..., None], image_embeddings.to(row_first.dtype))
            embeddings = row_first.transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
        if torch.is_grad_enabled() and not embeddings.requires_grad:
            # All that it is made of is frozen, but recomputation wants an input with a gradient.
            embeddings = embeddings.detach().requires_grad_()
        return embeddings

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the state for dist_checkpointing, without the _extra_state entries, which carry something only for
        TransformerEngine's fp8."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {name: value for name, value in state.items() if not name.endswith("_extra_state")}

"""Attention of the decoder: plain causal rows, or one row that holds groups, each a prompt followed by several
responses to it.

In a group every response sees the prompt and itself, never another response: the same numbers as a row per response,
with the prompt computed once (the idea of Prefix Grouper, arXiv 2506.05433). Torch's attention kernels, no score matrix
of [tokens, tokens]: all sequences of a micro-batch in one call where torch has the kernel (model/varlen.py), else one
call per prompt and response.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_papo.model import varlen
from megatron_papo.model.rotary import Rotary


@dataclass
class GroupSegments(PackedSeqParams):
    """Travels through TransformerBlock to the attention of each layer. What follows the last group is padding."""

    groups: list[tuple[int, list[int]]] | None = field(default_factory=list)
    """(prompt length, response lengths) of each group, one after the other in the row; None: the rows are plain."""
    rotary: Rotary | None = None
    """Turns queries and keys; None: they come turned."""
    table: varlen.Table | None = None
    """Of `groups`, once the first layer has made it."""

    def table_for(self, query: Tensor) -> varlen.Table:
        """Return the table for [s, b, heads, d], the same for all layers."""
        if self.table is None:
            assert self.groups is not None  # rows of groups
            self.table = varlen.table_of_groups(self.groups, query.shape[0], query.shape[1], query.device)
        return self.table


class GroupAttention(MegatronModule):
    """[s, b, heads, d], [s, b, kv groups, d] twice -> [s, b, heads * d].

    Without groups: causal attention of right-padded rows; padding comes last, so no real token sees it and no mask is
    needed. megatron-core's own DotProductAttention keeps the whole score matrix.
    """

    def __init__(self, config: TransformerConfig, **_: object):
        super().__init__(config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: GroupSegments | None = None,
        **_: object,
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError("rows are right-padded or in groups: attention_mask must be None")
        segments = GroupSegments(groups=None) if packed_seq_params is None else packed_seq_params
        if segments.rotary is not None:
            query, key = segments.rotary.rotate(query), segments.rotary.rotate(key)
        if segments.groups is not None and varlen.has_kernel(query):
            flat_query, flat_key, flat_value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
            flat = varlen.attend(flat_query, flat_key, flat_value, segments.table_for(query), is_causal=True)
            return flat.flatten(1).unflatten(0, (query.shape[1], query.shape[0])).transpose(0, 1)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # heads first
        if segments.groups is None:
            out = _attend(query, key, value, is_causal=True)
        else:
            out = attend_groups(query, key, value, segments.groups)
        return out.permute(2, 0, 1, 3).flatten(2)


def attend_groups(query: Tensor, key: Tensor, value: Tensor, groups: list[tuple[int, list[int]]]) -> Tensor:
    """Return the attention of a row of groups; zeros on the padding after the last group.

    Args:
        query: [1, heads, s, d].
        key, value: [1, kv groups, s, d].
        groups: as GroupSegments has them.

    Returns [1, heads, s, d].
    """
    lengths = [length for prompt, responses in groups for length in (prompt, *responses)]
    lengths.append(query.shape[2] - sum(lengths))
    # slices would each have a gradient of the whole row
    split = (x.split(lengths, dim=2) for x in (query, key, value))
    pieces: Iterator[tuple[Tensor, ...]] = zip(*split, strict=True)
    outs = []
    for prompt, responses in groups:
        prompt_query, prompt_key, prompt_value = next(pieces)
        outs.append(_attend(prompt_query, prompt_key, prompt_value, is_causal=True))
        for response, mask in zip(responses, lower_right_masks(prompt, responses, query), strict=True):
            own_query, own_key, own_value = next(pieces)
            if response:
                keys, values = torch.cat([prompt_key, own_key], dim=2), torch.cat([prompt_value, own_value], dim=2)
                outs.append(_attend(own_query, keys, values, mask=mask))
    padding, *_ = next(pieces)
    outs.append(torch.zeros_like(padding))
    return torch.cat(outs, dim=2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)


def lower_right_masks(prompt: int, responses: list[int], query: Tensor) -> list[Tensor]:
    """Return for each response the mask [response, prompt + response] of its tokens: they see the prompt and, causally,
    themselves.

    On a GPU it only names what flash attention does by itself. A CPU kernel wants it written out, in query's dtype, or
    it makes and keeps a copy per call; the mask of the longest response holds all others.
    """
    if query.is_cuda:
        return [causal_lower_right(response, prompt + response) for response in responses]
    longest = max(responses, default=0)
    mask = query.new_full((longest, prompt + longest), float("-inf")).triu(prompt + 1)
    return [mask[:response, : prompt + response] for response in responses]

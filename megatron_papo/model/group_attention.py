"""Attention of the decoder: plain causal rows, or one row that holds groups, each a prompt followed by several
responses to it.

In a group every response sees the prompt and itself, never another response: the same numbers as a row per response,
with the prompt computed once (the idea of Prefix Grouper, arXiv 2506.05433). Torch's attention kernels, no score matrix
of [tokens, tokens].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


@dataclass
class GroupSegments(PackedSeqParams):
    """Travels through TransformerBlock to the attention of each layer. What follows the last group is padding."""

    groups: list[tuple[int, list[int]]] = None
    """(prompt length, response lengths) of each group, one after the other in the row."""


class GroupAttention(MegatronModule):
    """[s, b, heads, d], [s, b, kv groups, d] twice -> [s, b, heads * d].

    Without GroupSegments: causal attention of right-padded rows; padding comes last, so no real token sees it and no
    mask is needed. megatron-core's own DotProductAttention keeps the whole score matrix.
    """

    def __init__(self, config: TransformerConfig, **_):
        super().__init__(config)

    def forward(self, query, key, value, attention_mask, *, packed_seq_params: GroupSegments | None = None, **_):
        if attention_mask is not None:
            raise ValueError("rows are right-padded or in groups: attention_mask must be None")
        heads_first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
        if packed_seq_params is None:
            out = _attend(*heads_first, is_causal=True)
        else:
            out = attend_groups(*heads_first, packed_seq_params.groups)
        return out.permute(2, 0, 1, 3).flatten(2)


def attend_groups(query: Tensor, key: Tensor, value: Tensor, groups: list[tuple[int, list[int]]]) -> Tensor:
    """[1, heads, s, d], [1, kv groups, s, d] twice -> [1, heads, s, d]; zeros on the padding after the last group."""
    lengths = [length for prompt, responses in groups for length in (prompt, *responses)]
    lengths.append(query.shape[2] - sum(lengths))
    pieces = zip(
        *(x.split(lengths, dim=2) for x in (query, key, value))
    )  # slices would each have a gradient of the whole row
    outs = []
    for prompt, responses in groups:
        prompt_query, *prompt_keys = next(pieces)
        outs.append(_attend(prompt_query, *prompt_keys, is_causal=True))
        for response, mask in zip(responses, lower_right_masks(prompt, responses, query)):
            own_query, *own_keys = next(pieces)
            if response:
                keys, values = (torch.cat(both, dim=2) for both in zip(prompt_keys, own_keys))
                outs.append(_attend(own_query, keys, values, attn_mask=mask))
    padding, *_ = next(pieces)
    outs.append(torch.zeros_like(padding))
    return torch.cat(outs, dim=2)


def _attend(query, key, value, **mask) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1], **mask)


def lower_right_masks(prompt: int, responses: list[int], query: Tensor) -> list:
    """For each response the attn_mask [response, prompt + response] of its tokens: they see the prompt and, causally,
    themselves.

    On a GPU it only names what flash attention does by itself. A CPU kernel wants it written out, in query's dtype, or
    it makes and keeps a copy per call; the mask of the longest response holds all others.
    """
    if query.is_cuda:
        return [causal_lower_right(response, prompt + response) for response in responses]
    longest = max(responses, default=0)
    mask = query.new_full((longest, prompt + longest), float("-inf")).triu(prompt + 1)
    return [mask[:response, : prompt + response] for response in responses]

"""Rotary embeddings whose cosines and sines are made once per micro-batch, not in each layer for queries and keys.

The same arithmetic in the same dtypes as megatron-core's _apply_rotary_pos_emb_bshd, so the same bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Of the places of a micro-batch, for [s, b, heads, d]."""

    cos: Tensor
    """[s, b, 1, d]"""
    signed_sin: Tensor
    """[s, b, 1, d], its first half negated: rotating swaps the halves of a head and negates what comes first."""

    @classmethod
    def of(cls, angles: Tensor, dtype: torch.dtype) -> "Rotary":
        """Return those of [s, b, 1, d] angles, in the dtype of what they are to rotate."""
        first, second = torch.sin(angles).to(dtype).chunk(2, dim=-1)
        return cls(torch.cos(angles).to(dtype), torch.cat((-first, second), dim=-1))

    def rotate(self, heads: Tensor) -> Tensor:
        """Return queries or keys, turned by the angles of their places."""
        first, second = heads.chunk(2, dim=-1)
        return heads * self.cos + torch.cat((second, first), dim=-1) * self.signed_sin

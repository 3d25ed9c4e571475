"""Each layout is a permutation undone by its inverse, and puts values where a slow loop over heads puts them."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_papo.checkpoint.layouts import LAYOUTS
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig, TextConfig, VisionConfig

TEXT = TextConfig(260, 48, 40, 3, 6, 2, 1e-6, 1e6, (1, 1, 2), 512)
VISION = VisionConfig(3, 24, 20, 3, 48, 3, 14, 2, 2, 112, (1,))
HF = HFConfig(TEXT, VISION, False, 1, 2, 3, 4, (5,))


def numbered(*shape, start=0):
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape)


def inputs(layout, trailing):
    if layout == "query_groups":
        return [numbered(48, *trailing), numbered(16, *trailing, start=10000), numbered(16, *trailing, start=20000)]
    if layout == "gate_up":
        return [numbered(20, *trailing), numbered(20, *trailing, start=10000)]
    if layout == "vision_heads":
        return [numbered(72, *trailing)]
    if layout == "flat_patch":
        return [numbered(24, 3, 2, 14, 14)]
    if layout == "tied_twice":
        return [numbered(20, *trailing), numbered(20, *trailing)]
    return [numbered(20, *trailing)]


@pytest.mark.parametrize("trailing", [(), (7,)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inverse(layout, trailing):
    tensors = inputs(layout, trailing)
    back = LAYOUTS[layout].to_hf(LAYOUTS[layout].to_megatron(tensors, HF), HF)
    assert len(back) == len(tensors) and all(map(torch.equal, back, tensors))


@given(groups=st.integers(1, 4), queries=st.integers(1, 4), head_dim=st.integers(1, 6))
def test_query_groups_for_any_sizes(groups, queries, head_dim):
    heads = groups * queries
    text = dataclasses.replace(TEXT, num_heads=heads, num_kv_groups=groups, hidden_size=heads * head_dim)
    hf = dataclasses.replace(HF, text=text)
    q, k, v = (
        numbered(heads * head_dim, 3),
        numbered(groups * head_dim, 3, start=10000),
        numbered(groups * head_dim, 3, start=20000),
    )
    rows = []
    for group in range(groups):
        for head in range(queries):
            rows += [q[(group * queries + head) * head_dim + row] for row in range(head_dim)]
        rows += [k[group * head_dim + row] for row in range(head_dim)]
        rows += [v[group * head_dim + row] for row in range(head_dim)]
    layout = LAYOUTS["query_groups"]
    assert torch.equal(layout.to_megatron([q, k, v], hf), torch.stack(rows))
    assert all(map(torch.equal, layout.to_hf(torch.stack(rows), hf), (q, k, v)))


def test_vision_heads_against_a_loop():
    fused = numbered(72, 5)
    rows = [fused[part * 24 + head * 8 + row] for head in range(3) for part in range(3) for row in range(8)]
    assert torch.equal(LAYOUTS["vision_heads"].to_megatron([fused], HF), torch.stack(rows))


def test_layouts_are_not_the_identity():
    """With one head or one group a forgotten permutation would pass unseen: here it shows."""
    for layout in ("query_groups", "vision_heads"):
        tensors = inputs(layout, (7,))
        assert not torch.equal(LAYOUTS[layout].to_megatron(tensors, HF), torch.cat(tensors))


def test_a_head_that_is_not_the_embedding_is_refused():
    with pytest.raises(UserError, match="lm_head.weight differs"):
        LAYOUTS["tied_twice"].to_megatron([torch.zeros(3), torch.ones(3)], HF)

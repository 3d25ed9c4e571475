"""Attention in one call per layer: its index tables against a call for each sequence, and the real kernel on a GPU.

torch has the kernel for CUDA only. Without a GPU a loop stands in its place that does what torch's documentation says
of varlen_attn; the kernel itself is compared in test_on_a_gpu (marker gpu).
"""

import pytest
import torch

from megatron_papo.model import varlen
from megatron_papo.model.group_attention import GroupAttention, GroupSegments, attend_groups
from megatron_papo.model.hf_config import VisionConfig
from megatron_papo.model.rotary import Rotary
from megatron_papo.model.vision import geometry

GROUPS = [(5, [3, 0, 7]), (1, [1]), (4, [])]
TOKENS, LENGTH = 5 + 10 + 2 + 4, 24
HEADS, KV, WIDTH = 4, 2, 8


def loop(query, key, value, ends_q, ends_k, max_q, max_k, *, window_size, enable_gqa):
    """torch.nn.attention.varlen.varlen_attn by its documentation, in float64: sequence by sequence, head by head."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    out = torch.zeros_like(query)
    ends_q, ends_k = ends_q.tolist(), ends_k.tolist()
    assert ends_q[-1] == len(query) and ends_k[-1] == len(key)
    shared = query.shape[1] // key.shape[1]
    for place in range(len(ends_q) - 1):
        rows, columns = slice(*ends_q[place : place + 2]), slice(*ends_k[place : place + 2])
        count, seen = rows.stop - rows.start, columns.stop - columns.start
        assert 0 < count <= max_q and 0 < seen <= max_k
        for head in range(query.shape[1]):
            scores = query[rows, head] @ key[columns, head // shared].T / query.shape[2] ** 0.5
            if window_size == (-1, 0):  # the last query sees the last key
                after = torch.arange(seen)[None] > torch.arange(count)[:, None] + seen - count
                scores = scores.masked_fill(after, float("-inf"))
            out[rows, head] = scores.softmax(dim=-1) @ value[columns, head // shared]
    return out


@pytest.fixture
def calls(monkeypatch):
    """The loop in the kernel's place, which then takes CPU tensors; how often it was called."""
    made = []

    def counted(*args, **kwargs):
        made.append(kwargs)
        return loop(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(varlen, "has_kernel", lambda query: True)
    return made


def random_heads(rows, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    return [
        torch.randn(LENGTH, rows, heads, WIDTH, dtype=dtype, device=device, requires_grad=True)
        for heads in (HEADS, KV, KV)
    ]


def of_layer(attention, query, key, value, groups=GROUPS):
    return attention(query, key, value, None, packed_seq_params=GroupSegments(qkv_format="sbhd", groups=groups))


@pytest.fixture
def attention():
    layer = GroupAttention.__new__(GroupAttention)
    torch.nn.Module.__init__(layer)
    return layer


def by_sdpa(query, key, value, groups=GROUPS):
    """Each prompt and response by itself, through torch's SDPA."""
    rows = []
    for row in range(query.shape[1]):
        heads_first = [x[:, row : row + 1].permute(1, 2, 0, 3) for x in (query, key, value)]
        rows.append(attend_groups(*heads_first, groups).permute(2, 0, 1, 3).flatten(2))
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("rows", [1, 2])  # two: with twins
def test_one_call_equals_a_call_for_each(attention, calls, rows):
    """Values and gradients; float64 leaves rounding at 1e-15."""
    heads = random_heads(rows)
    weights = torch.randn(LENGTH, rows, HEADS * WIDTH, dtype=torch.float64)
    weights[TOKENS:] = 0  # nobody looks at padding
    ours = of_layer(attention, *heads)
    assert len(calls) == 1 and calls[0]["window_size"] == (-1, 0)
    gradients = torch.autograd.grad((ours * weights).sum(), heads)
    expected = by_sdpa(*heads)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), heads)
    assert torch.allclose(ours[:TOKENS], expected[:TOKENS], rtol=0, atol=1e-12)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, other, rtol=0, atol=1e-12)
    assert torch.isfinite(ours).all()  # padding, too: NaN would survive a product with zero

    moved = of_layer(attention, *heads, groups=[(5, [4, 6]), *GROUPS[1:]])
    assert (moved[:TOKENS] - expected[:TOKENS]).abs().max() > 1e-3  # the control: another cut is noticed


def test_tables_are_made_once_for_all_layers(attention, calls):
    heads, segments = random_heads(1), GroupSegments(qkv_format="sbhd", groups=GROUPS)
    attention(*heads, None, packed_seq_params=segments)
    first = segments.table
    attention(*heads, None, packed_seq_params=segments)
    assert segments.table is first and len(calls) == 2


def test_windows_and_pictures_in_one_call_each(calls):
    vision = VisionConfig(
        depth=2, hidden_size=32, num_heads=HEADS, intermediate_size=44, patch_size=14, spatial_merge_size=2,
        window_size=112, full_attention_layers=(1,), out_hidden_size=32, in_channels=3, temporal_patch_size=2,
    )  # fmt: skip
    places = geometry(vision, [(1, 10, 12), (1, 6, 4), (1, 10, 12)])
    torch.manual_seed(1)
    heads = [torch.randn(120 + 24 + 120, HEADS, WIDTH, dtype=torch.float64) for _ in range(3)]
    for segments, kinds in ((places.windows, 4), (places.pictures, 2)):
        ready = segments.on(torch.device("cpu"))
        assert len(ready.counts) >= kinds
        together = ready.attend(*heads)
        assert len(calls) == 1 and calls.pop()["window_size"] == (-1, -1)
        apart = segments_by_length(segments, heads)
        assert torch.allclose(together, apart, rtol=0, atol=1e-12)
    assert not torch.allclose(places.windows.on(torch.device("cpu")).attend(*heads), apart)  # the control


def segments_by_length(segments, heads):
    """The same cut through torch's SDPA, a segment at a time."""
    order = torch.arange(len(heads[0])) if segments.order is None else segments.order
    out, start = torch.zeros_like(heads[0]), 0
    for count, length in segments.counts:
        for _ in range(count):
            own = order[start : start + length]
            query, key, value = (x[own].transpose(0, 1) for x in heads)
            attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            out[own] = attended.transpose(0, 1)
            start += length
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_has_megatron_cores_bits(dtype):
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    torch.manual_seed(2)
    heads = torch.randn(LENGTH, 2, HEADS, WIDTH, dtype=dtype, requires_grad=True)
    angles = torch.randn(LENGTH, 2, 1, WIDTH) * 100
    ours, theirs = Rotary.of(angles, dtype).rotate(heads), _apply_rotary_pos_emb_bshd(heads, angles)
    weights = torch.randn_like(ours)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad((out * weights).sum(), heads)[0] for out in (ours, theirs)))
    assert not torch.equal(Rotary.of(-angles, dtype).rotate(heads), theirs)  # the control


def test_on_a_gpu(attention):
    """The real kernel in bfloat16 against SDPA in float32: roundings of 2^-9 of values below 4."""
    width = 64
    torch.manual_seed(0)
    heads = [torch.randn(LENGTH, 1, count, width, device="cuda", dtype=torch.bfloat16) for count in (HEADS, KV, KV)]
    for tensor in heads:
        tensor.requires_grad_()
    exact = [tensor.detach().cpu().float().requires_grad_() for tensor in heads]
    ours, expected = of_layer(attention, *heads), by_sdpa(*exact)
    assert (ours[:TOKENS].cpu().float() - expected[:TOKENS]).abs().max() < 0.03
    ours[:TOKENS].float().sum().backward()
    expected[:TOKENS].sum().backward()
    for tensor, other in zip(heads, exact, strict=True):
        assert (tensor.grad.cpu().float() - other.grad).abs().max() < 0.06

"""What the CPU launcher brings along itself: batch-invariant products, the hash of seeded sampling, the command
line."""

import pytest
import torch

from megatron_papo.sglang.cpu_launcher import _arguments, _tiled_addmm, log_softmax, murmur_hash32, tiled_mm

SHAPES = [(64, 128), (192, 64), (64, 448), (1176, 64), (80, 37)]


def rows_that_change(product, inner, outer):
    """How many elements of a @ b differ when the rows are multiplied in batches of other sizes."""
    generator = torch.Generator().manual_seed(inner)
    a, b = (torch.randn(size, generator=generator) for size in ((300, inner), (outer, inner)))
    whole, changed = product(a, b.t()), 0
    for size in (1, 2, 3, 8, 17, 31, 33, 64, 299):
        for start in range(0, 300 - size + 1, 13):
            changed += (product(a[start : start + size].clone(), b.t()) != whole[start : start + size]).sum().item()
    return changed


def test_rows_do_not_depend_on_the_batch():
    torch.set_num_threads(1)
    assert [rows_that_change(tiled_mm, *shape) for shape in SHAPES] == [0] * len(SHAPES)
    assert sum(rows_that_change(torch.mm, *shape) for shape in SHAPES) > 0  # control: BLAS alone does not give this


@pytest.mark.parametrize("rows", [1, 32, 45])
def test_tiled_products_are_products(rows):
    generator = torch.Generator().manual_seed(rows)
    a, b, bias = (torch.randn(size, generator=generator) for size in ((rows, 24), (24, 10), (10,)))
    exact = a.double() @ b.double()
    # float32 sums of 24 products of size 1
    assert (tiled_mm(a, b) - exact).abs().max() < 1e-5
    assert (_tiled_addmm(bias, a, b, beta=0.5, alpha=2.0) - (0.5 * bias + 2.0 * exact)).abs().max() < 2e-5


def test_log_probs_of_a_long_row_are_exact_and_do_not_depend_on_the_batch():
    """Qwen's vocabulary; float32 holds log-probs of size 16 to 1e-6. Control: torch's own are several times worse."""
    torch.set_num_threads(1)
    logits = 3 * torch.randn(6, 151936, generator=torch.Generator().manual_seed(1))
    exact = torch.log_softmax(logits.double(), -1)
    found = log_softmax(logits, -1)
    assert (found - exact).abs().max() < 3e-6 and (found - exact).mean().abs() < 3e-7
    assert (torch.log_softmax(logits, -1) - exact).abs().max() > 6e-6  # 9e-6 with AVX-512, more with AVX2
    assert all(torch.equal(log_softmax(logits[row : row + 1], -1), found[row : row + 1]) for row in range(6))
    assert torch.equal(log_softmax(logits[:, :448], -1), torch.log_softmax(logits[:, :448], -1))
    assert log_softmax(logits.bfloat16(), -1).dtype == torch.bfloat16


def murmur3(words: list[int]) -> int:
    """MurmurHash3_x86_32 of 32-bit words with seed 0, by its public definition in plain integers."""

    def rotate(x, by):
        return ((x << by) | (x >> (32 - by))) & 0xFFFFFFFF

    state = 0
    for word in words:
        state ^= rotate(word * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF
        state = (rotate(state, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    state ^= 4 * len(words)
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        state = (state ^ (state >> shift)) * multiplier & 0xFFFFFFFF
    return state ^ (state >> 16)


def test_murmur_hash_equals_its_definition():
    seeds, positions, columns = [0, 42, 2**63 - 1, 2**40 + 7], [0, 1, 4095, 77], [0, 1, 151935]
    found = murmur_hash32(torch.tensor(seeds, dtype=torch.uint64), torch.tensor(positions), torch.tensor(columns))
    expected = [[murmur3([s & 0xFFFFFFFF, s >> 32, p, c]) for c in columns] for s, p in zip(seeds, positions)]
    assert found.to(torch.int64).tolist() == expected


def test_defaults_yield_to_the_command_line():
    plain = _arguments(["--model-path", "m"])
    assert plain[plain.index("--dtype") + 1] == "float32" and "--sleep-on-idle" in plain
    changed = _arguments(["--dtype=bfloat16", "--max-total-tokens", "9", "--without=sleep-on-idle"])
    assert "--dtype" not in changed and changed.count("--max-total-tokens") == 1 and "--sleep-on-idle" not in changed
    assert "--enable-deterministic-inference" in changed and not any(a.startswith("--without") for a in changed)

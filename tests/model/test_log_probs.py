"""Log-probs, entropy and exact KL from (sharded) logits against torch's own log_softmax in float64, values and
gradients."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_papo.distributed import process_groups
from megatron_papo.model.log_probs import CHUNK_ELEMENTS, LOG_RATIO_LIMIT, output_token_statistics, token_statistics

ROOT = Path(__file__).parent.parent.parent
TEMPERATURE = 0.7


def example(rows=9, vocabulary=24, spread=2.0, seed=0):
    """-> logits [rows, V], positions [2N] with a row used twice, tokens [2N]: the same tokens in both halves."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, vocabulary, generator=generator)
    half = (rows - 1) // 2
    positions = torch.cat([torch.arange(half), torch.tensor([0]), torch.arange(half, 2 * half), torch.tensor([half])])
    tokens = torch.randint(vocabulary, (half + 1,), generator=generator).repeat(2)
    return logits, positions, tokens


def textbook(logits, positions, tokens, weights):
    """-> (log-probs, entropy, KL of the halves) and the gradient of their weighted sum, in float64."""
    logits = logits.double().requires_grad_()
    log_p = torch.log_softmax(logits[positions] / TEMPERATURE, -1)
    p = log_p.exp()
    safe = torch.where(p > 0, log_p, 0.0)  # 0 log 0 = 0
    first, second = log_p.chunk(2)
    difference = torch.where(first.exp() > 0, (first - second).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), 0.0)
    values = log_p.gather(-1, tokens[:, None])[:, 0], -(p * safe).sum(-1), (first.exp() * difference).sum(-1)
    sum((w * v).sum() for w, v in zip(weights, values)).backward()
    return [v.detach() for v in values], logits.grad


def ours(logits, positions, tokens, weights, group, second_half_gradient=True):
    logits = logits.clone().requires_grad_()
    found = token_statistics(
        logits,
        positions,
        tokens,
        group,
        temperature=TEMPERATURE,
        kl_of_halves=True,
        second_half_gradient=second_half_gradient,
    )
    values = found.log_probs, found.entropy, found.kl
    sum((w * v).sum() for w, v in zip(weights, values)).backward()
    return [v.detach() for v in values], logits.grad


def weights_of(positions, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for n in (len(positions), len(positions), len(positions) // 2)]


@pytest.fixture(scope="module")
def world():
    process_groups.connect()
    return torch.distributed.group.WORLD


@pytest.mark.parametrize(
    "keep", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["all", "log-probs", "entropy", "KL"]
)
def test_equals_torch(world, keep):
    logits, positions, tokens = example()
    weights = [k * w for k, w in zip(keep, weights_of(positions))]
    (values, gradient), (expected, expected_gradient) = (
        ours(logits, positions, tokens, weights, world),
        textbook(logits, positions, tokens, weights),
    )
    for value, other in zip(values, expected):
        torch.testing.assert_close(value.double(), other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)
    assert gradient.abs().max() > 0.01
    shifted = textbook(logits, positions, (tokens + 1) % logits.shape[1], weights)  # negative control: other tokens
    if keep[0]:
        assert not torch.allclose(gradient.double(), shifted[1], atol=1e-2)


def test_unused_outputs_cost_no_gradient(world):
    """Only the log-probs are used, as in training without entropy and exact KL."""
    logits, positions, tokens = example()
    leaf = logits.clone().requires_grad_()
    token_statistics(leaf, positions, tokens, world, temperature=TEMPERATURE).log_probs.sum().backward()
    expected = textbook(logits, positions, tokens, [torch.ones(len(positions)), 0 * positions, 0 * positions[::2]])[1]
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_second_half_as_constants(world):
    logits, positions, tokens = example()
    positions = torch.cat([torch.arange(4), torch.arange(4, 8)])
    tokens = tokens[:4].repeat(2)
    weights = [torch.cat([w[:4], torch.zeros(4)]) if len(w) == 8 else w for w in weights_of(positions)]
    whole, half = (ours(logits, positions, tokens, weights, world, flag)[1] for flag in (True, False))
    torch.testing.assert_close(whole[:4], half[:4])
    assert not half[4:].any() and whole[4:8].abs().max() > 1e-3


def test_many_chunks(world):
    """More logits than one chunk holds, a vocabulary that divides nothing."""
    logits, positions, tokens = example(rows=401, vocabulary=15013)
    assert len(positions) * logits.shape[1] > CHUNK_ELEMENTS
    weights = weights_of(positions)
    (values, gradient), (expected, expected_gradient) = (
        ours(logits, positions, tokens, weights, world),
        textbook(logits, positions, tokens, weights),
    )
    for value, other in zip(values, expected):
        torch.testing.assert_close(value.double(), other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


def test_bfloat16_logits_are_summed_in_fp32(world):
    logits, positions, tokens = example(vocabulary=5000)
    logits = logits.bfloat16()
    weights = weights_of(positions)
    (values, gradient), (expected, expected_gradient) = (
        ours(logits, positions, tokens, weights, world),
        textbook(logits, positions, tokens, weights),
    )
    for value, other in zip(values, expected):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), other, rtol=1e-5, atol=1e-5)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=2**-7, atol=2e-4
    )  # bfloat16, one row added up twice
    assert (
        torch.log_softmax(logits[positions] / TEMPERATURE, -1).gather(-1, tokens[:, None])[:, 0].double() - expected[0]
    ).abs().max() > 1e-3


FORBIDDEN = (3, 17, 23)


def over_allowed_tokens(logits, positions, tokens, group):
    """-> log-probs and entropy over the tokens that are not FORBIDDEN."""
    found = token_statistics(logits, positions, tokens, group, temperature=TEMPERATURE, forbidden=FORBIDDEN)
    return found.allowed_log_probs, found.allowed_entropy


def test_statistics_over_the_allowed_tokens(world):
    """As if the logits of the forbidden tokens were -inf; the others are said beside them, unchanged."""
    logits, positions, tokens = example()
    logits[0, 3] = 200.0  # the policy wants a forbidden token and nothing else
    tokens[2] = tokens[7] = 17
    allowed = logits.clone()
    allowed[:, FORBIDDEN] = -torch.inf
    weights = weights_of(positions)
    (log_probs, entropy, _), _ = textbook(allowed, positions, tokens, weights)
    found = over_allowed_tokens(logits, positions, tokens, world)
    assert log_probs[2] == found[0][2] == -torch.inf
    torch.testing.assert_close(found[0].double(), log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), entropy, rtol=1e-5, atol=1e-5)
    plain = token_statistics(logits, positions, tokens, world, temperature=TEMPERATURE)
    assert plain.allowed_log_probs is None and (found[0] - plain.log_probs)[0] > 50  # control: they are others
    both = token_statistics(logits, positions, tokens, world, temperature=TEMPERATURE, forbidden=FORBIDDEN)
    assert both.log_probs.equal(plain.log_probs) and both.entropy.equal(plain.entropy)


def test_the_output_layer_in_chunks_forbids_the_same(world):
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(11, 6, generator=generator), torch.randn(24, 6, generator=generator)
    tokens = torch.randint(24, (11,), generator=generator)
    whole, chunks = (
        output_token_statistics(hidden, weight, tokens, world, forbidden=FORBIDDEN, chunk_elements=size)
        for size in (1 << 20, 48)
    )
    for name in ("log_probs", "entropy", "allowed_log_probs", "allowed_entropy"):
        torch.testing.assert_close(getattr(chunks, name), getattr(whole, name))
    assert not whole.allowed_entropy.allclose(whole.entropy)


@pytest.mark.parametrize("where", ["both", "first", "second"])
def test_forbidden_tokens(world, where):
    """-inf logits: in both branches as an allow-list makes them, or in one alone, where the textbook KL is infinite."""
    logits, positions, tokens = example()
    positions, tokens = torch.arange(8), torch.tensor([0, 1, 2, 3] * 2)
    rows = {"both": slice(0, 8), "first": slice(0, 4), "second": slice(4, 8)}[where]
    logits[rows, 10:] = -torch.inf
    weights = weights_of(positions)
    (values, gradient), (expected, expected_gradient) = (
        ours(logits, positions, tokens, weights, world),
        textbook(logits, positions, tokens, weights),
    )
    for value, other in zip(values, expected):
        torch.testing.assert_close(value.double(), other, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(gradient).all() and not gradient[rows, 10:].any()
    if where != "second":  # there the float64 reference has nan, its clamped log-ratio being inf
        torch.testing.assert_close(gradient.double(), expected_gradient.nan_to_num(), rtol=1e-5, atol=1e-5)
    elif where == "second":
        assert values[2].min() > 1 and values[2].max() <= LOG_RATIO_LIMIT


def test_a_forbidden_token_that_was_sampled(world):
    logits = torch.zeros(2, 6)
    logits[:, 2] = -torch.inf
    leaf = logits.requires_grad_()
    found = token_statistics(leaf, torch.tensor([0, 1]), torch.tensor([2, 3]), world)
    assert found.log_probs[0] == -torch.inf and found.log_probs[1].item() == pytest.approx(-math.log(5))
    torch.where(torch.isfinite(found.log_probs), found.log_probs, 0.0).sum().backward()
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize(
    "chunk_elements", [1 << 27, 24 * 2, 24 * 6, 24 * 8], ids=["one chunk", "pairs", "three pairs", "uneven"]
)
def test_through_the_output_layer(world, chunk_elements):
    """hidden x weight in chunks that are computed again in the backward pass: the values and gradients of whole
    logits."""
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(20, 16, generator=generator), torch.randn(24, 16, generator=generator) / 3
    tokens = torch.randint(24, (10,), generator=generator).repeat(2)
    weights = [torch.randn(n, generator=generator) for n in (20, 20, 10)]
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = output_token_statistics(
        a, b, tokens, world, temperature=TEMPERATURE, kl_of_halves=True, chunk_elements=chunk_elements
    )
    sum((w * v).sum() for w, v in zip(weights, found)).backward()
    c, d = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = c @ d.T
    values, gradient = textbook(logits.detach(), torch.arange(20), tokens, weights)
    logits.backward(gradient)
    for value, other in zip(found, values):
        torch.testing.assert_close(value.detach().double(), other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.grad.double(), c.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.grad.double(), d.grad, rtol=1e-5, atol=1e-5)
    constant = hidden.clone().requires_grad_()
    kl = output_token_statistics(
        constant,
        weight,
        tokens,
        world,
        temperature=TEMPERATURE,
        kl_of_halves=True,
        second_half_gradient=False,
        chunk_elements=chunk_elements,
    ).kl
    kl.sum().backward()
    assert constant.grad[:10].any() and not constant.grad[10:].any()


def test_sharded_over_ranks(tmp_path):
    """Four processes: groups of 2 and of 4 give the values and the gradient of one; one shard may hold nothing but
    forbidden tokens."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        str(ROOT / "tests/workers/sharded_logits.py"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-4000:]
    for forbidden in (False, True):
        logits, positions, tokens = example(seed=7)
        if forbidden:
            logits[:, 12:18] = -torch.inf
            tokens = tokens % 12
        weights = weights_of(positions)
        expected, expected_gradient = textbook(logits, positions, tokens, weights)
        for size in (2, 4):
            parts = [torch.load(tmp_path / f"{size}_{forbidden}_{rank}.pt", weights_only=True) for rank in range(size)]
            for values, _ in parts:
                for value, other, first in zip(values, expected, parts[0][0]):
                    torch.testing.assert_close(value.double(), other, rtol=1e-5, atol=1e-6)
                    assert torch.equal(value, first)  # the same bits on every rank
            whole = torch.cat([gradient for _, gradient in parts], dim=1)
            torch.testing.assert_close(whole.double(), expected_gradient.nan_to_num(), rtol=1e-5, atol=1e-6)
            allowed_logits = logits.clone()
            allowed_logits[:, FORBIDDEN] = -torch.inf
            allowed, _ = textbook(allowed_logits, positions, tokens, weights)
            for rank in range(size):
                log_probs, entropy = torch.load(tmp_path / f"allowed_{size}_{forbidden}_{rank}.pt", weights_only=True)
                torch.testing.assert_close(log_probs.double(), allowed[0], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(entropy.double(), allowed[1], rtol=1e-5, atol=1e-6)

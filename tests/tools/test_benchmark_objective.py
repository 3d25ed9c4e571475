"""The benchmark of the objective: what it measures is what it says. Its times are not judged here."""

import json

import pytest
import torch

from megatron_papo.distributed import process_groups
from megatron_papo.model.log_probs import token_statistics
from tests.helpers import run_module
from tools.benchmark import objective
from tools.benchmark.measure import peak_bytes, seconds_in_turns
from tools.benchmark.objective import KINDS, demo_config, objective_alone, textbook_statistics


@pytest.fixture(scope="module")
def report():
    done = run_module("tools.benchmark.objective", "--quick", "--tokens", 48, "--threads", 2)
    assert done.returncode == 0, done.stderr
    assert "upper bound" in done.stdout and "demo: k3_cached" in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["k3_cached", "exact_with_gradient"])
def test_demo(report, kind):
    demo = report["demo"][kind]
    assert demo["rollouts"] == 64
    assert 0 < demo["objective_share"] < 1 and demo["objective_share"] == pytest.approx(
        demo["objective_seconds"] / demo["step_seconds"]
    )
    assert demo["logits_shape"][1] == 448
    assert demo["objective_loss"] == pytest.approx(demo["step_loss"], rel=1e-6)  # the step's own objective


def test_the_kinds_are_two_objectives(report):
    k3, exact = (report["demo"][kind] for kind in KINDS)
    assert exact["logits_shape"][0] == 2 * k3["logits_shape"][0]  # the twins
    assert abs(exact["step_loss"] - k3["step_loss"]) > 1e-3 * abs(k3["step_loss"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["k3_cached", "exact_with_gradient"])
def test_large_vocabulary(report, kind, dtype):
    large = report["vocabulary_151936"]
    assert (large["tokens"], large["vocabulary"], large["layers"]) == (48, 151936, 36)
    model, row = large[dtype], large[dtype][kind]
    rest = 36 * model["layer_seconds"] + model["output_layer_seconds"]
    assert model["step_seconds_without_objective"] == pytest.approx(rest)
    assert 0 < row["objective_share"] < 1
    assert row["objective_share"] == pytest.approx(row["objective_seconds"] / (rest + row["objective_seconds"]))
    assert row["textbook_time_ratio"] == pytest.approx(row["textbook_seconds"] / row["objective_seconds"])
    # the gradient alone is 1; the textbook holds log-softmax, its gradient and the logits' gradient at once, in fp32
    assert 1.0 < row["peak_bytes_over_logits_bytes"] < row["textbook_peak_bytes_over_logits_bytes"]
    if (
        report["device"] == "CPU"
    ):  # a few chunks of 3 rows of the 48 beside the gradient; GPU-sized chunks, 27 rows, would be over
        assert row["peak_bytes_over_logits_bytes"] < (2.5 if kind == "exact_with_gradient" else 1.3)
    assert row["textbook_peak_bytes_over_logits_bytes"] >= 3.0 * (2 if dtype == "bfloat16" else 1)


def test_options_reach_the_measurement(report):
    assert report["threads"] == 2 and report["repeat"] == 1  # 1 without --threads; 48 tokens above, 64 without --tokens
    calls = []
    seconds = seconds_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeat=3)
    assert "".join(calls) == "abababab" and set(seconds) == {"a", "b"}  # in turns, the first does not count


def test_peak_of_known_allocations():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.ones(1 << 20, device=device)  # 4 MiB that must not count

    def one_after_the_other():
        for _ in range(3):
            negative = before.neg()
            del negative

    def together():
        return [before.neg() for _ in range(3)]

    assert peak_bytes(one_after_the_other) == 4 << 20
    assert peak_bytes(together) == 12 << 20


@pytest.fixture(scope="module")
def layout():
    process_groups.initialize(demo_config([]).parallel)
    yield
    process_groups.destroy()


@pytest.mark.parametrize("kind", ["k3_cached", "exact_with_gradient"])
def test_the_textbook_computes_the_same(layout, kind):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(10, 57, generator=generator).to(process_groups.device()).requires_grad_()
    gradients = []
    for how in (token_statistics, textbook_statistics):
        objective_alone(kind, logits, how)()
        gradients.append(logits.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    other = next(name for name in KINDS if name != kind)
    objective_alone(other, logits, textbook_statistics)()
    assert not torch.allclose(logits.grad, gradients[0], rtol=1e-2)  # negative control: the other objective


@pytest.mark.parametrize("wrong", [["--tokens", 3], ["--repeat", 0], ["--threads", -1]])
def test_mistakes(wrong):
    done = run_module("tools.benchmark.objective", *wrong)
    assert done.returncode == 2 and wrong[0] in done.stderr and done.stdout == ""
    assert objective.__doc__.split("\n")[0] in run_module("tools.benchmark.objective", "--help").stdout

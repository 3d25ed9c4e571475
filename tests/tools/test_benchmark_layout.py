"""tools.benchmark.layout, small: the last line is the report, the gradients agree, and so do the token counts."""

import json

import pytest

from tests.helpers import run_module

KEYS = {
    "seconds_plain", "seconds_group", "seconds_pictures", "ratio", "token_ratio", "padded_token_ratio", "flops_ratio",
    "peak_bytes_plain", "peak_bytes_group", "max_abs_gradient_difference",
}  # fmt: skip


@pytest.mark.parametrize("layout", [[], ["--tp", "2", "--pp", "2"]], ids=["one process", "TP2 x PP2"])
def test_report(layout):
    sizes = [
        "--group-size",
        "3",
        "--prompt-tokens",
        "60",
        "--response-tokens",
        "10",
        "--groups",
        "2",
        "--hidden",
        "64",
        "--repeat",
        "1",
    ]
    result = run_module("tools.benchmark.layout", *sizes, *layout)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert KEYS <= found.keys()
    assert found["tokens_plain"] == 2 * 3 * 60 + found["tokens_group"] - 2 * 60
    assert found["tokens_plain_padded"] > found["tokens_plain"]  # no group's responses are all of one length
    assert found["padded_token_ratio"] == pytest.approx(found["tokens_plain_padded"] / found["tokens_group"])
    assert found["token_ratio"] == pytest.approx(found["tokens_plain"] / found["tokens_group"])
    assert (
        1 < found["flops_ratio"] < found["token_ratio"]
    )  # the vision tower is the same in both, and attention gains less
    assert found["ratio"] == pytest.approx(found["seconds_plain"] / found["seconds_group"])
    assert 0 < found["max_abs_gradient_difference"] < 1e-5 * found["max_abs_gradient"]
    assert found["peak_bytes_group"] < found["peak_bytes_plain"]


def test_one_more_view_is_one_more_prompt():
    """In the group layout a view adds the prompt and its responses once per group; in the plain one per rollout."""
    sizes = ["--group-size", "3", "--prompt-tokens", "60", "--response-tokens", "10", "--hidden", "64", "--repeat", "1"]
    result = run_module("tools.benchmark.layout", *sizes, "--views", "1,2,3")
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    for number in (1, 2, 3):
        for layout in ("plain", "group"):
            assert found[f"tokens_{layout}_{number}"] == number * found[f"tokens_{layout}_1"]
        assert 0 < found[f"gradient_difference_{number}"] < 1e-4
    assert found["tokens_plain_3"] - found["tokens_group_3"] == 3 * 2 * (3 - 1) * 60
    assert found["peak_bytes_group_3"] > found["peak_bytes_group_2"] > found["peak_bytes_group_1"]
    refused = run_module("tools.benchmark.layout", "--views", "4")
    assert refused.returncode == 2 and "expected some of 1, 2 and 3" in refused.stderr

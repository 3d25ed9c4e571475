"""tools.benchmark.vision, small: the last line is the report, both towers make the same tokens and gradients, and their
sizes are known."""

import json

import pytest

from tests.helpers import run_module


def test_report():
    result = run_module(
        "tools.benchmark.vision", "--pictures", "1", "3", "--side", "6", "--heads", "2", "--depth", "2", "--repeat", "1"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert list(found["pictures"]) == ["1", "3"] and found["tp"] == 2
    for row in found["pictures"].values():
        assert row["ratio"] == pytest.approx(row["seconds_sharded"] / row["seconds_spread"])
        assert row["processor_ratio"] == pytest.approx(
            row["processor_seconds_sharded"] / row["processor_seconds_spread"]
        )
        assert row["max_abs_token_difference"] < 1e-5 * row["max_abs_token"]
        assert row["relative_gradient_norm_difference"] < 1e-5
    width, ffn, cell, out = 160, 426, 4 * 160, 256
    layer = 2 * width + 3 * width * (width + 1) + width * (width + 1) + 2 * ffn * (width + 1) + width * (ffn + 1)
    assert found["parameters_spread"] == 1176 * width + 2 * layer + width + cell * (cell + 1) + out * (cell + 1)
    assert 0.5 * found["parameters_spread"] < found["parameters_sharded"] < 0.7 * found["parameters_spread"]

"""tools.benchmark.attention, small: three attentions of a group agree, a wrong one is seen, the last line is the
report."""

import json

import pytest
import torch

from tests.helpers import run_module
from tools.benchmark.attention import TOLERANCE, differences, ours, plain, plain_places, prefix_grouper

pytest.importorskip(
    "prefix_grouper", reason="the package compared with is not installed: pip install -r requirements-test.txt"
)

SIZES = [
    "--group-sizes",
    "2",
    "3",
    "--prompt-tokens",
    "23",
    "--response-tokens",
    "9",
    "--head-dim",
    "8",
    "--repeat",
    "1",
]


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_report(kv_heads):
    done = run_module("tools.benchmark.attention", *SIZES, "--kv-heads", kv_heads)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["prompt_tokens"], report["kv_heads"], report["dtype"]) == (23, kv_heads, "float32")
    assert [case["group_size"] for case in report["cases"]] == [2, 2, 3, 3]
    for case, one_length in zip(report["cases"], [False, True, False, True]):
        assert (len(set(case["response_tokens"])) == 1) == one_length
        for kind in ("output", "gradient"):
            found = case[f"max_abs_{kind}_difference"]
            assert found.keys() == {"ours - prefix_grouper", "ours - plain", "prefix_grouper - plain"}
            assert max(found.values()) <= TOLERANCE["float32"] * case[f"max_abs_{kind}"]
        for other in ("prefix_grouper", "plain"):
            assert case[f"time_{other}_over_ours"] == pytest.approx(case["seconds"][other] / case["seconds"]["ours"])
            assert case[f"memory_{other}_over_ours"] == pytest.approx(
                case["peak_bytes"][other] / case["peak_bytes"]["ours"]
            )


def test_a_wrong_attention_is_seen():
    """The package against ours on the same group, then against ours with the responses' lengths exchanged."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(7 + 8, 1, heads, 16, generator=generator) for heads in (4, 2, 2))
    attentions = {
        "right": ours(7, [3, 5], 4, 16),
        "wrong": ours(7, [5, 3], 4, 16),
        "package": prefix_grouper(7, [3, 5], "cpu"),
    }
    found = differences({name: [attention(query, key, value)] for name, attention in attentions.items()})
    assert found["right - package"] < 1e-6 and found["wrong - package"] > 1e-2


def test_plain_rows_are_what_they_stand_for():
    """A response next to its prompt only: torch's causal attention of that row, without padding, is `plain`'s row."""
    assert plain_places(2, [3, 1]).tolist() == [[0, 1, 2, 3, 4], [0, 1, 5, -1, -1]]
    row = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(1))
    padded, alone = row[:, :, plain_places(2, [3, 1])[1].clamp(min=0)], row[:, :, [0, 1, 5]]
    torch.testing.assert_close(plain(padded, padded, padded)[:, :3], plain(alone, alone, alone))


def test_missing_package(tmp_path):
    (tmp_path / "prefix_grouper.py").write_text("raise ImportError")
    done = run_module("tools.benchmark.attention", *SIZES, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and done.stdout == ""
    assert "pip install --no-deps prefix-grouper" in done.stderr.splitlines()[-1]

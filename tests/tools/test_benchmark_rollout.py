"""tools.benchmark.rollout on the real server; tools.plot.parity."""

import json

import pytest

from tests.helpers import run_module


def test_benchmark(server, client, checkpoints):
    """A small one: that it drives both, counts right and ends in JSON. No number of tokens per second is asserted on a
    shared machine."""
    sizes = ["--prompts", 3, "--group-size", 4, "--tokens", 8, "--concurrency", 5, "--rounds", 1]
    command = ["--server", server.url, "--hf", checkpoints.first, *sizes]
    result = run_module("tools.benchmark.rollout", *command, env={"SGLANG_API_KEY": server.api_key})
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["tokens"] == 3 * 4 * 8 and answer["samples"] == 12
    assert answer["tokens_per_second"] > 0 and answer["raw_tokens_per_second"] > 0
    assert answer["overhead"] == pytest.approx(
        1 - answer["tokens_per_second"] / answer["raw_tokens_per_second"], abs=1e-3
    )
    missing = run_module("tools.benchmark.rollout", "--server", server.url)
    assert missing.returncode == 2 and "--hf" in missing.stderr


def test_plot(tmp_path):
    from PIL import Image

    empty = run_module("tools.plot.parity", "--run", tmp_path)
    assert empty.returncode == 2 and "metrics.jsonl" in empty.stderr
    for iteration in (1, 2, 3):
        directory = tmp_path / "iterations" / f"{iteration:04d}" / "megatron"
        directory.mkdir(parents=True)
        lines = [
            {"step": 2 * iteration + step, "rollout_log_prob_difference_mean": 1e-3 * iteration * (1 + step)}
            for step in (0, 1)
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run_module("tools.plot.parity", "--run", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "3 iterations" in result.stdout and "of the last one: 0.003 nats" in result.stdout
    with Image.open(tmp_path / "parity.png") as picture:
        assert picture.width > 400 and len(picture.convert("RGB").getcolors(1 << 24)) > 10

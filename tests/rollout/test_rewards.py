"""The published reward: golden values of the authors' code, and model text that is out to hang or crash the grader."""

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_papo.config import RewardConfig
from megatron_papo.rollout.rewards import Grader, format_reward, strip_tag_spaces
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "golden" / "rewards.json"
# An integer power that sympy evaluates; mathruler's own guard knows only the spelling with ^.
HANGS = "<think>a</think>\\boxed{9**9**9**9}"
HANGS_ON = "\\frac{x}{2}"


def check(file: Path):
    command = [sys.executable, "-m", "tools.check_rewards", str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_golden_rewards_through_the_tool():
    result = check(GOLDEN)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("field", ["overall", "format", "accuracy"])
def test_tool_reports_a_difference(tmp_path, field):
    cases = json.loads(GOLDEN.read_text())[:3]
    cases[1][field] = 0.25
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(cases))
    result = check(wrong)
    assert result.returncode == 1
    assert f"case 1: {field} is " in result.stdout and "case 0" not in result.stdout


def test_tool_refuses_a_foreign_file(tmp_path):
    foreign = tmp_path / "foreign.json"
    foreign.write_text('[{"response": "x"}]')
    result = check(foreign)
    assert result.returncode == 2 and str(foreign) in result.stderr and "Traceback" not in result.stderr


def test_hanging_answer_times_out_and_costs_nothing_else():
    config = RewardConfig(time_limit_seconds=5.0, workers=2)
    good, bad = "<think>a</think>\\boxed{x/2}", "<think>a</think>\\boxed{x/3}"
    texts = [good, HANGS, bad, good, HANGS, good, bad, good]
    started = time.monotonic()
    with Grader(config) as grader:
        rewards = [grader.result(one) for one in [grader.submit(text, HANGS_ON, False) for text in texts]]
    assert [r.timed_out for r in rewards] == [text == HANGS for text in texts]
    assert [r.accuracy for r in rewards] == [float(text == good) for text in texts]
    assert [r.format for r in rewards] == [1.0] * len(texts)
    assert time.monotonic() - started < 60


def test_grader_crash_is_a_wrong_answer():
    """mathruler raises on some inputs (int(inf), empty content); the authors' trainer would stop."""
    with Grader(RewardConfig(workers=1)) as grader:
        answers = ["\\boxed{1e999}", "\\boxed{}", "\\boxed{((((}", "\\boxed{\\frac}", "no box", "\\boxed{3}"]
        rewards = [grader.result(one) for one in [grader.submit(text, "3", False) for text in answers]]
    assert [r.accuracy for r in rewards] == [0, 0, 0, 0, 0, 1] and not any(r.timed_out for r in rewards)


def test_cut_off_and_weights():
    text = "<think>a</think>\\boxed{3}"
    with Grader(RewardConfig(accuracy_weight=0.7, format_weight=0.3, zero_if_cut_off=True, workers=1)) as grader:
        done, cut, wrong = (grader.result(grader.submit(text, *how)) for how in (("3", False), ("3", True), ("4", False)))
    assert done.overall == pytest.approx(1.0) and wrong.overall == pytest.approx(0.3)
    assert (cut.overall, cut.accuracy, cut.format) == (0.0, 1.0, 1.0)
    with Grader(RewardConfig(workers=1)) as grader:
        assert grader.result(grader.submit(text, "3", True)).overall == pytest.approx(1.0)


def test_linear_time_forms_equal_the_published_expressions():
    generator = random.Random(0)
    pieces = ["<think>", "</think>", "<", ">", "/", " ", "\n", "\t", "\u00a0", "\x1c", "\\boxed{", "{", "}", "a", "think", "\\boxed"]
    matches = 0
    for _ in range(20000):
        text = "".join(generator.choices(pieces, k=generator.randrange(12)))
        if generator.random() < 0.5:
            text = "<think>" + text + "</think>" + "".join(generator.choices(pieces, k=4)) + "\\boxed{" + generator.choice(["}", "3}", "3"])
        stripped = re.sub(r"\s*(<|>|/)\s*", r"\1", text)
        assert strip_tag_spaces(text) == stripped
        expected = float(re.fullmatch(r"<think>.*</think>.*\\boxed\{.*\}.*", stripped, re.DOTALL) is not None)
        assert format_reward(stripped) == expected
        matches += expected
    assert 1000 < matches < 19000
    started = time.monotonic()
    strip_tag_spaces(" " * 200_000 + "x")
    assert time.monotonic() - started < 1

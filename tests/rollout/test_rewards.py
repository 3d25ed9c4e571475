"""The published reward: golden values of the authors' code, and model text that is out to hang or crash the grader."""

import json
import random
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_papo.config import RewardConfig
from megatron_papo.rollout.grading import boxed
from megatron_papo.rollout.rewards import (
    Grader,
    format_reward,
    soft_overlong_penalty,
    strip_tag_spaces,
    with_overlong_penalty,
)
from megatron_papo.run.records import Rewards
from tests.helpers import ROOT

GOLDEN = ROOT / "tests" / "golden" / "rewards.json"
# Too near to the answer to be told apart by its value, and minutes for sympy: a continued fraction.
HANGS = "<think>a</think>\\boxed{x/2+(" + "1/(x**7+7*x*y**8+y**5+x**3*y**2+" * 9 + "y" + ")" * 9 + ")/10**30}"
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
    config = RewardConfig(time_limit_seconds=0.5, workers=2)
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


@pytest.mark.parametrize("response", ["", "<think>x</think> None", "None", "\\boxed{", "\\boxed{{}", "boxed{None}"])
def test_no_box_is_no_answer(response):
    """The grader's word for a missing box is None: an answer of the data that reads so would make silence right."""
    with Grader(RewardConfig()) as ours, Grader(RewardConfig(missing_box_is_none=True)) as authors:
        for answer in ("None", "none", " None ", "\\text{None}"):
            said, known = ours.submit("\\boxed{None}", answer, False), ours.submit(response, answer, False)
            assert (ours.result(said).accuracy, ours.result(known).accuracy) == (1, 0)
            assert authors.result(authors.submit(response, answer, False)).accuracy == 1
        assert authors.result(authors.submit(response, "3", False)).accuracy == 0


@given(st.lists(st.sampled_from(["\\boxed{", "\\boxed", "{", "}", "x", " ", "\n", "None", "\\"]), max_size=12))
def test_the_box_is_the_one_that_mathruler_finds(pieces):
    from mathruler.grader import extract_boxed_content

    text = "".join(pieces)
    found = boxed(text)
    assert extract_boxed_content(text) == ("None" if found is None else found)


def test_cut_off_and_weights():
    text = "<think>a</think>\\boxed{3}"
    with Grader(RewardConfig(accuracy_weight=0.7, format_weight=0.3, zero_if_cut_off=True, workers=1)) as grader:
        done, cut, wrong = (
            grader.result(grader.submit(text, *how)) for how in (("3", False), ("3", True), ("4", False))
        )
    assert done.overall == pytest.approx(1.0) and wrong.overall == pytest.approx(0.3)
    assert (cut.overall, cut.accuracy, cut.format) == (0.0, 1.0, 1.0)
    with Grader(RewardConfig(workers=1)) as grader:
        assert grader.result(grader.submit(text, "3", True)).overall == pytest.approx(1.0)


@pytest.mark.parametrize(
    "num_tokens, expected",
    # 100 tokens at most, buffer 20, penalty 0.5: nothing up to 80, then 0.5 / 20 = 0.025 a token
    [(1, 0.0), (79, 0.0), (80, 0.0), (81, -0.025), (90, -0.25), (99, -0.475), (100, -0.5), (101, -0.5), (500, -0.5)],
)
def test_soft_overlong_penalty_by_hand(num_tokens, expected):
    assert soft_overlong_penalty(num_tokens, 100, 20, 0.5) == pytest.approx(expected, abs=1e-12)


def test_soft_overlong_penalty_is_equation_13_of_dapo():
    """As printed (arXiv 2503.14476): L_max - L_cache < |y| <= L_max gets ((L_max - L_cache) - |y|) / L_cache, in exact
    fractions."""

    def printed(length, l_max, l_cache):
        if length <= l_max - l_cache:
            return Fraction(0)
        return Fraction(l_max - l_cache - length, l_cache) if length <= l_max else Fraction(-1)

    for l_max, l_cache in ((20480, 4096), (7, 3), (5, 5), (4, 1)):
        for length in {1, l_max - l_cache, l_max - l_cache + 1, l_max - 1, l_max, l_max + 1}:
            assert soft_overlong_penalty(length, l_max, l_cache, 1.0) == pytest.approx(
                float(printed(length, l_max, l_cache)), abs=1e-12
            )
    assert soft_overlong_penalty(19, 20, 4, 1.0) != soft_overlong_penalty(19, 20, 5, 1.0)  # control: the buffer matters


def test_the_overlong_penalty_lowers_overall_and_nothing_else():
    rewards = Rewards(overall=1.0, accuracy=1.0, format=1.0)
    config = RewardConfig(soft_overlong_buffer_tokens=8, soft_overlong_penalty=2.0)
    assert with_overlong_penalty(rewards, 18, 20, config) == Rewards(
        overall=-0.5, accuracy=1.0, format=1.0, overlong_penalty=-1.5
    )
    assert with_overlong_penalty(rewards, 12, 20, config) == rewards
    assert with_overlong_penalty(rewards, 18, 20, RewardConfig()) == rewards  # off by default


def test_linear_time_forms_equal_the_published_expressions():
    generator = random.Random(0)
    pieces = [
        "<think>",
        "</think>",
        "<",
        ">",
        "/",
        " ",
        "\n",
        "\t",
        "\u00a0",
        "\x1c",
        "\\boxed{",
        "{",
        "}",
        "a",
        "think",
        "\\boxed",
    ]
    matches = 0
    for _ in range(20000):
        text = "".join(generator.choices(pieces, k=generator.randrange(12)))
        if generator.random() < 0.5:
            text = (
                "<think>"
                + text
                + "</think>"
                + "".join(generator.choices(pieces, k=4))
                + "\\boxed{"
                + generator.choice(["}", "3}", "3"])
            )
        stripped = re.sub(r"\s*(<|>|/)\s*", r"\1", text)
        assert strip_tag_spaces(text) == stripped
        expected = float(re.fullmatch(r"<think>.*</think>.*\\boxed\{.*\}.*", stripped, re.DOTALL) is not None)
        assert format_reward(stripped) == expected
        matches += expected
    assert 1000 < matches < 19000
    started = time.monotonic()
    strip_tag_spaces(" " * 200_000 + "x")
    assert time.monotonic() - started < 1

"""The three gradings: mathruler on the last box, the same on a label with a newline, and multiple choice."""

import time
from typing import get_args

import pytest

from megatron_papo.config import Grading, RewardConfig
from megatron_papo.errors import UserError
from megatron_papo.rollout.choices import letters_named, right_letters
from megatron_papo.rollout.rewards import Grader, reward_of

OPTIONS = ("5 cm", "7 cm", "\\frac{1}{2} m", "None of the above")
RIGHT = [
    *(
        "B",
        "(B)",
        "[B]",
        "B.",
        "B)",
        "B:",
        "(B).",
        "b",
        "(b)",
        "b.",
        "{B}",
        "**B**",
        "$B$",
        '"B"',
        "\uff22",
        "\uff08B\uff09",
    ),
    *("\\text{B}", "\\textbf{B}", "\\mathrm{B}", "\\mathbf{(B)}", "\\text{(B)}", "(\\text{B})", "\\left(B\\right)"),
    *("option B", "Option (B)", "choice b", "The answer is B", "The correct answer is: B."),
    *("B: 7 cm", "B. 7 cm", "(B) 7 cm", "B) 7 cm", "B - 7 cm", "b: 7 cm", "\\text{B. 7 cm}", "B:\\ 7\\text{ cm}"),
    *("B: seven centimetres", "B\u3002", "B\u30017 cm", "7 cm", "7 cm.", "7\\text{ cm}", "7.0\\,\\text{cm}", "7"),
]
"""Contents of a box that say B, by its letter or by its text; the last two equal the text by mathruler alone."""
WRONG = [
    *("A", "(C)", "d", "E", "", " ", "BB", "AB", "B7", "Banana", "option", "9 cm", "2 m", "\\text{}"),
    *("A or B", "B or A", "A, B", "A and B", "B and C", "A/B", "(A) or (B)", "(B) or (C)", "(A)(B)", "(B) (C)"),
    *(
        "A. B",
        "B. C",
        "A\u3001B",
        "both A and B",
        "not B",
        "B, C",
        "B+C",
        "(b) + (c)",
        "(b)-(c)",
        "b: c",
        "B = 7 cm or 5 cm",
    ),
    *("A: 7 cm", "B: 5 cm", "(B) None of the above", "A. 5 cm B. 7 cm", "B. 7 cm C. 9 cm", "\\text{A}\\text{B}"),
]
"""Of another option, of two, of one by its letter and another by its text, of none."""


@pytest.fixture(scope="module")
def grader():
    """Return a grader that all tests share: its processes take a second to start."""
    with Grader(RewardConfig(workers=1)) as grader:
        yield grader


@pytest.fixture
def grades(grader):
    """Return a function that grades contents of boxes as multiple choice."""

    def graded(contents, answer, options=OPTIONS):
        pending = [grader.submit(f"\\boxed{{{content}}}", answer, False, "choice", options) for content in contents]
        return [grader.result(submitted).accuracy for submitted in pending]

    return graded


@pytest.mark.parametrize("answer", ["B", "(b).", "7 cm", "B: 7 cm"])
def test_every_usual_way_to_say_an_option(answer, grades):
    """The answer may be given in as many ways. The control: in the same words no other option is right."""
    assert dict(zip(RIGHT, grades(RIGHT, answer), strict=True)) == dict.fromkeys(RIGHT, 1.0)
    assert dict(zip(WRONG, grades(WRONG, answer), strict=True)) == dict.fromkeys(WRONG, 0.0)
    assert sum(grades(RIGHT, "A")) == 0


def test_a_text_that_equals_the_option_as_mathematics(grades):
    assert grades(["0.5 m", "\\frac12 m", "1/2 m", "0.51 m"], "C") == [1.0, 1.0, 1.0, 0.0]
    assert grades(["0.5", "\\frac{2}{4}", "0.6"], "A", ("\\frac{1}{2}", "3")) == [1.0, 0.0, 0.0]


def test_options_that_look_like_letters(grades):
    """A capital letter is a letter; a small one is an option's text where there is such an option."""
    small, capital = ("d", "c", "b", "a"), ("B", "A")
    assert letters_named("a", small) == {"D"} and letters_named("A", small) == {"A"}
    assert letters_named("A", capital) == {"A"} and letters_named("A: B", capital) == {"A"}
    assert letters_named("a:b", ("b:a", "a:b")) == {"B"} and letters_named("a: b", ("x", "y")) == set()
    assert letters_named("x", ("x", "x", "y")) == {"A", "B"}  # the same text twice: both are right
    assert grades(["B", "A", "C"], "x", ("x", "x", "y")) == [1.0, 1.0, 0.0]
    assert grades(["", " "], "B", ("1", "")) == [0.0, 0.0]  # an option that is a picture has no text to match


def test_without_the_options_only_letters_count(grades):
    assert grades(["b", "(B)", "B: x is 3", "7 cm", "A"], "B", ()) == [1.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("answer", ["E", "8 cm", "", "A or B", "AB", "A: 7 cm"])
def test_an_answer_that_is_no_option_is_refused(answer, grades):
    with pytest.raises(UserError, match="neither the letter nor the text of one of the 4 options") as refusal:
        grades(["B"], answer)
    assert len(refusal.value.lines) == 1
    with pytest.raises(UserError, match="of an option"):
        right_letters("7 cm", ())


def test_a_missing_box_names_nothing(grader):
    with Grader(RewardConfig(missing_box_is_none=True)) as authors:
        options = ("1", "None")
        assert grader.result(grader.submit("B", "B", False, "choice", options)).accuracy == 0
        assert authors.result(authors.submit("B", "B", False, "choice", options)).accuracy == 1  # as they grade
        assert grader.result(grader.submit("\\boxed{None}", "B", False, "choice", options)).accuracy == 1


def test_what_a_response_may_hold_costs_no_time():
    fonts, begun = "\\text{" * 400 + "B" + "}" * 400, time.monotonic()
    hostile = [fonts, " " * 1999 + "B", "(" * 2000, "A " * 1000, "the answer is " * 150, "\\left " * 300, "B" * 10**6]
    assert not any(letters_named(content, OPTIONS) for content in hostile[:1] + hostile[2:])
    assert time.monotonic() - begun < 1
    assert letters_named("\\text{" * 4 + "B" + "}" * 4, OPTIONS) == {"B"}  # control: what people write is read


PAIRS = [
    *(("3", "3"), ("B", "B"), ("1/2", "\\frac{1}{2}"), ("12", "12.0"), ("\\sqrt{2}", "\\sqrt{2}"), ("4", "5")),
    *(("b", "B"), ("yes", "Yes"), ("Yes", "Yes"), ("0.5", "\\frac{1}{2}"), ("2x", "x+x"), ("x+1", "1+x"), ("x", "y")),
    *(("2\\sqrt{2}", "\\sqrt{8}"), ("(1, 2)", "(1,2)"), ("30^\\circ", "30"), ("1,000", "1000"), ("5 cm", "5")),
    *(("\\text{B}", "B"), ("3.0", "3"), ("C.", "C"), ("2\\pi", "2*pi"), ("{3}", "3"), ("10\\%", "10"), ("x=5", "5")),
    *(("North", "north"), ("(2,1+x)", "(2,x+1)")),
]


def test_published_is_mathruler_on_a_label_with_a_newline(grader):
    """Expected: mathruler itself. The control: without the newline some of these are right that are wrong with it."""
    from mathruler.grader import grade_answer

    texts = [(f"\\boxed{{{content}}}", answer) for content, answer in PAIRS]
    pending = [grader.submit(text, answer, False, "published") for text, answer in texts]
    again = [grader.submit(text, answer + "\n", False, "published") for text, answer in texts]
    plain = [grader.submit(text, answer, False) for text, answer in texts]
    published, twice, ours = ([grader.result(one).accuracy for one in some] for some in (pending, again, plain))
    assert published == twice == [float(grade_answer(content, answer + "\n")) for content, answer in PAIRS]
    assert ours == [float(grade_answer(content, answer)) for content, answer in PAIRS]
    lost = {pair for pair, one, other in zip(PAIRS, ours, published, strict=True) if one > other}
    assert lost == {("yes", "Yes"), ("North", "north"), ("(2,1+x)", "(2,x+1)")}
    assert not any(one < other for one, other in zip(ours, published, strict=True))


def test_a_missing_box_is_none_as_the_set_is_graded():
    """Whatever training does: one rule for stage 7 and tools.suite score."""
    for training in (False, True):
        reward = RewardConfig(missing_box_is_none=training)
        assert [reward_of(reward, grading).missing_box_is_none for grading in get_args(Grading)] == [False, True, False]
    assert get_args(Grading) == ("mathruler", "published", "choice")

"""From predictions to the numbers of sets and suites, against what a person counts."""

import itertools
import math

import pytest

from megatron_papo.errors import UserError
from megatron_papo.evaluation.scores import Answer, answer_of, collect_answers, suite_scores
from megatron_papo.run.records import Prediction, Rewards

BOX = "<think>a</think>\\boxed{%s}"


def prediction(prompt, sample, text, right, *, problem=None, cut_off=False, late=False, tokens=3):
    return Prediction(
        prompt_id=prompt,
        problem_id=problem,
        sample=sample,
        image="original",
        answer="7",
        text=text,
        response_token_ids=list(range(tokens)),
        finish_reason="length" if cut_off else "stop",
        rewards=Rewards(overall=right, accuracy=right, format=float(text.startswith("<think>")), timed_out=late),
        sampling_seed=1,
        masked_image_seed=None,
    )


PREDICTIONS = [
    prediction("p", 0, BOX % 7, 1.0, problem="mathverse/1"),
    prediction("p", 1, BOX % 8, 0.0, problem="mathverse/1", late=True, tokens=10),
    prediction("p", 2, "I think that it is \\boxed{ 7 }", 1.0, problem="mathverse/1"),
    prediction("q", 0, "\\boxed{7", 0.0, problem="mathverse/1", cut_off=True),
    prediction("q", 1, BOX % 5, 0.0, problem="mathverse/1"),
    prediction("q", 2, BOX % 5, 0.0, problem="mathverse/1"),
    prediction("r", 0, BOX % 7, 1.0, problem="mathverse/2"),
    prediction("r", 1, BOX % 6, 0.0, problem="mathverse/2"),
    prediction("r", 2, "seven", 0.0, problem="mathverse/2"),
]


def answers(predictions=PREDICTIONS, name="mathverse"):
    return collect_answers(map(answer_of, predictions), name, "here")


def test_a_set():
    """Prompts p (2 of 3 right, most often 7), q (none), r (1 of 3; 7 and 6 tie); p and q are one problem."""
    scores = suite_scores({"mathverse": answers()}, {}).sets["mathverse"]
    mean, d = 1 / 3, [1 / 3, -1 / 3, 0]
    error = math.sqrt(sum(x * x for x in d) / 2 / 3 + 2 * d[0] * d[1] / 9)
    pairs = [[bool(sum(c)) for c in itertools.combinations(row, 2)] for row in ([1, 0, 1], [0, 0, 0], [1, 0, 0])]
    assert scores.as_json() == {
        "prompts": 3,
        "samples_per_prompt": 3,
        "avg": pytest.approx(mean),
        "standard_error": pytest.approx(error),
        "pass_at": {"1": pytest.approx(mean), "2": pytest.approx(sum(map(sum, pairs)) / 9), "3": pytest.approx(2 / 3)},
        "maj": pytest.approx((1 + 0 + 0.5) / 3),
        "format": pytest.approx(6 / 9),
        "cut_off": pytest.approx(1 / 9),
        "timed_out": pytest.approx(1 / 9),
        "unparsed": pytest.approx(2 / 9),
    }
    assert scores.mean_tokens == pytest.approx((8 * 3 + 10) / 9)


def test_the_order_of_predictions_does_not_matter():
    """As of files that are several passes over the prompts; control: a changed grade does."""
    passes = sorted(PREDICTIONS, key=lambda one: (one.sample, one.prompt_id))
    assert suite_scores({"a": answers(passes)}, {}) == suite_scores({"a": answers()}, {})
    changed = [prediction("p", 0, BOX % 7, 0.0, problem="mathverse/1"), *PREDICTIONS[1:]]
    assert suite_scores({"a": answers(changed)}, {}) != suite_scores({"a": answers()}, {})


def test_groups_and_overall():
    """Two sets that show the same problems are one source of error, not two."""
    other = [prediction(f"x{i}", 0, BOX % 7, float(i < 3), problem=f"x/{i}") for i in range(4)]
    sets = {"mathverse": answers(), "clevr_count": answers(other), "again": answers(other)}
    groups = {"mathverse": ["general"], "clevr_count": ["general", "vision"], "again": ["vision"]}
    found = suite_scores(sets, groups).as_json()
    error, of_other = (found["sets"][name]["standard_error"] for name in ("mathverse", "clevr_count"))
    assert found["groups"]["general"] == {
        "avg": pytest.approx((1 / 3 + 3 / 4) / 2),
        "standard_error": pytest.approx(math.hypot(error, of_other) / 2),
    }
    covariance = sum(d * d for d in (0.25, 0.25, 0.25, -0.75)) / 4**2
    assert found["groups"]["vision"] == {
        "avg": pytest.approx(3 / 4),
        "standard_error": pytest.approx(math.sqrt(2 * of_other**2 + 2 * covariance) / 2),
    }
    assert found["overall"] == {
        "avg": pytest.approx((1 / 3 + 3 / 4 + 3 / 4) / 3),
        "standard_error": pytest.approx(math.sqrt(error**2 + 2 * of_other**2 + 2 * covariance) / 3),
    }


def test_what_is_not_known_is_said_so():
    """Predictions of others do not say why a response ended; they name no problems."""
    rows = [Answer(f"p{i}", None, 0, i == 0, True, False, "7", None, None) for i in range(2)]
    scores = suite_scores({"set": collect_answers(rows, "set", "here")}, {}).sets["set"]
    assert (scores.cut_off, scores.mean_tokens, scores.variance) == (None, None, None)
    assert scores.standard_error == pytest.approx(0.5)
    one = suite_scores({"set": collect_answers(rows[:1], "set", "here")}, {}).as_json()
    assert one["sets"]["set"]["standard_error"] is one["overall"]["standard_error"] is None


@pytest.mark.parametrize(
    "predictions, problem",
    [
        (PREDICTIONS[:-1], "prompt r has 2 samples, others have 3"),
        ([*PREDICTIONS, PREDICTIONS[-1]], "prompt r has 4 samples, others have 3"),
        ([*PREDICTIONS[:-1], PREDICTIONS[-2]], "sample 1 of prompt r is there twice"),
        ([*PREDICTIONS[:-1], prediction("r", 2, "x", 0.0, problem="other")], "prompt r belongs to two problems"),
        ([], "holds no answers"),
    ],
)
def test_incomplete_or_mixed_predictions_are_refused(predictions, problem):
    with pytest.raises(UserError, match=problem) as error:
        answers(predictions)
    assert len(error.value.lines) == 1 and str(error.value).startswith("here: ")


def test_a_grade_between_is_refused():
    with pytest.raises(ValueError, match="accuracy 0.5"):
        answer_of(prediction("p", 0, "x", 0.5))


def test_hostile_texts_count():
    """Lone surrogates and long boxes are contents like others."""
    texts = ["\\boxed{\ud800}", "\\boxed{\ud800}", "\\boxed{" + "9" * 100_000 + "}"]
    rows = [Answer("p", None, i, False, False, False, text, False, 1) for i, text in enumerate(texts)]
    first, second, third = collect_answers(rows, "set", "here").contents[0].tolist()
    assert first == second != third

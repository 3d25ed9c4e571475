import pytest

from megatron_papo.evaluation.accuracy import average_at_k


def test_average_at_k():
    scores = [("a", 1.0), ("b", 0.0), ("a", 0.0), ("b", 0.0), ("a", 1.0), ("b", 1.0)]
    assert average_at_k(scores) == pytest.approx((2 / 3 + 1 / 3) / 2)


@pytest.mark.parametrize("scores", [[], [("a", 1.0), ("a", 0.0), ("b", 1.0)]])
def test_unequal_or_missing_samples_are_refused(scores):
    with pytest.raises(ValueError, match="same number"):
        average_at_k(scores)

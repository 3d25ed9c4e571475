"""The learning-rate schedule against numbers worked out by hand."""

import pytest

from megatron_papo.config import OptimizerConfig
from megatron_papo.training.optimizer import learning_rate


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(), [1.0, 1.0, 1.0, 1.0]),
        (dict(warmup_steps=2), [0.5, 1.0, 1.0, 1.0]),
        (dict(decay_steps=4), [1.0, 0.75, 0.5, 0.25]),
        (dict(warmup_steps=2, decay_steps=2), [0.5, 0.5, 0.1, 0.1]),
    ],
)
def test_schedule(options, expected):
    config = OptimizerConfig(learning_rate=1.0, **options)
    assert [learning_rate(step, config) for step in range(4)] == pytest.approx(expected)

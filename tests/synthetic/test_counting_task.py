"""The counting task: the picture shows as many squares as the answer says, counted here by another route."""

import numpy as np
import pytest

from megatron_papo.config import SyntheticTaskConfig
from megatron_papo.synthetic.counting_task import GridCountTask
from megatron_papo.synthetic.rows import synthetic_rows


def count_coloured_cells(image) -> int:
    """Cells whose centre is far from grey: noise of 8 grey levels does not reach 60."""
    pixels = np.asarray(image).astype(int)
    centres = pixels.reshape(pixels.shape[0] // 14, 14, pixels.shape[1] // 14, 14, 3)[:, 4:10, :, 4:10].mean(
        axis=(1, 3)
    )
    return int((np.ptp(centres, axis=-1) > 60).sum())


@pytest.mark.parametrize("config", [SyntheticTaskConfig(), SyntheticTaskConfig(grid=3, lowest=0, highest=9, noise=0.0)])
def test_answer_is_what_the_picture_shows(config):
    task = GridCountTask(config)
    answers = []
    for seed in range(300):
        sample = task.render(seed)
        assert sample.image.size == (config.grid * 14, config.grid * 14)
        assert count_coloured_cells(sample.image) == int(sample.answer)
        noun = "square" if sample.answer == "1" else "squares"
        assert sample.target == f"<think>I count {sample.answer} {noun}.</think>\\boxed{{{sample.answer}}}"
        answers.append(int(sample.answer))
    values, counts = np.unique(answers, return_counts=True)
    assert values.tolist() == list(range(config.lowest, config.highest + 1))
    expected = 300 / len(values)
    assert np.abs(counts - expected).max() < 5 * expected**0.5


def test_noise_and_seed_matter():
    quiet, noisy = (GridCountTask(SyntheticTaskConfig(noise=noise)) for noise in (0.0, 20.0))
    assert len(np.unique(np.asarray(quiet.render(1).image).reshape(-1, 3), axis=0)) == 2
    assert len(np.unique(np.asarray(noisy.render(1).image).reshape(-1, 3), axis=0)) > 100
    assert (np.asarray(quiet.render(1).image) != np.asarray(quiet.render(2).image)).any()
    np.testing.assert_array_equal(np.asarray(noisy.render(1).image), np.asarray(noisy.render(1).image))


def test_sets_share_no_picture():
    rows = [
        row
        for name in ("train", "sft", "evaluation")
        for row in synthetic_rows(SyntheticTaskConfig(), 1, name, 40, name == "sft")
    ]
    assert len({row.images[0] for row in rows}) == len({row.id for row in rows}) == 120
    assert [row.target is not None for row in rows] == [False] * 40 + [True] * 40 + [False] * 40
    again = list(synthetic_rows(SyntheticTaskConfig(), 1, "sft", 40, True))
    assert again == rows[40:80]
    assert list(synthetic_rows(SyntheticTaskConfig(), 2, "sft", 40, True)) != again

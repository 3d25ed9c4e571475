"""mrope_position_ids equals transformers' get_rope_index, row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_papo.model.position_ids import mrope_position_ids
from tests.workers.random_model import END, GRIDS, IMAGE, START, batch, hf_config

grids = st.tuples(st.just(1), st.integers(1, 9).map(lambda n: 2 * n), st.integers(1, 9).map(lambda n: 2 * n))
segments = st.lists(st.tuples(st.integers(0, 12), grids), max_size=4)


@pytest.fixture(scope="module")
def reference():
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    with torch.device("meta"):
        model = Qwen2_5_VLModel(hf_config(False))

    def positions(row, image_grids):
        ids = torch.tensor([row])
        given_grids = torch.tensor(image_grids).reshape(-1, 3)
        return model.get_rope_index(ids, (ids == IMAGE).int(), given_grids, attention_mask=torch.ones_like(ids))[0][
            :, 0
        ]

    return positions


@settings(max_examples=50, deadline=None)
@given(segments=segments, tail=st.integers(1, 9))
def test_equals_transformers(reference, segments, tail):
    row = []
    for count, (_, rows, columns) in segments:
        row += [5] * count + [START] + [IMAGE] * (rows * columns // 4) + [END]
    row += [6] * tail
    image_grids = [grid for _, grid in segments]
    ours = mrope_position_ids(row, image_grids, IMAGE)
    assert ours.dtype == torch.long and ours.shape == (3, len(row))
    assert torch.equal(ours, reference(row, image_grids))


def test_text_after_an_image_goes_on_from_its_longer_side():
    row = [START] + [IMAGE] * 6 + [END, 7]
    assert mrope_position_ids(row, [(1, 4, 6)], IMAGE).tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]


def test_swapped_rows_and_columns_differ(reference):
    row = [START] + [IMAGE] * 6 + [END]
    assert not torch.equal(mrope_position_ids(row, [(1, 6, 4)], IMAGE), reference(row, [(1, 4, 6)]))


def test_a_row_that_does_not_fit_its_grids_is_refused():
    row = batch()["input_ids"][0]
    with pytest.raises(ValueError, match="72 image tokens.* 60"):
        mrope_position_ids(row, GRIDS[:1], IMAGE)
    with pytest.raises(ValueError, match="not contiguous"):
        mrope_position_ids([IMAGE, 5, IMAGE, IMAGE, IMAGE], [(1, 4, 4)], IMAGE)
    with pytest.raises(ValueError, match="even"):
        mrope_position_ids([IMAGE], [(1, 3, 4)], IMAGE)

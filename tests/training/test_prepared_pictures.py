"""Pictures prepared ahead: the same bits as transformers' preprocessing and as one thread's, each once, errors as they
are."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_papo.distributed import process_groups
from megatron_papo.errors import UserError
from megatron_papo.pictures import preprocess
from megatron_papo.training.prepared_pictures import AHEAD, PreparedPictures, normalised
from tests.training.iteration import Iteration


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_become_the_bits_of_the_arithmetic(dtype):
    """Pixel by pixel by the processor's formula, in numpy; the layout of rows is compared with transformers in
    tests/pictures/test_preprocess.py."""
    noise = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    pixels = (np.asarray(image, dtype=np.float32) / np.float32(255) - preprocess.MEAN) / preprocess.STD
    expected = torch.from_numpy(preprocess.to_patches(image)).to(dtype)
    assert sorted(set(expected.flatten().tolist())) == sorted(
        set(torch.from_numpy(pixels).to(dtype).flatten().tolist())
    )
    found = normalised(torch.from_numpy(preprocess.to_patch_bytes(image)), dtype)
    assert torch.equal(found, expected) and found.shape == (24, 1176)
    assert not torch.equal(normalised(torch.from_numpy(preprocess.to_patch_bytes(image)) ^ 1, dtype), expected)


class Made:
    """Notes what is made and by whom."""

    def __init__(self):
        self.keys, self.threads = [], set()

    def of(self, key, size=10):
        def make():
            self.keys.append(key)
            self.threads.add(threading.get_ident())
            return [torch.full((size,), key, dtype=torch.uint8)]

        return make


def test_each_once_by_threads_while_there_is_room():
    made, pictures = Made(), PreparedPictures(max_bytes=50, threads=2)
    wanted = {key: made.of(key) for key in range(8)}
    for _ in range(2):
        pictures.expect(wanted)
        for key in wanted:
            assert int(pictures.of(key, wanted[key])[0][0]) == key
    assert sorted(made.keys) == sorted([*range(8), 5, 6, 7])  # 5 have room, the others are made again
    assert threading.get_ident() not in made.threads
    assert int(pictures.of(99, made.of(99))[0][0]) == 99  # nobody said that it would come
    assert threading.get_ident() in made.threads


def test_not_more_ahead_than_said():
    made, pictures = Made(), PreparedPictures(max_bytes=0, threads=1)
    pictures.expect({key: made.of(key) for key in range(10)})
    pictures.of(0, made.of(0))
    pictures._pool.shutdown(wait=True)
    assert len(made.keys) == AHEAD + 1


def test_an_error_is_raised_where_the_picture_is_asked_for():
    def fail():
        raise UserError("image 1.png: cannot be read")

    pictures = PreparedPictures(max_bytes=50, threads=1)
    pictures.expect({1: fail})
    with pytest.raises(UserError, match="1.png"):
        pictures.of(1, fail)


@pytest.fixture
def iteration(tmp_path):
    yield Iteration(tmp_path, "group")
    process_groups.destroy()


def test_an_iteration_opens_each_picture_once_for_each_kind(iteration, monkeypatch):
    """6 pictures and their masked ones, over three sweeps and three updates; no bit depends on who prepared them."""
    opened = []
    before = preprocess.open_image

    def noted(root, name, *settings):
        opened.append((name, threading.get_ident()))
        return before(root, name, *settings)

    monkeypatch.setattr(preprocess, "open_image", noted)
    metrics, weights = iteration.train()
    distinct = {name for row in iteration.passes.rows for name in row.rollout.images}
    assert len(distinct) == 6 and sorted(name for name, _ in opened) == sorted([*distinct, *distinct])
    assert threading.get_ident() not in {thread for _, thread in opened}

    collator = iteration.passes.collator
    collator._prepared = PreparedPictures(max_bytes=0, threads=1)  # and the calling thread, which is told nothing
    monkeypatch.setattr(collator, "expect", lambda parts, pictures: None)
    opened.clear()
    again, same = iteration.train()
    assert again == metrics and torch.equal(weights, same) and len(opened) > 2 * len(distinct)
    row = iteration.passes.rows[0]  # the control: another seed's masked picture is another
    masked = [collator.collate([row], "masked").pixel_values for row in (row, another_seed(row))]
    assert not torch.equal(*masked)


def another_seed(row):
    rollout = row.rollout.model_copy(update={"masked_image_seed": row.rollout.masked_image_seed + 1})
    return replace(row, rollout=rollout)

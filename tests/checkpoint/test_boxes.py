"""Boxes against numpy's and torch's own indexing."""

from math import prod

import numpy
import pytest
import torch

from megatron_papo.checkpoint.boxes import Box, common_part, of_at_most, of_flat_range

SHAPES = [(), (7,), (3, 5), (1, 6), (4, 1), (3, 2, 5), (2, 3, 1, 4)]


def values(array: numpy.ndarray, box: Box) -> list[int]:
    return array[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes))].flatten().tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_boxes_of_a_flat_range_are_its_values_in_order(shape):
    array = numpy.arange(prod(shape)).reshape(shape)
    for first in range(prod(shape) + 1):
        for last in range(first, prod(shape) + 1):
            boxes = list(of_flat_range(first, last, shape))
            assert [value for box in boxes for value in values(array, box)] == list(range(first, last))
            assert len(boxes) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limit", [1, 2, 7, 1000])
def test_parts_are_small_and_keep_the_order(shape, limit):
    array = numpy.arange(prod(shape)).reshape(shape)
    parts = list(of_at_most(limit, Box((0,) * len(shape), shape)))
    assert [value for box in parts for value in values(array, box)] == list(range(prod(shape)))
    assert all(box.numel <= limit for box in parts)
    assert limit < 1000 or len(parts) == 1


def test_a_common_part_is_what_both_have():
    array, random = numpy.arange(120).reshape(4, 5, 6), numpy.random.default_rng(1)
    nothing = 0
    for _ in range(300):
        boxes = []
        for _ in range(2):
            offsets = [int(random.integers(size)) for size in array.shape]
            boxes.append(
                Box(tuple(offsets), tuple(int(random.integers(1, s - a + 1)) for a, s in zip(offsets, array.shape)))
            )
        shared = common_part(*boxes)
        expected = sorted(set(values(array, boxes[0])) & set(values(array, boxes[1])))
        assert ([] if shared is None else values(array, shared)) == expected
        nothing += shared is None
    assert 30 < nothing < 270


def test_boxes_of_a_checkpoint_are_read_whatever_parts_it_was_written_in(tmp_path):
    """Written in the boxes of three flat ranges of a transposed shard, read in others; against torch's slices."""
    from megatron_papo.checkpoint import torch_dist_writer
    from megatron_papo.checkpoint.hf_files import TensorInfo
    from megatron_papo.checkpoint.torch_dist_files import TorchDistCheckpoint
    from megatron_papo.errors import UserError

    whole = torch.arange(2 * 6 * 10, dtype=torch.float32).reshape(2, 6, 10)
    parts = []
    for rank, (first, last) in enumerate([(0, 13), (13, 29), (29, 30)]):  # of 30 values in each of four shards
        with torch_dist_writer.ChunkWriter(tmp_path, rank) as writer:
            for layer in range(2):
                for column in (0, 5):
                    shard = whole[layer, :, column : column + 5].contiguous().flatten()
                    at = first
                    for box in of_flat_range(first, last, (6, 5)):
                        data = shard[at : at + box.numel].view(1, *box.sizes)
                        writer.write("w", box.below(0).moved((layer, 0, column)).offsets, data)
                        at += box.numel
        parts.append(writer.written)
    infos = {"w": TensorInfo(torch.float32, (2, 6, 10))}
    with pytest.raises(UserError, match="not all of w was written, or some of it twice"):
        torch_dist_writer.finish(tmp_path, infos, parts[:-1], {})
    with pytest.raises(UserError, match="not all of w was written, or some of it twice"):
        torch_dist_writer.finish(tmp_path, infos, [*parts[:-1], parts[0]], {})
    torch_dist_writer.finish(tmp_path, infos, parts, {"state": {"step": 3}})
    stored = TorchDistCheckpoint(tmp_path)
    assert stored.common == {"state": {"step": 3}}
    assert torch.equal(stored.read("w", None), whole) and torch.equal(stored.read("w", 1, (2, 5)), whole[1, 2:5])
    random = numpy.random.default_rng(2)
    for _ in range(100):
        offsets = [int(random.integers(size)) for size in whole.shape]
        sizes = [int(random.integers(1, size - at + 1)) for at, size in zip(offsets, whole.shape)]
        box = Box(tuple(offsets), tuple(sizes))
        expected = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes))]
        assert torch.equal(stored.read_box("w", box), expected)

"""The published 3B, 7B, 32B and 72B on the meta device: every tensor mapped once, both ways; which tensor-parallel
sizes they take."""

import json

import pytest
import torch

from megatron_papo.checkpoint.name_map import disk_name, pieces
from megatron_papo.config import ParallelConfig
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.model.parallel_sizes import check_parallel_sizes
from tests.config.test_presets import SIZES, official_tree
from tools.convert.geometry import config_tree

TENSORS = {"3b": 824, "7b": 729, "32b": 1161, "72b": 1353}
"""Counted by hand: 390 of the vision tower (32 x 12 + patches, norm and two biased layers), 12 per text layer,
embedding, norm, head."""

TENSOR_PARALLEL = {
    "sharded": {"3b": {1, 2, 4}, "7b": {1, 2, 4}, "32b": {1, 2, 4, 8}, "72b": {1, 2, 4, 8, 16}},
    "spread": {"3b": {1, 2, 4, 8, 16}, "7b": {1, 2, 4}, "32b": {1, 2, 4, 8}, "72b": {1, 2, 4, 8, 16, 32, 64}},
}
"""Common divisors of heads, MLP widths and vocabulary, with a spread tower of the text's alone. 16 ranks share the 8
key-value groups of the 72B model in pairs."""


def hf_config(tree, directory):
    (directory / "config.json").write_text(json.dumps(tree))
    return read_hf_config(directory)


@pytest.fixture(params=SIZES)
def size(request):
    return request.param


def test_every_tensor_is_mapped_exactly_once(size, tmp_path):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    plan = pieces(hf_config(official_tree(size), tmp_path))
    ours = [(name, shape) for piece in plan for name, shape in piece.hf_shapes.items()]
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(tmp_path))
    theirs = {disk_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if SIZES[size][7]:
        theirs.pop("lm_head.weight", None)
    assert len(ours) == len(dict(ours)) == TENSORS[size] and dict(ours) == theirs
    assert sum(torch.Size(shape).numel() for shape in theirs.values()) == SIZES[size][8]


def test_the_way_back_makes_every_tensor_once_in_its_shape(size, tmp_path):
    """Each piece's Megatron tensor, and no two pieces the same, goes back into the shapes that it came from."""
    hf = hf_config(official_tree(size), tmp_path)
    plan = pieces(hf)
    assert len({(piece.megatron, piece.layer) for piece in plan}) == len(plan)
    for piece in plan:
        parts = piece.layout.to_hf(torch.empty(piece.megatron_shape, device="meta"), hf)
        assert [tuple(part.shape) for part in parts] == list(piece.hf_shapes.values()), piece.name
        assert torch.Size(piece.megatron_shape).numel() == sum(part.numel() for part in parts)
        layers = hf.text.num_layers if "language_model" in piece.megatron else hf.vision.depth
        assert piece.layer is None or 0 <= piece.layer < layers == piece.num_layers


def test_a_map_with_a_gap_would_be_noticed(tmp_path):
    hf = hf_config(official_tree("3b"), tmp_path)
    names = [name for piece in pieces(hf)[1:] for name in piece.hf_shapes]
    assert len(names) < TENSORS["3b"]


@pytest.mark.parametrize("vision_tower", TENSOR_PARALLEL)
def test_tensor_parallel_sizes(size, vision_tower, tmp_path):
    """Every size up to 64: taken, or refused with a number that it does not divide."""
    hf = hf_config(official_tree(size), tmp_path)
    taken = set()
    for tp in range(1, 65):
        try:
            check_parallel_sizes(hf, ParallelConfig(tensor_model_parallel_size=tp, vision_tower=vision_tower))
            taken.add(tp)
        except UserError as error:
            words = str(error).replace(":", "").split()
            if "key-value" in words:
                continue
            number = int(words[words.index("choose") - 1])
            assert number % tp and f"tensor_model_parallel_size {tp} does not divide the" in str(error)
    assert taken == TENSOR_PARALLEL[vision_tower][size]


def test_the_benchmark_has_the_published_geometry(size, tmp_path):
    ours, published = (hf_config(tree, tmp_path) for tree in (config_tree(size), official_tree(size)))
    for which in ("text", "vision"):
        assert getattr(ours, which) == getattr(published, which)
    assert ours.tie_word_embeddings == published.tie_word_embeddings

"""tools.saliency on a tiny random DINOv2: the maps are transformers' own attentions, picture by picture; a second run
makes only what is missing; stage 1's reader and the masking take them.

NOT covered here: a trained DINOv2.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_papo.pictures.masking import black_squares
from megatron_papo.pictures.preprocess import open_saliency
from tests.helpers import ROOT
from tools.saliency import MEAN, STD, map_of

PICTURES = {"a.png": (60, 40), "b.png": (33, 90), "c.png": (56, 56)}


def saliency(*arguments):
    command = [sys.executable, "-m", "tools.saliency", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model of 4 heads and 2 layers, three pictures in two rows and one without."""
    from transformers import Dinov2Config, Dinov2Model

    work = tmp_path_factory.mktemp("saliency")
    torch.manual_seed(3)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)
    config.initializer_range = 0.5  # attention that is not flat
    Dinov2Model(config).save_pretrained(work / "dino")
    generator = np.random.default_rng(1)
    (work / "data").mkdir()
    for name, (width, height) in PICTURES.items():
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(work / "data" / name)
    rows = [{"problem": "?", "images": ["a.png", "b.png"]}, {"problem": "!", "images": "c.png"}, {"problem": "text"}]
    (work / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return work


def expected(work, name, size):
    """By transformers, one picture at a time; the class token's row, without the class token."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(work / "dino", attn_implementation="eager").eval()
    picture = Image.open(work / "data" / name).resize((size, size), Image.Resampling.BICUBIC)
    pixels = (torch.from_numpy(np.array(picture)).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    attention = model(pixel_values=pixels.permute(2, 0, 1)[None], output_attentions=True).attentions
    of_heads = [[head[0][1:] for head in layer[0]] for layer in attention]
    return [(sum(heads) / len(heads)).reshape(size // 14, size // 14).detach().numpy() for heads in of_heads]


def test_maps_are_the_attention_of_the_last_layer_and_a_second_run_makes_what_is_missing(work):
    data = work / "data"
    arguments = ("--model", work / "dino", "--data", data, "--size", 70, "--batch-size", 2)
    done = saliency(*arguments)
    assert done.returncode == 0, done.stderr
    for name in PICTURES:
        first, last = expected(work, name, 70)
        made = np.load(data / map_of(name))
        np.testing.assert_allclose(made, last, rtol=1e-4, atol=1e-7)  # fp32, another batch
        assert np.abs(made - first).max() > 1e-3 and np.ptp(made) > 1e-3  # the control: another layer; not flat
    rows = [json.loads(line) for line in (data / "train.saliency.jsonl").read_text().splitlines()]
    assert [len(row["saliency"]) for row in rows] == [2, 1, 0] and rows[0]["problem"] == "?"
    of_map = open_saliency(data, rows[0]["saliency"][0])
    squares = black_squares((60, 40), strategy="semantic", ratio=0.3, square_pixels=14, seed=1, saliency=of_map)
    assert squares.sum() == round(0.3 * squares.size)

    kept, missing = data / map_of("a.png"), data / map_of("c.png")
    before = kept.stat().st_mtime_ns
    missing.unlink()
    assert saliency(*arguments).returncode == 0
    assert missing.exists() and kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "model, data, problem",
    [
        ("dino", "empty", "no .jsonl files"),
        ("other", "data2", "a model of type bert: give the directory of a DINOv2 checkpoint"),
        ("dino", "damaged", "train.jsonl:1: column images holds no paths"),
    ],
)
def test_what_it_cannot_use_is_one_line(work, model, data, problem):
    for name in ("empty", "data2", "damaged", "other"):
        (work / name).mkdir(exist_ok=True)
    (work / "other" / "config.json").write_text('{"model_type": "bert"}')
    Image.new("RGB", (30, 30)).save(work / "data2" / "x.png")
    (work / "data2" / "train.jsonl").write_text('{"images": ["x.png"]}\n')
    (work / "damaged" / "train.jsonl").write_text('{"images": [7]}\n')
    done = saliency("--model", work / model, "--data", work / data)
    assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr

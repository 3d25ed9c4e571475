"""A real SGLang server for all tests that need one, two checkpoints of the demo's sizes, and prompts with awkward
pictures."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_papo.config_files import load_config
from megatron_papo.pictures.preprocess import PictureSettings, load_images, to_data_uri
from megatron_papo.run.records import Prompt
from megatron_papo.sglang import server as sglang_server
from megatron_papo.sglang.client import SglangClient
from megatron_papo.sglang.requests import Request
from tests.helpers import DEMO_CONFIG

MIN_PIXELS, MAX_PIXELS = 3136, 50176
QUESTIONS = {  # id -> pictures, text; sizes: as they are, resized, enlarged (below the minimum), two at once, none
    "plain": (["a.png"], "How many squares are there?"),
    "resized": (["b.png"], "You first think through"),
    "two": (["a.png", "c.png"], "How many squares are there?"),
    "text": ([], "How many squares are there?"),
}
SIZES = {"a.png": (84, 56), "b.png": (301, 200), "c.png": (30, 61)}


@dataclass(frozen=True)
class Checkpoints:
    first: Path
    second: Path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Checkpoints:
    """Two random models with the sizes of the demo's, so that one server can load either; nothing in them is 0 or 1."""
    from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model

    root = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("first", "second"), 11):
        make_tiny_model(root / name, seed, TinySizes(initializer_range=0.15, random_biases_and_norms=True))
    return Checkpoints(root / "first", root / "second")


@pytest.fixture(scope="session")
def server_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("server")
    yield path
    sglang_server.stop(path)


@pytest.fixture(scope="module")
def server(server_dir, checkpoints):
    """Started by the first module, found again by the others."""
    config = load_config(DEMO_CONFIG)
    return sglang_server.connect_or_start(server_dir, checkpoints.first, config.server, config.model.dtype)


@pytest.fixture
def client(server, checkpoints) -> SglangClient:
    """With the first checkpoint's weights, under the version "first"."""
    client = SglangClient([server], concurrency=32, timeout_seconds=60)
    client.update_weights(checkpoints.first, "first")
    return client


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(5)
    for name, (width, height) in SIZES.items():
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / name)
    return root


@pytest.fixture(scope="session")
def prompts(checkpoints, pictures) -> dict[str, Prompt]:
    """Token counts by transformers' own image processor."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoints.first / "tokenizer.json"))
    made = {}
    for name, (files, text) in QUESTIONS.items():
        pads = "<|vision_start|><|image_pad|><|vision_end|>" * len(files)
        ids = tokenizer.encode(f"<|im_start|>user\n{pads}{text}<|im_end|>\n<|im_start|>assistant\n").ids
        image_tokens = (
            sum(int(grid.prod()) // 4 for grid in processed(pictures, files)["image_grid_thw"]) if files else 0
        )
        made[name] = Prompt(
            id=name,
            problem=text,
            answer="3",
            token_ids=ids,
            num_tokens=len(ids) - len(files) + image_tokens,
            images=files,
        )
    return made


def processed(root: Path, files: list[str]) -> dict:
    """pixel_values and image_grid_thw of native pictures, by transformers."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS})
    return processor(images=[Image.open(root / file).convert("RGB") for file in files], return_tensors="pt")


def request_for(prompt: Prompt, root: Path, seed: int, group: str | None = None) -> Request:
    """As the stages make it: the resized pictures as data URIs."""

    def load():
        return [
            to_data_uri(picture)
            for picture in load_images(root, prompt.images, PictureSettings(MIN_PIXELS, MAX_PIXELS))
        ]

    return Request(prompt, seed, images=load, group=group)

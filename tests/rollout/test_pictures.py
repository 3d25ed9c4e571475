"""The pictures of a group are loaded and encoded once, however many of its requests ask at the same time."""

import threading
import time

import pytest
from PIL import Image

from megatron_papo.config import MaskedImageConfig
from megatron_papo.errors import UserError
from megatron_papo.pictures.preprocess import PictureSettings
from megatron_papo.rollout import pictures as rollout_pictures
from megatron_papo.rollout.pictures import Pictures
from megatron_papo.run.records import Prompt

SETTINGS = PictureSettings(784, 78400)


def prompt_of(name):
    return Prompt(id=name, problem="", answer="", token_ids=[1], num_tokens=1, images=[name])


def pictures_of(root, kept):
    return Pictures(root, SETTINGS, MaskedImageConfig(), kept=kept)


def asked_at_once(ask, times):
    """What each of so many threads gets."""
    start, found = threading.Barrier(times), []

    def one():
        start.wait()
        try:
            found.append(ask())
        except UserError as error:
            found.append(error)

    threads = [threading.Thread(target=one) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def loads(tmp_path, monkeypatch):
    """Names of the pictures that are loaded, each of which takes a while."""
    for number in range(3):
        Image.new("RGB", (56, 56), (number * 50, 0, 0)).save(tmp_path / f"{number}.png")
    made, before = [], rollout_pictures.load_images

    def slowly(root, names, *rest):
        made.append(names[0])
        time.sleep(0.2)
        return before(root, names, *rest)

    monkeypatch.setattr(rollout_pictures, "load_images", slowly)
    return made


def test_whoever_asks_meanwhile_waits(tmp_path, loads):
    pictures = pictures_of(tmp_path, kept=2)
    found = asked_at_once(pictures.of(prompt_of("0.png")), 5)
    assert loads == ["0.png"] and len(found) == 5 and len(set(found)) == 1
    assert pictures.of(prompt_of("1.png"))() != found[0]  # the control: another picture
    pictures.of(prompt_of("0.png"), 3)()  # masked
    pictures.of(prompt_of("1.png"))()
    assert loads == ["0.png", "1.png", "0.png"]
    pictures.of(prompt_of("0.png"))()  # it is none of the last two
    assert loads == ["0.png", "1.png", "0.png", "0.png"]


def test_an_error_reaches_all_and_is_not_remembered(tmp_path, loads):
    pictures = pictures_of(tmp_path, kept=2)
    found = asked_at_once(pictures.of(prompt_of("gone.png")), 3)
    assert all(isinstance(error, UserError) and "gone.png" in str(error) for error in found)
    Image.new("RGB", (56, 56)).save(tmp_path / "gone.png")
    assert pictures.of(prompt_of("gone.png"))()[0].startswith("data:image/png")

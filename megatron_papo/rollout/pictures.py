"""A prompt's pictures as the server gets them: resized, masked where a seed says so, as data URIs, once for a group."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from megatron_papo.config import MaskedImageConfig
from megatron_papo.pictures.preprocess import PictureSettings, load_images, to_data_uri
from megatron_papo.run.records import Prompt
from megatron_papo.sglang.requests import Request


class Pictures:
    """Loads prompts' pictures; those of the last `kept` prompts are remembered for the rest of their group.

    Any number of threads may ask: whoever asks for what another one is loading waits for that.
    """

    def __init__(self, root: Path, settings: PictureSettings, masking: MaskedImageConfig, *, kept: int):
        """
        Args:
            root: the directory that the prompts' paths start from.
            settings: how pictures are opened and resized.
            masking: how a masked picture is masked.
            kept: how many prompts' pictures are remembered.
        """
        self._root, self._settings, self._masking = root, settings, masking
        self._kept, self._lock = kept, Lock()
        self._loaded: OrderedDict[tuple, Future[tuple[str, ...]]] = OrderedDict()

    def of(self, prompt: Prompt, masked_image_seed: int | None = None) -> Callable[[], Sequence[str]]:
        """Return a function that gives the prompt's pictures, masked with that seed; None: as they are."""
        return partial(self._load, tuple(prompt.images), tuple(prompt.saliency), masked_image_seed)

    def _load(self, *asked: Any) -> tuple[str, ...]:
        with self._lock:
            loads = asked not in self._loaded
            future = self._loaded.setdefault(asked, Future())
            self._loaded.move_to_end(asked)
            while len(self._loaded) > max(1, self._kept):
                self._loaded.popitem(last=False)
        if loads:
            try:
                future.set_result(self._load_anew(*asked))
            except BaseException as error:
                with self._lock:
                    self._loaded.pop(asked, None)
                future.set_exception(error)
        return future.result()

    def _load_anew(self, names: tuple[str, ...], saliency: tuple[str, ...], seed: int | None) -> tuple[str, ...]:
        masking = None if seed is None else self._masking
        loaded = load_images(self._root, list(names), self._settings, masking, seed, saliency)
        return tuple(to_data_uri(picture) for picture in loaded)


def probe_of(prompts: Sequence[Prompt], pictures: Pictures) -> Request:
    """Return a request that shows whether new weights were loaded: a prompt, with pictures if any prompt has some."""
    chosen = next((prompt for prompt in prompts if prompt.images), prompts[0])
    return Request(chosen, 0, pictures.of(chosen))

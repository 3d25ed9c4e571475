"""What a user sees while something runs: progress bars, and no warning that nobody can act on."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
TERMINAL = "PAPO_TERMINAL"
"""Set by run_all.sh where its output goes to a terminal, which its stages, behind a pipe, cannot see."""
SECONDS_BETWEEN_LINES = 30.0
"""Where the output is a file, a bar is a line now and then."""
NOISY_MODULES = (
    r"megatron\.core\.",
    r"torch\.distributed\.",
    r"megatron_papo\.distributed\.cpu_backend",
    r"deepspeed\.",
    r"PIL\.",
)
"""They warn on every rank of what they do without TransformerEngine and of torch functions they will have to give up;
PIL of odd tags in pictures."""
NOISY_LOGGERS = (
    "megatron.core.dist_checkpointing.serialization",
    "DeepSpeed",
    "torch.distributed.elastic",
    "PIL",
    "datasets.load",
    "datasets.packaged_modules.cache",
)
"""The first takes metrics and hf/ beside the weights for a broken checkpoint, and says so at each save; the last two
say at each reading that a data set comes from the cache, as asked for without a network."""


def is_terminal() -> bool:
    """Say whether a person looks at the output of this process."""
    return sys.stderr.isatty() or os.environ.get(TERMINAL) == "1"


def quiet() -> None:
    """Silence, for this process, what libraries say that a user can do nothing about."""
    for module in NOISY_MODULES:
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=module)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def progress_bar(total: int | None, title: str, unit: str, speaks: bool = True) -> tqdm:
    """Return a progress bar, one per stage.

    Args:
        total: Units in all; None: not known.
        title: What is being done.
        unit: Of the count, e.g. "rollout".
        speaks: Whether this process shows it.
    """
    interval = 1.0 if is_terminal() else SECONDS_BETWEEN_LINES
    return tqdm(total=total, desc=title, unit=f" {unit}", disable=not speaks, mininterval=interval)


def counted(items: Iterable[Item], bar: tqdm) -> Iterator[Item]:
    """Yield the items, each of which moves the bar by one."""
    for item in items:
        yield item
        bar.update()

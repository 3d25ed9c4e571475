"""A progress bar by bytes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def byte_progress(title: str, checkpoint, passes: int = 2) -> Iterator[Callable[[int], None]]:
    """Over all tensors of an opened checkpoint, `passes` times (written, read back)."""
    total = passes * sum(info.num_bytes for info in checkpoint.tensors.values())
    with tqdm(desc=title, total=total, unit="B", unit_scale=True, unit_divisor=1024, mininterval=0.5) as bar:
        yield bar.update

"""The counting task as rows of a data set."""

import io
from collections.abc import Iterator

from megatron_papo.config import SyntheticTaskConfig
from megatron_papo.data.rows import SourceRow
from megatron_papo.seeds import derive_seed
from megatron_papo.synthetic.counting_task import PROBLEM, GridCountTask


def synthetic_rows(
    config: SyntheticTaskConfig, seed: int, name: str, count: int, with_target: bool
) -> Iterator[SourceRow]:
    """Return `count` rows of the set `name`; sets of different names are drawn from different seeds.

    Args:
        config: of the task.
        seed: of the run.
        name: of the set: train, sft, ...
        count: how many.
        with_target: whether rows have a response to learn.
    """
    task = GridCountTask(config)
    for index in range(count):
        sample = task.render(derive_seed(seed, "synthetic", name, index))
        png = io.BytesIO()
        sample.image.save(png, "PNG")
        yield SourceRow(
            place=f"synthetic {name}:{index + 1}",
            id=f"{name}-{index + 1}",
            problem=PROBLEM,
            answer=sample.answer,
            images=[png.getvalue()],
            image_root=None,
            target=sample.target if with_target else None,
        )

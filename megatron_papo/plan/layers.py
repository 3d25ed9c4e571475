"""A few layers traced, all of them told: what layers of one kind add is the same for each."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from megatron_papo.config import Config, ParallelConfig
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.plan.trace import Numbers
from megatron_papo.plan.workload import Lengths

Trace = Callable[[Config, HFConfig, int, Lengths], Numbers]


@dataclass(frozen=True)
class Place:
    """Where a rank stands in a layout, by megatron-core's order."""

    rank: int
    tensor: int
    pipeline: int
    data: int

    @classmethod
    def of(cls, rank: int, parallel: ParallelConfig) -> "Place":
        tensor, data = parallel.tensor_model_parallel_size, parallel.data_parallel_size
        return cls(rank, rank % tensor, rank // (tensor * data), rank // tensor % data)


@dataclass(frozen=True)
class Layers:
    """Numbers of layers on a pipeline stage, by kind."""

    decoder: int
    windowed: int
    whole: int
    """Of the vision tower: those that attend within windows, and to the whole picture."""

    def of_model(self, hf: HFConfig, stages: int) -> HFConfig:
        """Return a model with so many layers, its tower ending with the kind that the model's own ends with."""
        depth, last_is_whole = self.windowed + self.whole, hf.vision.depth - 1 in hf.vision.full_attention_layers
        first = self.windowed if last_is_whole else 0
        return replace(
            hf,
            text=replace(hf.text, num_layers=self.decoder * stages),
            vision=replace(hf.vision, depth=depth, full_attention_layers=tuple(range(first, first + self.whole))),
        )


FEW = Layers(2, 2, 1)
"""Enough that a first and a last layer differ from one between."""


def layers_of(hf: HFConfig, stages: int) -> Layers:
    """Return the numbers of layers of a model on its first pipeline stage."""
    whole = len(set(hf.vision.full_attention_layers))
    return Layers(hf.text.num_layers // stages, hf.vision.depth - whole, whole)


def told(trace: Trace, config: Config, hf: HFConfig, rank: int, lengths: Lengths) -> Numbers:
    """Return what `trace` finds of a rank, from traces of a model with few layers.

    With n and n + 1 layers of a kind a number differs by what one layer adds. Exact where a number grows evenly, as all
    of trace.Numbers do but for padding of a few hundred bytes.
    """
    stages = config.parallel.pipeline_model_parallel_size
    whole = layers_of(hf, stages)
    few = Layers(*(min(getattr(FEW, field.name), getattr(whole, field.name)) for field in fields(Layers)))
    kinds = [field.name for field in fields(Layers) if getattr(whole, field.name) > getattr(few, field.name)]
    if Place.of(rank, config.parallel).pipeline > 0:
        kinds = [kind for kind in kinds if kind == "decoder"]  # the tower is on the first stage
    if sum(getattr(whole, kind) - getattr(few, kind) for kind in kinds) <= len(kinds):
        return trace(config, hf, rank, lengths)
    base = trace(config, few.of_model(hf, stages), rank, lengths)
    numbers = dict(base)
    for kind in kinds:
        count = getattr(few, kind)
        more = trace(config, replace(few, **{kind: count + 1}).of_model(hf, stages), rank, lengths)
        for name in base:
            numbers[name] += (getattr(whole, kind) - count) * (more.get(name, 0) - base[name])
    return numbers

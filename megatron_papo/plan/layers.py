"""A few layers traced, all of them told: what layers of one kind add is the same for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from megatron_papo.config import Config
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.plan.fake_device import Place
from megatron_papo.plan.trace import Numbers


class Asked(NamedTuple):
    """What trace.trace takes."""

    config: Config
    hf: HFConfig
    rank: int


Traces = Callable[[Sequence[Asked]], list[Numbers]]
"""What makes traces, all that are asked for at once, in that order."""


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


@dataclass(frozen=True)
class Share:
    """A trace, and how often its numbers are added to make those of a rank."""

    asked: Asked
    times: int


def shares_of(config: Config, hf: HFConfig, rank: int, exact: bool = False) -> list[Share]:
    """Return the traces that a rank's numbers are added up from: of a model with few layers.

    With n and n + 1 layers of a kind a number differs by what one layer adds. Exact where a number grows evenly, as all
    of trace.Numbers do but for padding of a few hundred bytes. exact: one trace of all layers.
    """
    stages = config.parallel.pipeline_model_parallel_size
    whole = layers_of(hf, stages)
    few = Layers(*(min(getattr(FEW, field.name), getattr(whole, field.name)) for field in fields(Layers)))
    more = {field.name: getattr(whole, field.name) - getattr(few, field.name) for field in fields(Layers)}
    if Place.of(rank, config.parallel).pipeline > 0:
        more = {"decoder": more["decoder"]}  # the tower is on the first stage
    more = {kind: count for kind, count in more.items() if count > 0}
    if exact or sum(more.values()) <= len(more):
        return [Share(Asked(config, hf, rank), 1)]
    shares = [Share(Asked(config, few.of_model(hf, stages), rank), 1 - sum(more.values()))]
    for kind, count in more.items():
        one_more = replace(few, **{kind: getattr(few, kind) + 1})
        shares.append(Share(Asked(config, one_more.of_model(hf, stages), rank), count))
    return shares


def added(shares: Sequence[Share], numbers: Sequence[Numbers]) -> Numbers:
    """Return the numbers of a rank from those of its shares' traces."""
    names = numbers[0]
    return {
        name: sum(share.times * of_trace.get(name, 0) for share, of_trace in zip(shares, numbers, strict=True))
        for name in names
    }


def told(traces: Traces, config: Config, hf: HFConfig, ranks: Sequence[int], exact: bool = False) -> list[Numbers]:
    """Return the numbers of some ranks, asking for all traces at once."""
    by_rank = [shares_of(config, hf, rank, exact) for rank in ranks]
    made = iter(traces([share.asked for shares in by_rank for share in shares]))
    return [added(shares, [next(made) for _ in shares]) for shares in by_rank]

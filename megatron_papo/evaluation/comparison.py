"""Checkpoints beside each other on the sets of a suite: what tools.compare prints.

Everything that is said of a difference comes from one cluster bootstrap over problems (statistics.bootstrap_averages),
in which all sets, checkpoints and kinds of pictures are drawn together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from megatron_papo.evaluation import published, statistics
from megatron_papo.evaluation.comparable import Row, in_order, require_comparable
from megatron_papo.evaluation.scores import SetScores, set_scores, sets_by_group
from megatron_papo.evaluation.statistics import Floats, OverSeeds, PromptScores
from megatron_papo.reading import shown
from megatron_papo.run.records import ImageShown, Protocol

SEED = 1
"""Of the bootstrap."""
Interval = tuple[float, float]
Json = dict[str, object]


@dataclass(frozen=True)
class VisionGain:
    """What the picture is worth: avg@k with it minus avg@k without, over the same prompts."""

    avg: float
    """Without the picture, or with it masked."""
    gain: statistics.Estimate
    change: statistics.Estimate | None
    """The gain minus that of the baseline."""


@dataclass(frozen=True)
class Rates:
    """What stands beside an average: means over the sets, and over the runs of a row. None: not known."""

    pass_at_k: float
    """k: the number of samples; where that differs, the smallest."""
    maj: float | None
    """maj@k, k the number of samples; None where that differs."""
    format: float
    cut_off: float | None
    timed_out: float
    unparsed: float
    mean_tokens: float | None


@dataclass(frozen=True)
class Cell:
    """A row's numbers on a set, a group or all sets; shares, not percent. None: not known, or no baseline."""

    avg: float
    standard_error: float | None = None
    difference: float | None = None
    """To the baseline."""
    interval: Interval | None = None
    """Of the difference, 95 %."""
    p: float | None = None
    p_corrected: float | None = None
    """For the number of sets in the row; None for groups."""
    relative_gain: float | None = None
    detectable: float | None = None
    """The smallest difference to the baseline that this many prompts would have shown (statistics)."""
    seeds: OverSeeds | None = None
    seeds_interval: Interval | None = None
    """Of the difference, over training seeds, where a side is several runs."""
    vision: Mapping[ImageShown, VisionGain] = field(default_factory=dict)
    """By what was shown instead of the pictures."""
    rates: Rates | None = None
    sampling_share: float | None = None
    """Which part of the squared standard error comes from sampling, the rest from which prompts are in the set: an
    estimate, which small sets may drive to 1."""
    few_problems: bool = False
    """Of the set, or of one of the sets: p is not to be trusted."""

    @property
    def is_marked(self) -> bool:
        """Whether the difference is one at a level of .05, over prompts and, where a side is several training runs,
        over seeds as well, and there are enough problems to say so."""
        p = self.p if self.p_corrected is None else self.p_corrected
        low, high = self.seeds_interval or (1.0, 1.0)
        return p is not None and p < statistics.LEVEL and (low > 0 or high < 0) and not self.few_problems

    def as_json(self) -> Json:
        names = ("avg", "standard_error", "difference", "interval", "p", "p_corrected", "relative_gain")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class RowScores:
    """A row of the table."""

    name: str
    sets: dict[str, Cell]
    """Those that it has."""
    groups: dict[str, Cell]
    """Those of which it has every set."""
    overall: Cell | None
    published: bool = False
    runs: int = 1
    samples: dict[str, int | None] = field(default_factory=dict)
    """k of avg@k, of every set; None where its runs have different ones."""
    chosen_on: frozenset[str] = frozenset()
    """Sets by which keep_best chooses checkpoints of this run."""

    @property
    def cells(self) -> list[tuple[str, str, Cell]]:
        """Every cell with its kind (set, group, overall) and name."""
        cells = [("set", name, cell) for name, cell in self.sets.items()]
        cells += [("group", name, cell) for name, cell in self.groups.items()]
        return cells if self.overall is None else [*cells, ("overall", "overall", self.overall)]

    def as_json(self) -> Json:
        extra: Json = {"published": self.published, "chosen_on": sorted(self.chosen_on), "samples": self.samples}
        if self.runs > 1:
            extra["seeds"] = _by_kind(self, _json_of_seeds)
        if any(cell.detectable is not None for _, _, cell in self.cells):
            extra["detectable"] = _by_kind(self, lambda cell: cell.detectable)
        if any(cell.rates is not None for _, _, cell in self.cells):
            extra["rates"] = _by_kind(self, lambda cell: None if cell.rates is None else vars(cell.rates))
            extra["sampling_share"] = _by_kind(self, lambda cell: cell.sampling_share)
        if any(cell.vision for _, _, cell in self.cells):
            extra["vision"] = _by_kind(self, _json_of_vision)
        return {"name": self.name, **_by_kind(self, Cell.as_json), **extra}


@dataclass(frozen=True)
class Comparison:
    """A whole table."""

    rows: list[RowScores]
    sets: list[str]
    """In the order of the columns."""
    groups: dict[str, list[str]]
    """Their sets."""
    baseline: str | None
    image: ImageShown
    protocols: dict[str, Protocol]
    """Of every set, what all rows agree in."""
    prompts: dict[str, int]
    """Of every set, how many."""
    notes: list[str]

    def as_json(self) -> Json:
        return {
            "baseline": self.baseline,
            "image": self.image,
            "draws": statistics.DRAWS,
            "protocol": {name: one.protocol for name, one in self.protocols.items()},
            "prompts": self.prompts,
            "groups": self.groups,
            "notes": self.notes,
            "rows": [row.as_json() for row in self.rows],
        }


def _by_kind(row: RowScores, value: Callable[[Cell], object]) -> Json:
    return {
        "sets": {name: value(cell) for name, cell in row.sets.items()},
        "groups": {name: value(cell) for name, cell in row.groups.items()},
        "overall": None if row.overall is None else value(row.overall),
    }


def _json_of_seeds(cell: Cell) -> object:
    return None if cell.seeds is None else vars(cell.seeds) | {"interval_of_difference": cell.seeds_interval}


def _json_of_vision(cell: Cell) -> object:
    return {
        image: {
            "avg": vision.avg,
            "gain": vision.gain.value,
            "interval": vision.gain.interval,
            "p": vision.gain.p,
            "change": None if vision.change is None else vars(vision.change),
        }
        for image, vision in cell.vision.items()
    }


@dataclass(frozen=True)
class Average:
    """avg@k of a row on a set or several, or a difference of two, with its draws."""

    value: float
    draws: Floats
    by_run: tuple[float, ...] = ()

    def minus(self, other: "Average") -> "Average":
        return Average(self.value - other.value, self.draws - other.draws)

    def estimate(self) -> statistics.Estimate:
        return statistics.estimate(self.value, self.draws)


def mean_of(averages: Sequence[Average]) -> Average:
    """Return the unweighted mean over sets."""
    number = len(averages)
    by_run = tuple(sum(values) / number for values in zip(*(average.by_run for average in averages), strict=True))
    return Average(
        sum(average.value for average in averages) / number,
        np.mean([average.draws for average in averages], axis=0),
        by_run,
    )


Averages = dict[tuple[str, str, ImageShown], Average]
"""By row, set, and what was shown of the pictures."""
Scores = dict[tuple[str, str, ImageShown], PromptScores]


def compare(rows: Sequence[Row], baseline: str | None, image: ImageShown) -> Comparison:
    """Return the table of some checkpoints.

    Raises UserError where two of them were not evaluated alike, or not with `image`.

    Args:
        rows: at least one; their names differ.
        baseline: name of the row that the others are compared with; None: none.
        image: what was shown of the pictures.
    """
    names = in_published_order({name for row in rows for name in row.sets})
    notes = require_comparable(rows, names, image)
    scores = prompt_scores(rows)
    averages = averages_of(rows, names, scores)
    protocols = {name: next(row.of_set(name)[0].protocol for row in rows if name in row.sets) for name in names}
    groups = sets_by_group(names, {name: one.groups for name, one in protocols.items()})
    notes += incomplete_groups(groups, protocols) + one_run_against_several(rows, baseline)
    of_runs = {
        (row.name, name): [set_scores(one.answers[image]) for one in row.of_set(name)]
        for row in rows
        for name in row.sets
    }
    table = _Table(scores, averages, of_runs, baseline, image)
    prompts = {name: next(len(numbers.scores) for key, numbers in scores.items() if key[1] == name) for name in names}
    of_rows = [_row_scores(row, names, groups, table) for row in rows]
    return Comparison(of_rows, names, groups, baseline, image, protocols, prompts, notes)


def incomplete_groups(groups: Mapping[str, Sequence[str]], protocols: Mapping[str, Protocol]) -> list[str]:
    """Return which averages are over a part of their group, as the suite has it."""
    notes = []
    for group, members in groups.items():
        whole = dict.fromkeys(chain(*(protocols[name].group_sets.get(group, []) for name in members)))
        missing = [name for name in whole if name not in members]
        if missing:
            notes.append(
                f"{shown(group)}: the mean over {len(members)} of its {len(whole)} sets, without {', '.join(missing)}"
            )
    return notes


def one_run_against_several(rows: Sequence[Row], baseline: str | None) -> list[str]:
    """Return which intervals over seeds are of a row of one run against one of several."""
    runs = {row.name: len(row.runs) for row in rows}
    of_baseline = runs.get(baseline or "", 0)
    pairs = [(name, baseline) for name, number in runs.items() if 1 in (number, of_baseline) and name != baseline]
    alone = dict.fromkeys(
        shown(name if runs[name] == 1 else other)
        for name, other in pairs
        if other is not None and max(runs[name], of_baseline) > 1
    )
    return [
        f"{name} is one run, of whose spread over seeds nothing is known: in intervals of differences it has that of"
        " the several runs beside it, which is too wide where it is the start of training"
        for name in alone
    ]


def in_published_order(names: set[str]) -> list[str]:
    """Return the names of sets in the order of the published tables, others after them."""
    return [name for name in published.SETS if name in names] + sorted(names - set(published.SETS))


def prompt_scores(rows: Sequence[Row]) -> Scores:
    """Return the prompts' scores of every row, each the mean over its runs, prompts in one order for each set."""
    scores: Scores = {}
    order: dict[str, list[str]] = {}
    for row in rows:
        for name in row.sets:
            sets = row.of_set(name)
            for image in sets[0].answers:
                if all(image in one.answers for one in sets):
                    ids = order.setdefault(name, sets[0].answers[image].prompt_ids)
                    of_runs = [in_order(one, image, ids) for one in sets]
                    mean = np.mean([one.scores for one in of_runs], axis=0)
                    scores[row.name, name, image] = PromptScores(mean, of_runs[0].problems)
    return scores


def averages_of(rows: Sequence[Row], names: Sequence[str], scores: Scores) -> Averages:
    """Return avg@k and its draws of every row, set and kind of picture."""
    keys = {name: [key for key in scores if key[1] == name] for name in names}
    sets = {
        name: PromptScores(np.stack([scores[key].scores for key in of_set], axis=1), scores[of_set[0]].problems)
        for name, of_set in keys.items()
    }
    drawn = statistics.bootstrap_averages(sets, seed=SEED)
    by_name = {row.name: row for row in rows}
    averages: Averages = {}
    for name, of_set in keys.items():
        for column, key in enumerate(of_set):
            by_run = tuple(float(one.answers[key[2]].right.mean()) for one in by_name[key[0]].of_set(name))
            averages[key] = Average(float(scores[key].scores.mean()), drawn[name][:, column], by_run)
    return averages


@dataclass(frozen=True)
class _Table:
    scores: Scores
    averages: Averages
    of_runs: Mapping[tuple[str, str], Sequence[SetScores]]
    """By row and set."""
    baseline: str | None
    image: ImageShown

    def cell(self, row: str, names: Sequence[str]) -> Cell:
        """Return the cell of a row for the mean over some sets, which it has."""
        own = self._mean(row, names, self.image)
        error = statistics.standard_error([self.scores[row, name, self.image] for name in names])
        cell = Cell(
            own.value,
            error,
            seeds=statistics.over_seeds(own.by_run),
            vision={} if error is None else self._vision(row, names),
            rates=mean_rates([scores for name in names for scores in self.of_runs[row, name]]),
            sampling_share=self._sampling_share(row, names, error),
            few_problems=any(
                len(set(self.scores[row, name, self.image].problems)) < statistics.FEW_PROBLEMS for name in names
            ),
        )
        if self.baseline is None or self.baseline == row or not self._has(self.baseline, names, self.image):
            return cell
        base = self._mean(self.baseline, names, self.image)
        found = own.minus(base).estimate()
        pairs = [(self.scores[row, name, self.image], self.scores[self.baseline, name, self.image]) for name in names]
        paired = statistics.standard_error([PromptScores(new.scores - old.scores, new.problems) for new, old in pairs])
        return replace(
            cell,
            difference=found.value,
            interval=None if paired is None else found.interval,
            p=None if paired is None else found.p,
            relative_gain=statistics.relative_gain(*(self._values(which, names) for which in (row, self.baseline))),
            detectable=None if paired is None else statistics.detectable_difference(paired),
            seeds_interval=statistics.difference_over_seeds(own.by_run, base.by_run),
        )

    def _sampling_share(self, row: str, names: Sequence[str], error: float | None) -> float | None:
        """Return the mean over sets' variance from sampling, a sum over sets and runs, divided by error squared."""
        parts = [scores.variance for name in names for scores in self.of_runs[row, name]]
        if not error or None in parts:
            return None
        return min(1.0, sum(part.within for part in parts if part) / (len(parts) ** 2 * error**2))

    def _vision(self, row: str, names: Sequence[str]) -> dict[ImageShown, VisionGain]:
        gains: dict[ImageShown, VisionGain] = {}
        others: tuple[ImageShown, ...] = ("masked", "none")
        for other in others:
            if self._has(row, names, other):
                without = self._mean(row, names, other)
                gain = self._mean(row, names, "original").minus(without)
                change = None
                if self.baseline not in (None, row) and self._has(self.baseline, names, other):
                    base = self._mean(self.baseline, names, "original").minus(self._mean(self.baseline, names, other))
                    change = gain.minus(base).estimate()
                gains[other] = VisionGain(without.value, gain.estimate(), change)
        return gains

    def _has(self, row: str, names: Sequence[str], image: ImageShown) -> bool:
        return all((row, name, image) in self.averages for name in names)

    def _mean(self, row: str, names: Sequence[str], image: ImageShown) -> Average:
        return mean_of([self.averages[row, name, image] for name in names])

    def _values(self, row: str, names: Sequence[str]) -> list[float]:
        return [self.averages[row, name, self.image].value for name in names]


def mean_rates(scores: Sequence[SetScores]) -> Rates:
    """Return the means over sets and runs, as many runs of each set."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None

    number, samples = len(scores), {one.samples_per_prompt for one in scores}
    return Rates(
        pass_at_k=sum(one.pass_at[min(samples)] for one in scores) / number,
        maj=sum(one.maj for one in scores) / number if len(samples) == 1 else None,
        format=sum(one.format for one in scores) / number,
        cut_off=mean([one.cut_off for one in scores]),
        timed_out=sum(one.timed_out for one in scores) / number,
        unparsed=sum(one.unparsed for one in scores) / number,
        mean_tokens=mean([one.mean_tokens for one in scores]),
    )


def _row_scores(row: Row, names: Sequence[str], groups: Mapping[str, Sequence[str]], table: _Table) -> RowScores:
    sets = {name: table.cell(row.name, [name]) for name in names if name in row.sets}
    compared = {name: cell.p for name, cell in sets.items() if cell.p is not None}
    corrected = dict(zip(compared, statistics.benjamini_hochberg([*compared.values()]), strict=True))
    everything = chain(*(row.of_set(name) for name in row.sets))
    return RowScores(
        row.name,
        {name: replace(cell, p_corrected=corrected.get(name)) for name, cell in sets.items()},
        {group: table.cell(row.name, members) for group, members in groups.items() if set(members) <= set(row.sets)},
        table.cell(row.name, names) if set(names) <= set(row.sets) else None,
        runs=len(row.runs),
        samples={name: _samples(row, name) for name in row.sets},
        chosen_on=frozenset(one.protocol.set for one in everything if one.protocol.chosen_on),
    )


def _samples(row: Row, name: str) -> int | None:
    """Return the number of samples of all runs of a row; None where they differ."""
    numbers = {one.answers["original"].right.shape[1] for one in row.of_set(name)}
    return numbers.pop() if len(numbers) == 1 else None


def with_published(comparison: Comparison, table: str) -> Comparison:
    """Return a table with the published rows that fit, and notes of what is not as it was there.

    Args:
        comparison: the table.
        table: name in published.TABLES.
    """
    rows = published_rows(table, comparison.sets, comparison.groups)
    notes = [] if rows else [f"published {table}: no row of it is about these sets or groups"]
    prompts = [
        f"{name} {number:,} of {published.PROMPTS[name]:,}"
        for name, number in comparison.prompts.items()
        if number != published.PROMPTS.get(name, number)
    ]
    if rows and prompts:
        notes.append(
            f"not the published prompts, by their number: {', '.join(prompts)}: do not hold these against them"
        )
    settings: dict[str, list[str]] = {}
    for name in (name for name in published.SETS if name in comparison.protocols):
        own = comparison.protocols[name].protocol
        for key, value in published.SAMPLING.items():
            if own.get(key) != value:
                settings.setdefault(f"{key} {own.get(key, 'not given')}, published {value}", []).append(name)
    if rows and settings:
        words = "; ".join(f"{words} ({' '.join(names)})" for words, names in settings.items())
        notes.append(shown(f"not sampled as published: {words}", limit=0))
    return replace(comparison, rows=[*comparison.rows, *rows], notes=[*comparison.notes, *notes])


def published_rows(table: str, sets: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[RowScores]:
    """Return published results as rows: a group's average where the group has the published sets, the overall average
    where the table has all nine and no other. A row without any of these is left out.

    Args:
        table: its name in published.TABLES.
        sets: the columns.
        groups: their sets.
    """
    alike = [group for group, members in published.GROUPS.items() if set(groups.get(group, ())) == set(members)]
    rows = []
    for row in published.TABLES[table]:
        averages = {group: row.groups[group] for group in alike}
        rows.append(
            RowScores(
                row.name,
                {name: Cell(value / 100) for name, value in row.sets.items() if name in sets},
                {
                    group: Cell(value / 100, relative_gain=row.gain(group))
                    for group, value in averages.items()
                    if value is not None
                },
                Cell(row.overall / 100, relative_gain=row.gain("overall"))
                if set(sets) == set(published.SETS)
                else None,
                published=True,
            )
        )
    return [row for row in rows if row.cells]

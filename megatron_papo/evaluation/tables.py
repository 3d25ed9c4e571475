"""A comparison as a table for people: in points of percent, as text, Markdown or LaTeX."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_papo.evaluation import statistics
from megatron_papo.evaluation.comparison import Cell, Comparison, Rates, RowScores, VisionGain
from megatron_papo.reading import shown
from megatron_papo.run.records import ImageShown

CHOSEN = "†"
MARK = "*"
RATES: dict[str, Callable[[Rates], str]] = {
    "pass@k": lambda rates: _points(rates.pass_at_k),
    "maj@k": lambda rates: _points(rates.maj),
    "format": lambda rates: _points(rates.format),
    "cut off": lambda rates: _points(rates.cut_off),
    "timed out": lambda rates: _points(rates.timed_out),
    "unparsed": lambda rates: _points(rates.unparsed),
    "tokens": lambda rates: "" if rates.mean_tokens is None else f"{rates.mean_tokens:.1f}",
}
"""Lines of a row -> what they hold."""
Column = tuple[str, str]
"""Kind (set, group, overall or gain) and name."""
RowsAre = Literal["checkpoints", "sets"]
"""What the lines of a table are about."""


@dataclass(frozen=True)
class Line:
    """One line of a table."""

    label: str
    cells: list[str]
    is_average: bool = False
    """Of several sets."""


@dataclass(frozen=True)
class Grid:
    """A table before it is written: a block of lines for each checkpoint, or for each group of sets."""

    columns: list[str]
    blocks: list[list[Line]]
    notes: list[str]


def columns_of(comparison: Comparison, with_gains: bool) -> list[Column]:
    """Return the columns: the sets of each group and its average, sets of none, the average over all."""
    columns: list[Column] = []
    for group, members in comparison.groups.items():
        columns += [("set", name) for name in members if ("set", name) not in columns]
        columns += [("group", group), *([("gain", group)] if with_gains else [])]
    columns += [("set", name) for name in comparison.sets if ("set", name) not in columns]
    if len(comparison.sets) > 1:
        columns += [("overall", "overall")]
    if with_gains:
        columns += [("gain", "overall")]
    return columns


@dataclass(frozen=True)
class Wanted:
    """Which lines a row has beside average and difference."""

    vision: bool = False
    """What the picture is worth."""
    power: bool = False
    """The smallest difference that would have been shown, and which part of the error more samples would lower."""
    rates: bool = False
    """pass@k, maj@k, format, cut off and so on."""


def grid_of(comparison: Comparison, wanted: Wanted, rows_are: RowsAre | None = None) -> Grid:
    """Return the table. rows_are: what its lines are about; None: what makes it narrower."""
    with_gains = any(cell.relative_gain is not None for row in comparison.rows for _, _, cell in row.cells)
    columns = columns_of(comparison, with_gains)
    own, others = ([row for row in comparison.rows if row.published == which] for which in (False, True))
    blocks = [_block(row, columns, comparison.baseline, wanted) for row in own]
    blocks += [[_block(row, columns, None, Wanted())[0] for row in others]] if others else []
    names = [shown(f"gain {name}" if kind == "gain" else name) for kind, name in columns]
    grid = Grid(names, blocks, _notes(comparison, wanted))
    narrower: RowsAre = "sets" if sum(map(len, blocks)) < len(columns) else "checkpoints"
    return turned(grid, [kind for kind, _ in columns]) if (rows_are or narrower) == "sets" else grid


def turned(grid: Grid, kinds: Sequence[str]) -> Grid:
    """Return a table with its columns as lines: a block for the sets of a group and their average, one for that of all.

    Args:
        grid: whose lines become the columns.
        kinds: of its columns.
    """
    lines = [*chain(*grid.blocks)]
    blocks: list[list[Line]] = []
    for place, (name, kind) in enumerate(zip(grid.columns, kinds, strict=True)):
        if not blocks or kind == "overall" or (kind == "set" and kinds[place - 1] != "set"):
            blocks.append([])
        blocks[-1].append(Line(name, [line.cells[place] for line in lines], kind != "set"))
    return Grid([line.label.strip() for line in lines], blocks, grid.notes)


def _block(row: RowScores, columns: Sequence[Column], baseline: str | None, wanted: Wanted) -> list[Line]:
    cells = {(kind, name): cell for kind, name, cell in row.cells}
    gains = {name: cell.relative_gain for kind, name, cell in row.cells if kind != "set"}

    def line(label: str, words: Callable[[Cell], str]) -> Line:
        return Line(label, [words(cells[column]) if column in cells else "" for column in columns])

    label = f"{row.name} (published)" if row.published else row.name
    first = [
        _signed(gains.get(name), " %") if kind == "gain" else _average(cells.get((kind, name)), name in row.chosen_on)
        for kind, name in columns
    ]
    lines = [Line(label, first)]
    if row.runs > 1:
        lines += [
            line(f"  sd of {row.runs} seeds", lambda cell: _points(cell.seeds.deviation) if cell.seeds else ""),
            line("  95 % over seeds", lambda cell: _interval(_cut(cell.seeds.interval), "") if cell.seeds else ""),
        ]
    if any(cell.difference is not None for cell in cells.values()):
        lines += [
            line(f"  minus {baseline}", lambda cell: _signed(cell.difference, MARK if cell.is_marked else "")),
            line("  95 %", lambda cell: _interval(cell.interval)),
        ]
        if any(cell.seeds_interval for cell in cells.values()):
            lines.append(line("  95 % of it over seeds", lambda cell: _interval(cell.seeds_interval)))
        if wanted.power:
            lines.append(line("  detectable", lambda cell: _points(cell.detectable)))
    if wanted.power:
        lines.append(line("  from sampling", lambda cell: _points(cell.sampling_share)))
    for label, of_rates in RATES.items() if wanted.rates else ():
        lines.append(line(f"  {label}", _of_rates(of_rates)))
    shown_instead: dict[ImageShown, str] = {"masked": "masked", "none": "no picture"}
    for image, words in shown_instead.items() if wanted.vision else ():
        lines += _vision_lines(image, words, list(cells.values()), line)
    return lines


def _of_rates(value: Callable[[Rates], str]) -> Callable[[Cell], str]:
    return lambda cell: "" if cell.rates is None else value(cell.rates)


def _vision_lines(
    image: ImageShown, words: str, cells: Sequence[Cell], line: Callable[[str, Callable[[Cell], str]], Line]
) -> list[Line]:
    if not any(image in cell.vision for cell in cells):
        return []

    def of(value: Callable[[VisionGain], str]) -> Callable[[Cell], str]:
        return lambda cell: value(cell.vision[image]) if image in cell.vision else ""

    lines = [
        line(f"  {words}", of(lambda vision: _points(vision.avg))),
        line(f"  vision gain ({words})", of(lambda vision: _signed(vision.gain.value))),
        line("  95 %", of(lambda vision: _interval(vision.gain.interval))),
    ]
    if any(image in cell.vision and cell.vision[image].change for cell in cells):
        lines += [
            line("  its change", of(lambda vision: _signed(vision.change.value) if vision.change else "")),
            line("  95 %", of(lambda vision: "" if vision.change is None else _interval(vision.change.interval))),
        ]
    return lines


def _points(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _signed(share: float | None, after: str = "") -> str:
    return "" if share is None else f"{100 * share:+.2f}{after}"


def _average(cell: Cell | None, chosen: bool) -> str:
    if cell is None:
        return ""
    error = "" if cell.standard_error is None else f" ±{100 * cell.standard_error:.2f}"
    return f"{100 * cell.avg:.2f}{error}{CHOSEN if chosen else ''}"


def _interval(interval: tuple[float, float] | None, sign: str = "+") -> str:
    return "" if interval is None else "..".join(f"{100 * end:{sign}.2f}" for end in interval)


def _cut(interval: tuple[float, float]) -> tuple[float, float]:
    """Return an interval of shares without what lies below none and above all."""
    low, high = interval
    return max(low, 0.0), min(high, 1.0)


def _notes(comparison: Comparison, wanted: Wanted) -> list[str]:
    """Return what a reader has to know, a line each."""
    rows = comparison.rows
    notes = [
        f"{_measure(comparison)} in percent, ± its standard error, clustered by problem; a group is the mean over its"
        " sets"
    ]
    if comparison.baseline is not None:
        notes.append(
            f"minus {comparison.baseline}: paired, with 95 % interval, from one cluster bootstrap over problems"
            f" ({statistics.DRAWS:,} draws); {MARK} p < {statistics.LEVEL:g}, of a set corrected for the sets of its"
            f" row (Benjamini-Hochberg), with {statistics.FEW_PROBLEMS} problems or more"
            + (", where the interval over seeds leaves 0 out as well" if any(row.runs > 1 for row in rows) else "")
        )
        notes.append("gain: relative, the mean over sets of (new - base) / base")
        if wanted.power:
            notes.append(
                f"detectable: a true difference of this size would be found with a probability of"
                f" {100 * statistics.POWER:.0f} %"
            )
    if wanted.power:
        notes.append(
            "from sampling: percent of the squared standard error that would shrink with more samples; the rest is"
            " which prompts are in the set"
        )
    if wanted.vision:
        lack = [row.name for row in rows if not row.published and not any(cell.vision for _, _, cell in row.cells)]
        notes += [
            f"{shown(name)} was answered with its pictures alone: evaluate again with evaluation.masked_images=true"
            " or evaluation.without_images=true"
            for name in lack
        ]
    if wanted.vision and any(cell.vision for row in rows for _, _, cell in row.cells):
        notes.append(
            "vision gain: with the picture minus without, paired, with 95 % interval; its change: minus that of the"
            " baseline"
        )
    if any(row.runs > 1 for row in rows):
        notes.append(
            "over seeds: 95 % by Student's t over training runs, of a difference by Welch's, prompts taken as they are"
        )
    if any(row.chosen_on for row in rows):
        notes.append(f"{CHOSEN} keep_best chose checkpoints by this set: it flatters them")
    if any(row.published for row in rows):
        notes.append(
            "published: avg@8 as the authors print it (arXiv 2507.06448), gains against their GRPO of the same size;"
            " not tested against; sets go by name, number of prompts and sampling"
        )
    return [*notes, *_settings(comparison), *comparison.notes]


def _measure(comparison: Comparison) -> str:
    samples = {number for row in comparison.rows for number in row.samples.values()}
    images = {"original": "", "masked": " with masked pictures", "none": " without the picture"}
    if not samples:  # published rows alone
        return "avg@8"
    k = samples.pop() if len(samples) == 1 else None
    return f"avg@{k or 'k'}{images[comparison.image]}"


def _settings(comparison: Comparison) -> list[str]:
    """Return the protocol on a line: a key with its value, or its values and the sets that have them."""
    sets_by_value: dict[str, dict[str, list[str]]] = {}
    for name, protocol in comparison.protocols.items():
        for key, value in protocol.protocol.items():
            sets_by_value.setdefault(key, {}).setdefault(shown(value, 80), []).append(name)
    words = []
    for key, values in sets_by_value.items():
        several = [f"{value} ({' '.join(names)})" for value, names in values.items()]
        words.append(f"{key} {', '.join(several if len(values) > 1 else values)}")
    return [shown(f"protocol: {'; '.join(words)}", limit=0)] if words else []


def as_text(grid: Grid) -> str:
    """Return the table for a terminal: as wide as it needs to be, for a pager or a file."""
    table = Table()
    table.add_column("")
    for column in grid.columns:
        table.add_column(Text(column), justify="right", no_wrap=True)
    for block in grid.blocks:
        for line in block:
            table.add_row(*map(Text, (line.label, *line.cells)), end_section=line is block[-1])
    stream = io.StringIO()
    Console(file=stream, width=10_000).print(table)
    return stream.getvalue() + "\n".join(grid.notes) + "\n"


def as_markdown(grid: Grid) -> str:
    """Return the table as GitHub reads it, and its notes; what comes from outside is escaped."""
    return "\n".join([*markdown_lines(grid), "", *(f"- {_markdown(note)}" for note in grid.notes), ""])


def markdown_lines(grid: Grid) -> list[str]:
    """Return the lines of the table alone; averages over sets have bold names where they are lines."""
    lines = [*chain(*grid.blocks)]
    labels = [f"**{_markdown(line.label)}**" if line.is_average else _markdown(line.label) for line in lines]
    rows = [["", *map(_markdown, grid.columns)]]
    rows += [[label, *map(_markdown, line.cells)] for label, line in zip(labels, lines, strict=True)]
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|---" + "|---:" * len(grid.columns) + "|", *body]


def _markdown(text: str) -> str:
    indent = "&nbsp;&nbsp;" if text.startswith("  ") else ""
    return indent + re.sub(r"([\\`*_{}\[\]<>#|~&$!])", r"\\\1", text.strip())


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$^{\dagger}$",
    "*": r"$^{*}$",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"\textbar{}",
} | {character: f"\\{character}" for character in "&%$#_{}"}
"""Characters that mean something else to LaTeX, or nothing."""


def as_latex(grid: Grid) -> str:
    """Return the table with rules of the package booktabs; what comes from outside is escaped."""
    blocks = [
        "\n".join(" & ".join(map(_latex, (line.label, *line.cells))) + r" \\" for line in block)
        for block in grid.blocks
    ]
    head = " & ".join(["", *map(_latex, grid.columns)]) + r" \\"
    body = "\n\\midrule\n".join(blocks)
    notes = "".join(f"% {note}\n" for note in grid.notes)
    columns = "l" + "r" * len(grid.columns)
    begin, end = f"\\begin{{tabular}}{{{columns}}}\n\\toprule", "\\bottomrule\n\\end{tabular}"
    return f"{notes}{begin}\n{head}\n\\midrule\n{body}\n{end}\n"


def _latex(text: str) -> str:
    indent = r"\quad " if text.startswith("  ") else ""
    words = "".join(LATEX.get(character, character) for character in text.strip())
    return indent + re.sub(r"(^|\.\.)-(?=\d)", r"\1$-$", words)

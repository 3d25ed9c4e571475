"""What is there of evaluation sets on this machine: counted before anything runs, no model needed."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_papo.config import BenchmarkConfig, DataConfig
from megatron_papo.data.hub_files import in_cache, is_offline
from megatron_papo.data.rows import read_rows
from megatron_papo.data.set_files import has_known_names, is_hub_name, set_files
from megatron_papo.data.source_row import BadRow, SourceRow
from megatron_papo.errors import UserError
from megatron_papo.pictures.archive import is_archive, require_member
from megatron_papo.pictures.decode import decode_image
from megatron_papo.pictures.files import resolve_inside
from megatron_papo.pictures.store import read_named
from megatron_papo.reading import shown

_SHOWN = 5
"""Lines of one kind."""


@dataclass
class SetState:
    """What is there of a set."""

    records: int = 0
    """Rows that can be used, if their pictures can."""
    pictures: int = 0
    """Different ones that they show and that are there."""
    problems: int = 0
    """Different ones that the records show."""
    missing: list[str] = field(default_factory=list)
    """A line for each thing that is not there or cannot be used."""

    @property
    def is_there(self) -> bool:
        """Whether any of it is."""
        return self.records > 0 or not self.missing


@dataclass
class SuiteLook:
    """Looks at the sets of a suite one after the other."""

    config: DataConfig
    opens_pictures: bool
    """Also decode every picture."""
    answers: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    """Name of a set -> problem of it -> answer, and the set that gave it: sets that share problems must agree."""

    def look_at(self, name: str, source: BenchmarkConfig, seen: Callable[[], object]) -> SetState:
        """Return what is there of a set.

        Args:
            name: of the set.
            source: where it is.
            seen: called at each row.
        """
        state = SetState()
        if source.source == "synthetic":  # made by stage 1, each row a problem of its own
            return SetState(source.count or 0, source.count or 0, source.count or 0)
        try:
            here = on_this_machine(source)
            state.missing = set_files(here).missing
            if not state.missing:
                self._read(name, here, state, seen)
        except UserError as error:
            state.missing += error.lines
        return state

    def _read(self, name: str, source: BenchmarkConfig, state: SetState, seen: Callable[[], object]) -> None:
        """Count what a set's rows show, also where the reading ends early. Raises UserError where a file is damaged."""
        looks, pictures, problems = _PictureLook(self.opens_pictures, self.config), set(), set()
        bad: list[tuple[str, str]] = []
        try:
            for row in read_rows(source, self.config, with_target=False):
                seen()
                if isinstance(row, BadRow):
                    bad.append((row.place, row.problem))
                    continue
                state.records += 1
                problems.add(row.problem_id or row.id)
                bad += self._disagreement(name, source.problems_of or name, row)
                for picture in row.images:
                    line = looks.problem_of(picture, row)
                    if line is None:
                        pictures.add((row.image_root, picture) if isinstance(picture, str) else _digest(picture))
                    else:
                        bad.append((row.place, line))
        finally:
            state.pictures, state.problems = len(pictures), len(problems)
            state.missing += shortened(bad)
        if not state.records and not bad:
            state.missing.append(f"{source.source}: no row in it: download it again, or name another source")

    def _disagreement(self, name: str, space: str, row: SourceRow) -> list[tuple[str, str]]:
        """Return place and problem where the answer of a row is not that of the same problem in another set."""
        answers = self.answers.setdefault(space, {})
        answer, other = answers.setdefault(row.problem_id or row.id, (row.answer, name))
        if answer == row.answer or other == name:
            return []
        return [
            (
                row.place,
                f"the answer is {shown(repr(row.answer), 40)}, that of the same problem in {other}"
                f" {shown(repr(answer), 40)}: the two sets do not show the same problems in the same order: correct"
                " problems_of or problem_by",
            )
        ]


@dataclass
class _PictureLook:
    """Says of pictures whether they are there, each looked at once."""

    opens: bool
    config: DataConfig
    _known: dict[tuple[Path | None, str], str | None] = field(default_factory=dict)

    def problem_of(self, picture: bytes | str, row: SourceRow) -> str | None:
        """Return what is wrong with a picture of a row; None: nothing."""
        if isinstance(picture, bytes):
            return self._look(picture, row.image_root)
        key = (row.image_root, picture)
        if key not in self._known:
            self._known[key] = self._look(picture, row.image_root)
        return self._known[key]

    def _look(self, picture: bytes | str, root: Path | None) -> str | None:
        try:
            if self.opens:
                content = picture if isinstance(picture, bytes) else read_named(picture, root)
                decode_image(content, "image" if isinstance(picture, bytes) else f"image {shown(picture)}")
            elif isinstance(picture, str) and root is not None:
                (require_member if is_archive(root) else resolve_inside)(root, picture)
        except UserError as error:
            return str(error)
        return None


def on_this_machine(source: BenchmarkConfig) -> BenchmarkConfig:
    """Return a set with a source that is read without a network. Raises UserError where it is on the hub alone."""
    if not has_known_names(source):
        if set_files(source).tables or is_offline():
            return source
        raise UserError(
            f"{source.source}: on the hub, read by the datasets library: .venv/bin/python -m tools.prefetch downloads"
            " it, and with HF_HUB_OFFLINE=1 it is counted here"
        )
    cached = in_cache(source) if is_hub_name(source) else source
    if cached is None:
        raise UserError(
            f"{source.source}: not on this machine: .venv/bin/python -m tools.suite fetch --suite FILE downloads it, or"
            " give a local copy with --source DIR"
        )
    return cached


def shortened(problems: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line for each problem, the same in many rows once, and how many there are more. problems: with their
    places."""
    places: dict[str, list[str]] = {}
    for place, problem in problems:
        places.setdefault(problem, []).append(place)
    lines = [
        f"{rows[0]}: {problem}{f' (and {len(rows) - 1} rows more)' if len(rows) > 1 else ''}"
        for problem, rows in places.items()
    ]
    more = len(lines) - _SHOWN
    return lines if more <= 1 else [*lines[:_SHOWN], f"... and {more} more like these"]


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()

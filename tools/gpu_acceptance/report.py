"""What the sections of tools.gpu_acceptance find, as files and as a table. Imports nothing that a machine may lack."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Result = Literal["pass", "fail", "not possible"]


@dataclass(frozen=True)
class Line:
    """One check."""

    what: str
    result: Result
    found: str
    """What was measured, with its limit; of "not possible" the reason."""


@dataclass(frozen=True)
class Fact:
    """Something about the machine or a measurement that nothing is demanded of."""

    name: str
    value: str


@dataclass
class Section:
    """What one section found, as its file in the output directory holds it."""

    name: str
    settings: dict[str, Any]
    """What it ran with; with other settings it runs again."""
    lines: list[Line] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False

    @property
    def failed(self) -> bool:
        return not self.finished or any(line.result == "fail" for line in self.lines)

    def add(self, entry: Line | Fact) -> None:
        """Take in what the section says next."""
        if isinstance(entry, Line):
            self.lines.append(entry)
        else:
            self.facts.append(entry)

    def write(self, directory: Path) -> None:
        """Write the section's file, in one step."""
        write_json(directory / f"{self.name}.json", asdict(self))

    @classmethod
    def read(cls, directory: Path, name: str) -> "Section | None":
        """Return what a section's file holds; None where there is none that can be read, so that it runs again."""
        try:
            tree = json.loads((directory / f"{name}.json").read_text())
            lines = [Line(**line) for line in tree.pop("lines")]
            return cls(lines=lines, facts=[Fact(**fact) for fact in tree.pop("facts")], **tree)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


def passed_if(condition: bool) -> Result:
    """Return the result of a check."""
    return "pass" if condition else "fail"


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON file in one step."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(tree, indent=1) + "\n")
    new.replace(path)


def write_report(directory: Path, sections: Sequence[Section], settings: dict[str, Any]) -> None:
    """Write report.json and report.md.

    Args:
        directory: where to.
        sections: those that ran, now or before.
        settings: of this run.
    """
    passed = not any(section.failed for section in sections)
    tree = {"passed": passed, "settings": settings, "sections": [asdict(section) for section in sections]}
    write_json(directory / "report.json", tree)
    (directory / "report.md").write_text(as_markdown(sections, passed))


def as_markdown(sections: Sequence[Section], passed: bool) -> str:
    """Return the report as a page: the result, a table to paste, and the facts."""
    results = [line.result for section in sections for line in section.lines]
    counts = ", ".join(f"{results.count(result)} {result}" for result in ("pass", "fail", "not possible"))
    text = ["# Acceptance on this machine", "", f"**{'passed' if passed else 'FAILED'}**: {counts}.", ""]
    text += ["| section | check | result | found |", "|---|---|---|---|"]
    for section in sections:
        name = f"{section.name}, {section.seconds:.0f} s"
        for line in section.lines:
            result = f"**{line.result}**" if line.result == "fail" else line.result
            text.append(f"| {name} | {_cell(line.what)} | {result} | {_cell(line.found)} |")
            name = ""
        if not section.lines and section.finished:
            text.append(f"| {name} | | | facts only, see below |")
    text += ["", "| fact | |", "|---|---|"]
    text += [f"| {_cell(fact.name)} | {_cell(fact.value)} |" for section in sections for fact in section.facts]
    return "\n".join(text) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

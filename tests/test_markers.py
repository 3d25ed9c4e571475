"""The table of markers: its places exist, and a test gets what the table says."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.markers import EXCEPTIONS, MARKERS, markers_of


def missing_places(table: dict[str, list[str]]) -> list[str]:
    """Return the places of a table that are not in tests/: a file that was moved, a function that was renamed."""
    missing = []
    for place in (place for places in table.values() for place in places):
        path, _, function = place.partition("::")
        file = ROOT / "tests" / path
        if not file.exists() or (function and f"def {function.partition('[')[0]}(" not in file.read_text()):
            missing.append(place)
    return missing


def test_the_places_exist():
    assert missing_places(MARKERS) == missing_places(EXCEPTIONS) == []


def test_a_place_that_is_gone_is_noticed():
    table = {"quick": ["objective", "objective/test_gone.py", "objective/test_golden.py::test_gone"]}
    assert missing_places(table) == ["objective/test_gone.py", "objective/test_golden.py::test_gone"]


@pytest.mark.parametrize(
    "place, fixtures, markers",
    [
        ("objective/test_papo_loss.py::test_anything[case]", set(), {"quick"}),
        ("objective/test_golden.py::test_the_tool_passes_the_golden_file", set(), set()),
        ("objective/test_golden.py::test_the_tool_finds_a_damaged_number[gradient]", set(), set()),
        ("objective_of_another_name/test_it.py::test_it", set(), set()),
        ("stages/test_stage1.py::test_it", {"tmp_path"}, {"quick"}),
        ("stages/test_stage1.py::test_it", {"demo_data"}, set()),
        ("anywhere/test_it.py::test_it", {"small_run"}, {"server", "torchrun"}),
        ("tools/test_benchmark_layout.py::test_report[TP2 x PP2]", set(), {"nightly", "torchrun"}),
        ("tools/test_benchmark_layout.py::test_report[one process]", set(), {"torchrun"}),
    ],
)
def test_markers_of(place, fixtures, markers):
    assert markers_of(place, fixtures) == markers


def test_pytest_selects_by_the_table():
    """`-m quick` keeps and leaves out what the table says, and a test without a GPU says why it does not run."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-m",
        "quick",
        "tests/evaluation",
        "tests/stages",
    ]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    assert "tests/evaluation/test_accuracy.py::" in printed
    assert "tests/stages/test_stage1.py::" in printed
    assert "tests/stages/test_stage5.py::" not in printed

"""The published rows give their own averages and gains, by the functions that make ours."""

import pytest
import yaml

from megatron_papo.evaluation.published import ABLATIONS, GENERAL, GROUPS, SETS, TABLE1, VISION
from megatron_papo.evaluation.statistics import relative_gain
from tests.helpers import ROOT

KNOWN = {row.name: row for row in TABLE1 if row.of_sets}


def means(values):
    """General, vision, overall."""
    return [sum(part) / len(part) for part in (values[:5], values[5:], values)]


@pytest.mark.parametrize("name", KNOWN)
def test_averages(name):
    row = KNOWN[name]
    assert len(row.of_sets) == len(SETS) == 9
    assert means(row.of_sets) == pytest.approx([row.general, row.vision, row.overall], abs=0.01)


@pytest.mark.parametrize("name", ["PAPO-G 3B", "PAPO-G 7B"])
def test_gains(name):
    """To a hundredth: the published ones were made from values with more digits."""
    row = KNOWN[name]
    base = KNOWN[row.baseline]
    for sets, published in ((GENERAL, row.gains[0]), (VISION, row.gains[1]), (SETS, row.gains[2])):
        values = [[side.sets[name] for name in sets] for side in (row, base)]
        assert round(100 * relative_gain(*values), 2) == pytest.approx(published, abs=0.0101)
        of_means = sum(values[0]) / sum(values[1]) - 1
        if sets != GENERAL:  # control: the gain of the averages is another number
            assert 100 * of_means != pytest.approx(published, abs=0.05)


def test_only_what_is_known_is_there():
    assert set(KNOWN) == {"GRPO 3B", "PAPO-G 3B", "GRPO 7B", "PAPO-G 7B"}
    assert all(not row.sets for row in (*TABLE1, *ABLATIONS) if row.name not in KNOWN)
    assert len({row.name for row in (*TABLE1, *ABLATIONS)}) == len(TABLE1) + len(ABLATIONS) == 26


def test_the_published_suite_has_these_sets():
    """By the same names, in the same groups: otherwise no published number would stand in its column."""
    suite = yaml.safe_load((ROOT / "configs" / "benchmarks" / "papo.yaml").read_text())["evaluation"]["benchmarks"]
    assert list(suite) == list(SETS)
    for group, names in GROUPS.items():
        assert [name for name, entry in suite.items() if group in entry["groups"]] == list(names)

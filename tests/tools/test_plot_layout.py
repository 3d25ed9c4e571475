"""tools.plot.layout: what it measures is tools.benchmark.layout, and the picture can be drawn again from the
numbers."""

import json

import pytest

from tests.helpers import run_module
from tools.plot import layout


def test_grid_varies_one_thing_at_a_time():
    points = layout.grid()
    assert points[0] == layout.BASE and len(points) == 7 == len({tuple(point.items()) for point in points})
    for axis, (values, _) in layout.AXES.items():
        on_axis = [point for point in points if all(point[name] == layout.BASE[name] for name in point if name != axis)]
        assert {point[axis] for point in on_axis} == set(values)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """One point that was measured, small, and stands for all."""
    args = layout.parse(["--output", "unused.png", "--hidden", "64", "--layers", "1", "--repeat", "1"])
    found = layout.measure({"group_size": 3, "prompt_tokens": 40, "response_tokens": 10}, args)
    file = tmp_path_factory.mktemp("numbers") / "numbers.json"
    file.write_text(json.dumps([{**found, **point} for point in layout.grid()]))
    return file


def test_measured(numbers):
    found = json.loads(numbers.read_text())[0]
    ratios = layout.ratios(found)
    tokens = 3 * 40 + found["tokens_group"] - 40
    assert (
        ratios["tokens"] == pytest.approx(tokens / found["tokens_group"])
        and ratios["tokens"] < ratios["tokens, with padding"]
    )
    assert ratios["time, whole step"] == pytest.approx(found["seconds_plain"] / found["seconds_group"])
    pictures = found["seconds_pictures"]
    assert 0 < pictures < found["seconds_group"]
    rest = found["seconds_plain"] - pictures, found["seconds_group"] - pictures
    assert ratios["time, without the pictures"] == pytest.approx(rest[0] / rest[1])


def test_drawn_again(numbers, tmp_path):
    done = run_module("tools.plot.layout", "--from", numbers, "--output", tmp_path / "again.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    assert len(done.stdout.splitlines()) == len(layout.grid()) + 1


@pytest.mark.parametrize("damage", ["not JSON", "[]", '[{"group_size": 4}]', "{}"])
def test_wrong_numbers(damage, tmp_path):
    (tmp_path / "numbers.json").write_text(damage)
    done = run_module("tools.plot.layout", "--from", tmp_path / "numbers.json", "--output", tmp_path / "picture.png")
    assert done.returncode == 2 and "measure again" in done.stderr and not (tmp_path / "picture.png").exists()

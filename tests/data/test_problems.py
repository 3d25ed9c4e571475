"""Which rows show one problem, by each rule."""

import pytest

from megatron_papo.config import BenchmarkConfig, PromptSource
from megatron_papo.data.problems import key_of, problem_column, with_problems
from megatron_papo.data.source_row import BadRow, SourceRow
from megatron_papo.errors import UserError


def row(number: int, answer="1", problem="?", problem_id=None) -> SourceRow:
    return SourceRow(
        place=f"f:{number}", id=str(number), problem=problem, answer=answer, images=[], image_root=None,
        problem_id=problem_id,
    )  # fmt: skip


def keys(rows, rule):
    return [found.problem if isinstance(found, BadRow) else found.problem_id for found in with_problems(rows, rule)]


def test_row_and_column_leave_rows_as_they_are():
    assert keys([row(1), row(2, problem_id="x")], "row") == [None, "x"]
    assert keys([row(1), row(2, problem_id="x")], "column:key") == [None, "x"]


def test_rows_of_one_text_are_one_problem():
    texts = ["<image>Find  X.\n", "find x.", "<image> Find x", "Find y."]
    first, second, third, fourth = keys([row(n, problem=text) for n, text in enumerate(texts)], "text")
    assert first == second and len({second, third, fourth}) == 3


def test_blocks_are_numbered():
    rows = [row(number, answer=str(number // 5)) for number in range(15)]
    assert keys(rows, "block:5") == [str(1 + number // 5) for number in range(15)]
    assert keys(rows[::5], "block:1") == ["1", "2", "3"]


def test_sets_with_other_versions_of_the_same_problems_get_the_same_numbers():
    five = [row(number, answer="abc"[number // 5]) for number in range(15)]
    three = [row(number, answer="abc"[number // 3]) for number in range(9)]
    by_answer = dict(zip("a" * 5 + "b" * 5 + "c" * 5, keys(five, "block:5")))
    assert [by_answer[entry.answer] for entry in three] == keys(three, "block:3")


def test_a_block_with_two_answers_is_none():
    rows = [row(1, "7"), row(2, "8"), row(3, "9"), row(4, "9")]
    first, second, third, fourth = keys(rows, "block:2")
    assert "block 1 of 2 rows, to be versions of one problem, has the answers '7', '8': correct problem_by" == first
    assert second == first and (third, fourth) == ("2", "2")


def test_rows_that_cannot_be_used_keep_their_place_in_a_block():
    bad = BadRow("f:2", "no answer")
    assert keys([row(1, "7"), bad, row(3, "9"), row(4, "9")], "block:2") == ["1", "no answer", "2", "2"]


def test_rows_after_the_last_whole_block():
    found = keys([row(number) for number in range(7)], "block:5")
    assert found[:5] == ["1"] * 5
    assert found[5:] == ["one of 2 rows after the last whole block of 5: add the others, or correct problem_by"] * 2


def test_the_entry_of_a_column():
    assert problem_column(BenchmarkConfig(source="x", problem_by="column:problem index")) == "problem index"
    assert problem_column(BenchmarkConfig(source="x", problem_by="block:5")) is None
    assert problem_column(PromptSource(source="x")) is None
    assert [key_of({"a": value}, "a") for value in ("x", 3, 0)] == ["x", "3", "0"]


@pytest.mark.parametrize("value", [None, "", 1.5, True, ["x"], {"x": 1}, "\ud800"])
def test_an_entry_that_tells_no_problem(value):
    with pytest.raises(UserError):
        key_of({"a": value}, "a")
    with pytest.raises(UserError, match="the columns are b"):
        key_of({"b": "x"}, "a")


@pytest.mark.parametrize("rule", ["block:0", "block:", "block:-5", "rows", "column:", ""])
def test_other_rules_are_refused(rule):
    with pytest.raises(ValueError, match="problem_by"):
        BenchmarkConfig(source="x", problem_by=rule)

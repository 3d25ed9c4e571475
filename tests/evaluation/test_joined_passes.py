"""Files of predictions, whoever wrote them: what is read, what is joined, and what is refused with one line."""

import json

import pytest

from megatron_papo.config import BenchmarkConfig
from megatron_papo.errors import UserError
from megatron_papo.evaluation import outside_predictions
from megatron_papo.evaluation.joined_passes import joined_sets
from tests.evaluation.predictions_files import ONCE, evaluated, row, write


def joined(*arguments, suite=None, image="original", passes=None):
    return joined_sets([str(argument) for argument in arguments], suite or {}, image, passes)


def places(one):
    """Return prompt and sample of every response, file by file."""
    return [pairs for _, pairs in one.places()]


def refused(*arguments, **settings) -> str:
    with pytest.raises(UserError) as refusal:
        joined(*arguments, **settings)
    [line] = refusal.value.lines
    assert line.isprintable()
    return line


def test_passes_in_one_file_one_after_another_or_prompt_by_prompt(tmp_path):
    with_ids = [row(f"p{number}", id=f"test_{number}") for number in range(3)]
    for name, rows, expected in (
        ("once", ONCE, [(0, 0), (1, 0), (2, 0)]),
        ("twice", ONCE * 2, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]),
        ("by_prompt", [entry for entry in ONCE for _ in range(2)], [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]),
        ("with_ids", with_ids * 2, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]),
    ):
        [one] = joined(write(tmp_path / f"{name}.jsonl", rows))
        assert (one.name, places(one)) == (name, [expected])


def test_rows_with_the_same_text_are_told_apart_by_their_order(tmp_path):
    """One question to many pictures: the second pass gives each row its second sample."""
    counting = [row("How many?", label) for label in "3445"]
    [one] = joined(write(tmp_path / "clevr.jsonl", counting * 2))
    assert places(one) == [[(n, 0) for n in range(4)] + [(n, 1) for n in range(4)]]
    [one] = joined(
        write(tmp_path / "once.jsonl", counting + [row("How many?", "4")])
    )  # it ends as it might begin again
    assert len(one.prompts) == 5
    [one] = joined(write(tmp_path / "same.jsonl", [row("p", "3")] * 4), passes=2)
    assert places(one) == [[(0, 0), (1, 0), (0, 1), (1, 1)]]
    [one] = joined(tmp_path / "same.jsonl")  # control: without being told it is one prompt, four times
    assert places(one) == [[(0, n) for n in range(4)]]


def test_passes_that_are_a_guess_are_known_as_one(tmp_path):
    """Lines without ids that repeat may be several pictures; controls: ids, one's own word, nothing that repeats."""
    counting = [row("How many?", label) for label in "3434"]
    for name, rows, passes, is_guess in (
        ("repeated", counting, None, True),
        ("by_prompt", [entry for entry in ONCE for _ in range(2)], None, True),
        ("told", counting, 1, False),
        ("ids", [row("How many?", label, id=label) for label in "3434"], None, False),
        ("once", ONCE, None, False),
    ):
        [one] = joined(write(tmp_path / f"{name}.jsonl", rows), passes=passes)
        assert [passes.is_guess for passes in one.passes] == [is_guess], name
    assert not joined(evaluated(tmp_path / "ours"))[0].passes[0].is_guess


def test_files_over_the_same_prompts_are_joined_in_any_order_of_rows(tmp_path):
    first = write(tmp_path / "pass0.jsonl", ONCE)
    second = write(tmp_path / "pass1.jsonl", [row("p3", "4", "x"), row("p1"), row("p2")])
    [one] = joined(first, second)
    assert places(one) == [[(0, 0), (1, 0), (2, 0)], [(2, 1), (0, 1), (1, 1)]] and one.name == "pass0"
    [one] = joined(f"mmk12={first},{second}")
    assert one.name == "mmk12" and sum(passes.count for passes in one.passes) == 2
    third = write(tmp_path / "other.jsonl", [row("q1"), row("q2")])
    assert [one.name for one in joined(first, third)] == ["pass0", "other"]


def test_a_directory_and_the_names_of_a_suite(tmp_path):
    suite = {
        "we_math": BenchmarkConfig(source="x", split="We_Math", image_archive="We-Math_We-Math_images.zip"),
        "mathverse": BenchmarkConfig(source="x", split="AI4Math_MathVerse", problem_by="column:problem"),
        "mathverse_v": BenchmarkConfig(source="x", split="AI4Math_MathVerse_vision_dependent"),
    }
    write(tmp_path / "m" / "We-Math_We-Math.jsonl", ONCE)
    rows = [row(f"v{number}", problem=1) for number in range(5)]
    write(tmp_path / "m" / "AI4Math_MathVerse.jsonl", rows)
    write(tmp_path / "m" / "AI4Math_MathVerse-vision-dependent.jsonl", rows[:3])
    found = {one.name: len(one.prompts) for one in joined(tmp_path / "m", suite=suite)}
    assert found == {"mathverse": 5, "mathverse_v": 3, "we_math": 3}
    line = refused(tmp_path / "m")  # control: without names, three of five prompts look like a pass that was cut short
    assert "passes over different prompts" in line
    assert "problem is missing" in refused(write(tmp_path / "mathverse.jsonl", ONCE), suite=suite)
    assert "nothing was evaluated here" in refused(write(tmp_path / "none" / "a.txt", []).parent)


@pytest.mark.parametrize(
    "second, says",
    [
        ([row("p1"), row("p2"), row("p4", "4")], "b.jsonl:3: not a prompt of "),
        ([row("p1"), row("p2"), row("p3", "5")], "b.jsonl:3: not a prompt of "),
        ([row("p1"), row("p2")], "a.jsonl:3: not a prompt of "),
        ([row("q1"), row("q2")], "b.jsonl:1: not a prompt of "),
        (ONCE, "holds the same as "),
    ],
    ids=["another prompt", "another label", "one missing", "nothing in common", "the same file"],
)
def test_passes_over_other_prompts_are_refused_with_the_place(tmp_path, second, says):
    a, b = write(tmp_path / "a.jsonl", ONCE), write(tmp_path / "b.jsonl", second)
    assert says in refused(f"set={a},{b}")
    if second[0]["prompt"] == "p1":  # without a name they need something in common
        assert says in refused(a, b)


def test_a_pass_that_was_cut_short_is_refused(tmp_path):
    line = refused(write(tmp_path / "a.jsonl", ONCE * 2 + ONCE[:1]))
    assert "7 responses are 2 whole passes over 3 prompts and 1 responses more" in line and "--passes 1" in line
    assert len(joined(tmp_path / "a.jsonl", passes=1)[0].prompts) == 7  # control
    assert "a.jsonl:2: 2 responses to its prompt, where others have 3" in refused(tmp_path / "a.jsonl", passes=3)
    uneven = [row("p1", id="a"), row("p1", id="a"), row("p2", id="b")]
    assert "b.jsonl:3: 1 responses to its prompt, where others have 2" in refused(write(tmp_path / "b.jsonl", uneven))


def test_two_sets_of_one_name(tmp_path):
    a, b = write(tmp_path / "x" / "geo.jsonl", ONCE), write(tmp_path / "y" / "geo.jsonl", [row("q1"), row("q2")])
    assert "both be called geo: name them, NAME=FILE" in refused(a, b)
    assert "named twice" in refused(f"geo={a}", f"geo={b}")
    assert [one.name for one in joined(a, f"other={b}")] == ["geo", "other"]
    assert "expected NAME=FILE" in refused(f"geo={a},")


GOOD = json.dumps(row("p1"))
BAD = {
    "not JSON": ("not json", "not JSON"),
    "a list": ("[1]", "a list where an object is expected"),
    "no label": ('{"prompt": "p", "predict": "x"}', "has no label"),
    "no predict": ('{"prompt": "p", "label": "3"}', "has no predict"),
    "label a list": ('{"prompt": "p", "predict": "x", "label": ["3"]}', "label is a list, expected text"),
    "label a number": ('{"prompt": "p", "predict": "x", "label": 3}', "label is a number, expected text"),
    "label null": ('{"prompt": "p", "predict": "x", "label": null}', "label is null, expected text"),
    "label empty": ('{"prompt": "p", "predict": "x", "label": " \\n"}', "label is empty"),
    "NaN": ('{"prompt": "p", "predict": "x", "label": "3", "score": NaN}', "NaN is no number of JSON"),
    "surrogate": ('{"prompt": "p", "predict": "\\ud83d", "label": "3"}', "half a character"),
    "key twice": ('{"prompt": "p", "predict": "x", "label": "3", "label": "4"}', "has a key twice"),
    "id a list": ('{"id": [1], "prompt": "p", "predict": "x", "label": "3"}', "id is a list"),
    "nested": ("[" * 100_000, "nested too deeply"),
    "ours": ('{"prompt_id": "p", "text": "x"}', "a prediction of another program"),
    "control characters": ('{"prompt": "p", "predict": "x", "\\u001b[2J": "3"}', "has no label"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_one_line_that_names_it(tmp_path, kind):
    content, says = BAD[kind]
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n\n{content}\n{GOOD}\n")
    line = refused(path)
    assert f"{path}:3: " in line and says in line
    path.write_text(f"{GOOD}\n\n{json.dumps(row('p2'))}")  # control; the last line may lack its newline
    assert len(joined(path)[0].prompts) == 2


def test_bad_files(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n{GOOD[:-9]}")
    assert "a.jsonl:2: the last line is not complete (truncated file)" in refused(path)
    path.write_text("")
    assert "holds no responses" in refused(path)
    path.write_bytes(b"\xff\xfe{}\n")
    assert "not UTF-8" in refused(path)
    assert "no such file" in refused(tmp_path / "none.jsonl") and "no such file" in refused("/dev/zero")
    path.write_text(GOOD + "\n" + "x" * 4000 + "\n")
    monkeypatch.setattr(outside_predictions, "LONGEST_LINE", 2000)
    assert "a.jsonl:2: longer than" in refused(path)


def test_our_own_predictions(tmp_path):
    [one] = joined(evaluated(tmp_path / "a"))
    assert (one.name, places(one)) == ("geo", [[(0, 0), (0, 1), (1, 0), (1, 1)]]) and one.ours
    [one] = joined(tmp_path / "a", evaluated(tmp_path / "b", seed=1))  # more samples of the same evaluation
    assert places(one)[1] == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert len(joined(tmp_path / "a", image="masked")[0].prompts) == 2
    assert "holds none with image none" in refused(tmp_path / "a", image="none")
    assert "leave --passes out" in refused(tmp_path / "a", passes=2)
    assert "leave --image out" in refused(write(tmp_path / "theirs.jsonl", ONCE), image="masked")
    evaluated(tmp_path / "run" / "evaluation" / "iteration_0002" / "geo")
    assert joined(tmp_path / "run")[0].name == "geo"
    evaluated(tmp_path / "run" / "evaluation" / "iteration_0004" / "geo", seed=1)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")  # a run has other files of that kind
    assert [one.files[0].path.parent.parent.name for one in joined(tmp_path / "run")] == ["iteration_0004"]
    assert [one.files[0].path.parent.parent.name for one in joined(f"{tmp_path / 'run'}@2")] == ["iteration_0002"]
    assert "iteration 3 was not evaluated: there is 2, 4" in refused(f"{tmp_path / 'run'}@3")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"checkpoint": "c2"}, "differ in checkpoint (runs/a/hf and runs/a/hf)"),
        ({"protocol": {"temperature": 0.7, "grading": "mathruler"}}, "differ in temperature (0.7 and 1.0)"),
        ({"data": "d2"}, "differ in prompts"),
        ({"seed": 0, "prompts": "ba"}, "hold the same samples"),
        ({"prompts": "ac"}, "not a prompt of"),
    ],
)
def test_another_checkpoint_protocol_or_the_same_samples_are_refused(tmp_path, changes, says):
    first = evaluated(tmp_path / "a")
    second = evaluated(tmp_path / "b", **({"seed": 1, "groups": ["other"]} | changes))  # the groups decide no answer
    assert says in refused(first, second)
    with_names = refused(f"geo={first / 'predictions.jsonl'},{write(tmp_path / 'c.jsonl', ONCE)}")
    assert "one is of PAPO-Eval" in with_names


def test_sets_of_two_checkpoints_have_no_common_average(tmp_path):
    first = evaluated(tmp_path / "a")
    second = evaluated(tmp_path / "b", prompts="xy", set="other", data="d2")
    assert [one.name for one in joined(first, second)] == ["geo", "other"]
    third = evaluated(tmp_path / "c", prompts="xy", set="other", data="d2", checkpoint="c2", hf="runs/b/hf")
    assert "differ in checkpoint (runs/a/hf and runs/b/hf)" in refused(first, third)
    greedy = {"temperature": 0.0, "grading": "choice"}  # a set may have a grading of its own, but no sampling
    fourth = evaluated(tmp_path / "d", prompts="xy", set="other", data="d2", protocol=greedy)
    assert "differ in temperature (1.0 and 0.0): score them one by one" in refused(first, fourth)

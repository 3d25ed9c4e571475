"""`tools.suite score` and `export`: other people's predictions and our own, through the commands."""

import json
import math
from pathlib import Path

import pytest

from megatron_papo.errors import UserError
from megatron_papo.run.records import Prompt
from tests.evaluation.predictions_files import ONCE, PROTOCOL, evaluated, row, write
from tests.helpers import ROOT, run_module
from tools import suite

HANGS = "<think>a</think>\\boxed{x/2+(" + "1/(x**7+7*x*y**8+y**5+x**3*y**2+" * 9 + "y" + ")" * 9 + ")/10**30}"
"""A continued fraction near to x/2, minutes for sympy."""
RIGHT, WRONG, SILENT = "<think>a</think>\\boxed{3}", "<think>a</think>\\boxed{4}", "three"


def main(*arguments) -> None:
    """Run tools.suite in this process."""
    with pytest.raises(SystemExit) as ended:
        suite.main([str(argument) for argument in arguments])
    assert ended.value.code == 0


def scored(capsys, *arguments):
    """Return what `score --json` prints, and what it says beside."""
    main("score", *arguments, "--json", "--workers", 1)
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_two_passes_of_papo_eval_by_hand(tmp_path, capsys):
    """Three prompts, two passes: right and wrong, right and right, silence and wrong."""
    first = [row("p1", "3", RIGHT), row("p2", "3", RIGHT), row("p3", "3", SILENT)]
    second = [row("p1", "3", WRONG), row("p2", "3", "\\boxed{3.0}"), row("p3", "3", WRONG)]
    one = write(tmp_path / "geometry3k.jsonl", first + second)
    scores, said = scored(capsys, one)
    means = [0.5, 1.0, 0.0]
    error = math.sqrt(sum((mean - 0.5) ** 2 for mean in means) / 2 / 3)  # every prompt is a problem of its own
    assert set(scores) == {"sets", "groups", "overall"} and scores["groups"] == {}
    of_set = scores["sets"]["geometry3k"]
    assert of_set == {
        "prompts": 3,
        "samples_per_prompt": 2,
        "avg": pytest.approx(0.5),
        "standard_error": pytest.approx(error),
        "pass_at": {"1": pytest.approx(0.5), "2": pytest.approx(2 / 3)},
        "maj": pytest.approx((0.5 + 1 + 0) / 3),
        "format": pytest.approx(4 / 6),
        "cut_off": None,
        "timed_out": 0.0,
        "unparsed": pytest.approx(1 / 6),
    }
    assert scores["overall"]["avg"] == pytest.approx(0.5)
    assert "3 prompts, passes: 2 (lines that repeat, without ids; if they are different pictures of one pass:" in said
    assert "--passes 1); graded by mathruler; of a label the newline at its end is no part" in said
    for name, rows in (("a", first), ("b", second)):
        write(tmp_path / f"{name}.jsonl", rows)
    in_two, _ = scored(capsys, f"geometry3k={tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}")
    assert in_two == scores
    main("score", one, "--workers", 1)
    printed = capsys.readouterr().out
    assert "geometry3k" in printed and "50.00" in printed and "Traceback" not in printed


def test_the_label_with_its_newline(tmp_path, capsys):
    """What equals the answer only without capitals is right for us, and wrong for the authors; a missing box is theirs
    the answer None."""
    rows = [row("p1", "Yes", "\\boxed{yes}"), row("p2", "3", RIGHT), row("p3", "None", "nothing")]
    file = write(tmp_path / "set.jsonl", rows)
    assert scored(capsys, file)[0]["sets"]["set"]["avg"] == pytest.approx(1 / 3 + 1 / 3)
    theirs, said = scored(capsys, file, "--grading", "published")
    assert theirs["sets"]["set"]["avg"] == pytest.approx(2 / 3) and "a label ends with a newline" in said
    stripped = write(tmp_path / "set.jsonl", [entry | {"label": entry["label"].strip()} for entry in rows])
    assert scored(capsys, stripped, "--grading", "published")[0]["sets"]["set"]["avg"] == pytest.approx(1)
    letters = write(tmp_path / "letters.jsonl", [row("p1", "B", "\\boxed{(b)}"), row("p2", "B", "\\boxed{A or B}")])
    of_letters, said = scored(capsys, letters, "--grading", "choice")
    assert of_letters["sets"]["letters"]["avg"] == 0.5 and "without options in the file" in said
    with pytest.raises(UserError, match="letters.jsonl:1.*neither the letter nor the text of an option"):
        scored(capsys, write(tmp_path / "letters.jsonl", [row("p1", "7 cm")]), "--grading", "choice")


def test_ours_know_the_options_of_their_prompts(tmp_path, capsys):
    """The text of the right option is right, that of another one wrong; the letter as well."""
    for text, right in (("7 cm", 1.0), ("B", 1.0), ("5 cm", 0.0)):
        file = evaluated(tmp_path / "set", answer="B", text=f"\\boxed{{{text}}}") / "predictions.jsonl"
        records = [json.loads(line) | {"options": ["5 cm", "7 cm"]} for line in file.read_text().splitlines()]
        scores, _ = scored(capsys, write(file, records), "--grading", "choice")
        assert scores["sets"]["geo"]["avg"] == right, text
    scores, _ = scored(capsys, evaluated(tmp_path / "older", answer="B", text="\\boxed{7 cm}"), "--grading", "choice")
    assert scores["sets"]["geo"]["avg"] == 0.0


def test_single_grades(tmp_path, capsys):
    """A line for each response with its place; nothing is left of a file where something is wrong."""
    rows = [row("p1", "3", RIGHT, id="a"), row("p2", "3", SILENT, id="b"), row("p1", "3", WRONG, id="a")]
    file, records = (
        write(tmp_path / "set.jsonl", rows + [row("p2", "3", "\\boxed{3.0}", id="b")]),
        tmp_path / "grades.jsonl",
    )
    scores, _ = scored(capsys, file, "--records", records)
    grades = [json.loads(line) for line in records.read_text().splitlines()]
    of_row = [(grade["prompt"], grade["sample"], grade["answer"], grade["right"]) for grade in grades]
    assert of_row == [(1, 1, "3", True), (2, 1, None, False), (1, 2, "4", False), (2, 2, "3.0", True)]
    assert [grade["place"] for grade in grades] == [f"{file}:{number}" for number in (1, 2, 3, 4)]
    assert scores["sets"]["set"]["avg"] == sum(grade["right"] for grade in grades) / 4
    assert [grade["format"] for grade in grades] == [True, False, True, False] and grades[0]["label"] == "3\n"
    with pytest.raises(UserError, match="grades.jsonl: is there already: remove it"):
        scored(capsys, file, "--records", records)
    with pytest.raises(UserError, match="neither the letter"):
        scored(capsys, file, "--grading", "choice", "--records", tmp_path / "none.jsonl")
    assert not list(tmp_path.glob("none*")) and not list(tmp_path.glob("*.partial"))


def test_problems_and_groups_of_a_suite(tmp_path, capsys):
    """Five versions of each problem: the standard error is that of two problems, not of ten prompts."""
    rows = [row(f"version {n}", "3", RIGHT if n < 5 else WRONG, id=n) for n in range(10)]
    file = write(tmp_path / "AI4Math_MathVerse.jsonl", rows)
    other = write(tmp_path / "BUAADreamer_clevr_count_70k.jsonl", ONCE)
    papo = ROOT / "configs" / "benchmarks" / "papo.yaml"
    scores, _ = scored(capsys, file, other, "--suite", papo)
    plain, between = 10 * 0.25 / 9 / 10, 2 * 5 * 4 * 0.25 / 10**2  # 2411.00640, equation 4
    assert scores["sets"]["mathverse"]["standard_error"] == pytest.approx(math.sqrt(plain + between))
    assert scores["groups"].keys() == {"general", "vision"}
    assert scores["groups"]["general"]["avg"] == scores["sets"]["mathverse"]["avg"] == 0.5
    assert scores["overall"]["avg"] == pytest.approx((0.5 + scores["sets"]["clevr_count"]["avg"]) / 2)
    alone, _ = scored(capsys, file, other)  # control: without the suite every row is a problem, and no group is known
    assert alone["sets"]["AI4Math_MathVerse"]["standard_error"] == pytest.approx(math.sqrt(plain))
    assert alone["groups"] == {}
    write(file, [*rows[:-1], row("version 9", "4", WRONG, id=9)])
    with pytest.raises(UserError, match=":10 and .*:6: different labels in one block of 5"):
        scored(capsys, file, "--suite", papo)
    write(file, rows[:-1])
    with pytest.raises(UserError, match="9 prompts are no whole number of blocks of 5"):
        scored(capsys, file, "--suite", papo)


def test_hostile_responses_cost_their_own_answer_alone(tmp_path):
    """Through the command: what hangs the grader times out, control characters are shown, and the object is all that is
    printed."""
    rows = [row("p1", "x/2", HANGS), row("p2", "3", RIGHT), row("p3", "3", "\x1b[2J\\boxed{" + "{" * 10_000)]
    file = write(tmp_path / "a\x1b.jsonl", rows)
    done = run_module("tools.suite", "score", str(file), "--json", "--workers", "1")
    assert done.returncode == 0, done.stderr
    [(name, of_set)] = json.loads(done.stdout)["sets"].items()
    assert name == "a\x1b" and of_set["timed_out"] == pytest.approx(1 / 3) and of_set["avg"] == pytest.approx(1 / 3)
    assert "\x1b" not in done.stderr and "took more than" in done.stderr
    write(file, [row("p1"), {"prompt": "p"}])
    done = run_module("tools.suite", "score", str(file), "--json")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert ":2: has no predict" in done.stderr and "\x1b" not in done.stderr


def test_our_own_predictions_as_recorded_and_graded_again(tmp_path, capsys):
    first, second = evaluated(tmp_path / "a"), evaluated(tmp_path / "b", seed=1)
    recorded, said = scored(capsys, first, second)
    assert recorded["sets"]["geo"]["avg"] == 1.0 and recorded["sets"]["geo"]["samples_per_prompt"] == 4
    assert recorded["groups"]["general"]["avg"] == 1.0 and recorded["sets"]["geo"]["cut_off"] == 0.0
    assert "graded as recorded" in said
    wrong = evaluated(tmp_path / "c", answer="4")  # recorded as right, which the text is not
    assert scored(capsys, wrong)[0]["sets"]["geo"]["avg"] == 1.0
    assert scored(capsys, wrong, "--grading", "mathruler")[0]["sets"]["geo"]["avg"] == 0.0
    silent = evaluated(tmp_path / "d", answer="None", text="three")
    assert scored(capsys, silent, "--grading", "mathruler")[0]["sets"]["geo"]["avg"] == 0.0
    assert scored(capsys, silent, "--grading", "published")[0]["sets"]["geo"]["avg"] == 1.0  # as the authors' code


def prompts(directory: Path, names="ab") -> Path:
    records = [
        Prompt(id=name, problem=f"<image>How many, {name}?", answer="3", token_ids=[1], num_tokens=1, images=["x.png"])
        for name in names
    ]
    write(directory / "prompts.jsonl", [json.loads(record.model_dump_json()) for record in records])
    return directory


def test_export_has_what_lmms_eval_writes(tmp_path, capsys):
    """The keys are those that lmms-eval 0.7.3 writes, and the numbers those of `score`."""
    evaluation, data = evaluated(tmp_path / "geo"), prompts(tmp_path / "data")
    output = tmp_path / "lmms"
    arguments = ["export", str(evaluation), "--form", "lmms-eval", "--output", str(output), "--data", str(data)]
    main(*arguments)
    results, samples = sorted(output.iterdir())
    assert results.name.endswith("_results.json") and samples.name == results.name[:-13] + "_samples_geo.jsonl"
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    written = {"doc_id", "target", "filtered_resps", "token_counts", "doc_hash", "input", "resps", "score"}
    assert [line["doc_id"] for line in lines] == [0, 1] and written <= lines[0].keys()
    assert lines[0]["target"] == "3" and lines[0]["input"] == "<image>How many, a?" and lines[0]["score"] == 1.0
    assert lines[0]["resps"] == [["\\boxed{3}"]] * 2 and lines[0]["filtered_resps"] == ["3", "3"]
    of_run = json.loads(results.read_text())
    assert of_run["results"]["geo"]["score,none"] == 1.0 and of_run["n-samples"]["geo"] == {
        "original": 2,
        "effective": 2,
    }
    assert of_run["model_name"] == PROTOCOL.hf and of_run["configs"]["geo"]["temperature"] == 1.0
    for changed, says in (
        (arguments, "is there already"),
        ([*arguments[:5], str(tmp_path / "x")], "its prompts are not"),
        ([*arguments[:5], str(tmp_path / "x"), "--data", str(prompts(tmp_path / "other", "ac"))], "not the prompts"),
    ):
        with pytest.raises(UserError, match=says):
            main(*changed)
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.partial"))
    capsys.readouterr()

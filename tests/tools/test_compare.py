"""Tables of several checkpoints: the real command on outputs in stage 7's form, numbers against plain arithmetic."""

import json
import math
import random
import shutil

import numpy as np
import pytest

from megatron_papo.errors import UserError
from megatron_papo.evaluation.published import SETS
from megatron_papo.run.records import Prediction, Protocol, Rewards, write_jsonl
from megatron_papo.run.stage_output import StageOutput
from tools import compare, publish_numbers

GROUPS = {"mmk12": ["general"], "mathverse": ["general"], "mathverse_v": ["vision"], "evaluation": []}
PROTOCOL = {"temperature": 1.0, "top_k": 50, "grading": "published"}


def predictions(name, skill, images=("original",), *, prompts=40, samples=4, seed=0):
    """Answers to a set: prompts of a set of MathVerse come in fives, or threes, of one problem."""
    generator = random.Random(f"{name} {skill} {seed}")
    per_problem, space = {"mathverse": (5, "mathverse"), "mathverse_v": (3, "mathverse")}.get(name, (1, name))
    for image in images:
        for number in range(prompts):
            problem = f"{space}/{number // per_problem}"
            hardness = random.Random(problem).random() * 0.4
            for sample in range(samples):
                right = float(generator.random() < skill * (1 if image == "original" else 0.3) - hardness + 0.2)
                yield Prediction(
                    prompt_id=f"{name}-{number}",
                    problem_id=problem,
                    sample=sample,
                    image=image,
                    answer="7",
                    text=f"\\boxed{{{7 if right else 8}}}",
                    response_token_ids=[1, 2],
                    finish_reason="stop",
                    rewards=Rewards(overall=right, accuracy=right, format=1.0),
                    sampling_seed=1,
                    masked_image_seed=3 if image == "masked" else None,
                )


def evaluation(run, iteration, sets, *, skill=0.5, checkpoint=None, protocol=PROTOCOL, data="d", chosen_on=(), **more):
    """Write the outputs of stage 7 for one checkpoint; returns the run."""
    for name in sets:
        with StageOutput("stage7_evaluate", run / "evaluation" / f"iteration_{iteration:04}" / name, {}, {}) as out:
            write_jsonl(out.partial / "predictions.jsonl", predictions(name, skill, **more))
            written = Protocol(
                set=name,
                groups=GROUPS[name],
                problems_of="mathverse" if name == "mathverse_v" else name,
                checkpoint=checkpoint or f"{run} {iteration}",
                hf=f"{run}/hf",
                data=data,
                protocol=protocol,
                chosen_on=name in chosen_on,
            )
            (out.partial / "protocol.json").write_text(written.model_dump_json())
    return run


@pytest.fixture
def command(monkeypatch, capsys):
    """Returns what the command prints."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["compare", *map(str, arguments)])
        compare.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def two_runs(tmp_path):
    sets = ["mmk12", "mathverse", "mathverse_v"]
    return (
        evaluation(tmp_path / "grpo", 0, sets, skill=0.4, images=("original", "masked"), chosen_on=["mmk12"]),
        evaluation(tmp_path / "papo", 0, sets, skill=0.7, images=("original", "masked")),
    )


def grades(run, iteration=2, name="mmk12", image="original"):
    """The grades of every prompt, by a loop over the lines of the file."""
    by_prompt = {}
    file = run / "evaluation" / f"iteration_{iteration:04}" / name / "predictions.jsonl"
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if row["image"] == image:
            by_prompt.setdefault(row["prompt_id"], []).append(row["rewards"]["accuracy"])
    return by_prompt


def average(run, name, image="original"):
    """avg@k by hand."""
    by_prompt = grades(run, 0, name, image)
    return sum(sum(scores) / len(scores) for scores in by_prompt.values()) / len(by_prompt)


def test_json(two_runs, command):
    grpo, papo = two_runs
    found = json.loads(command(grpo, papo, "--baseline", "grpo", "--format", "json"))
    base, row = found["rows"]
    assert [base["name"], row["name"]] == ["grpo", "papo"]
    keys = {"avg", "standard_error", "difference", "interval", "p", "p_corrected", "relative_gain"}
    averages = {run: {name: average(run, name) for name in ("mmk12", "mathverse", "mathverse_v")} for run in two_runs}
    for name, cell in row["sets"].items():
        old, new = (averages[run][name] for run in two_runs)
        assert set(cell) == keys
        assert cell["avg"] == pytest.approx(new) and base["sets"][name]["avg"] == pytest.approx(old)
        assert cell["difference"] == pytest.approx(new - old)
        assert cell["relative_gain"] == pytest.approx((new - old) / old)
        assert cell["interval"][0] < cell["difference"] < cell["interval"][1]
        assert base["sets"][name]["difference"] is base["sets"][name]["p"] is None
    p = [row["sets"][name]["p"] for name in row["sets"]]
    assert max(row["sets"][name]["p_corrected"] for name in row["sets"]) == pytest.approx(max(p))
    assert min(row["sets"][name]["p_corrected"] for name in row["sets"]) >= min(p)
    general = [np.mean([averages[run][name] for name in ("mmk12", "mathverse")]) for run in two_runs]
    assert row["groups"]["general"]["avg"] == pytest.approx(general[1])
    assert row["groups"]["general"]["difference"] == pytest.approx(general[1] - general[0])
    overall = [np.mean([*averages[run].values()]) for run in two_runs]
    assert row["overall"]["difference"] == pytest.approx(overall[1] - overall[0])
    gains = [(averages[papo][name] - averages[grpo][name]) / averages[grpo][name] for name in row["sets"]]
    assert row["overall"]["relative_gain"] == pytest.approx(np.mean(gains))
    assert base["chosen_on"] == ["mmk12"] and row["chosen_on"] == []


def test_vision_gain(two_runs, command):
    grpo, papo = two_runs
    found = json.loads(command(papo, "--baseline", grpo, "--format", "json"))
    assert [row["name"] for row in found["rows"]] == ["grpo", "papo"]  # a baseline that is no row becomes the first
    gains = [average(run, "mmk12") - average(run, "mmk12", "masked") for run in two_runs]
    vision = found["rows"][1]["vision"]["sets"]["mmk12"]["masked"]
    assert vision["gain"] == pytest.approx(gains[1]) and vision["interval"][0] < gains[1] < vision["interval"][1]
    assert vision["change"]["value"] == pytest.approx(gains[1] - gains[0])
    masked = json.loads(command(grpo, papo, "--image", "masked", "--format", "json"))
    assert masked["rows"][0]["sets"]["mmk12"]["avg"] == pytest.approx(average(grpo, "mmk12", "masked"))


def test_tables(two_runs, command):
    grpo, papo = two_runs
    options = (f"a_b|100%={grpo}", papo, "--rows-are", "checkpoints")
    text = command(f"a_b|100%={grpo}", papo, "--baseline", "a_b|100%", "--vision", "--power", "--published", "table1")
    assert f"{100 * average(papo, 'mmk12'):.2f} ±" in text and f"{100 * average(grpo, 'mmk12'):.2f} ±" in text
    marked, unmarked = (f"{100 * (average(papo, name) - average(grpo, name)):+.2f}" for name in ("mmk12", "mathverse"))
    assert f"{marked}*" in text and f"{unmarked}*" not in text and unmarked in text  # the second has eight problems
    assert "vision gain (masked)" in text and "detectable" in text and "†" in text
    assert "PAPO-G 3B (published)" in text and "57.39" in text
    assert "28.72" not in text and "DAPO" not in text  # geometry3k is no column, and DAPO's are not known
    assert "temperature 1.0" in text and "top_k 50" in text
    markdown = command(*options, "--format", "markdown")
    assert markdown.startswith("|  | mmk12 | mathverse | general |") and r"a\_b\|100% |" in markdown
    latex = command(*options[:2], "--baseline", "a_b|100%", "--format", "latex")
    assert r"a\_b\textbar{}100\%" in latex and r"\end{tabular}" in latex and "$^{*}$" in latex
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len({line.count("&") - line.count(r"\&") for line in rows}) == 1


def test_the_same_table_with_sets_below_each_other(two_runs, command):
    """Cell by cell the other one, turned; it is chosen where it is narrower, and not in LaTeX."""

    def cells(*options):
        lines = command(*two_runs, "--baseline", "grpo", "--format", "markdown", *options).splitlines()
        table = [line for line in lines if line.startswith("|") and not line.startswith("|---")]
        return [line.split(" | ") for line in table]

    def plain(rows):
        return [[cell.replace("&nbsp;", "").strip("| *") for cell in row] for row in rows]

    checkpoints, sets = (plain(cells("--rows-are", what)) for what in ("checkpoints", "sets"))
    assert sets == [list(column) for column in zip(*checkpoints, strict=True)]
    assert [row[0] for row in sets[1:4]] == ["mmk12", "mathverse", "general"] and sets[0][1:3] == ["grpo", "papo"]
    assert plain(cells()) == sets  # four lines, nine columns
    assert plain(cells("--vision", "--power", "--rates")) != plain(
        cells("--vision", "--power", "--rates", "--rows-are", "sets")
    )
    latex = command(*two_runs, "--baseline", "grpo", "--format", "latex")
    assert latex.partition(r"\toprule")[2].startswith("\n & mmk12 & mathverse")
    assert latex != command(*two_runs, "--baseline", "grpo", "--format", "latex", "--rows-are", "sets")


def test_the_table_of_a_page_is_what_the_command_prints(two_runs, command):
    options = (*two_runs, "--baseline", "grpo", "--sets", "mmk12")
    taken = json.loads(command(*options, "--format", "json"))
    markdown = command(*options, "--format", "markdown").splitlines()
    lines = publish_numbers.miniature({"miniature": taken})
    unmarked = [line.replace("†", "") for line in markdown]  # a page says in words which set chose a checkpoint
    assert unmarked[: len(lines)] == lines and unmarked[len(lines)] == ""


def test_published_rows_beside_other_prompts(tmp_path, command):
    """Controls: a set of the published number and sampling, and one that the authors do not have."""
    sampled = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "max_response_tokens": 2048}
    run = evaluation(tmp_path / "run", 0, ["mmk12", "evaluation"], protocol=sampled | {"max_response_tokens": 20})
    text = command(run, "--published", "table1")
    assert "not the published prompts, by their number: mmk12 40 of 2,000: do not hold" in text
    assert "not sampled as published: max_response_tokens 20, published 2048 (mmk12)" in text
    right = evaluation(tmp_path / "right", 0, ["mmk12"], protocol=sampled, prompts=2000, samples=1)
    assert "not the published" not in command(right, "--published", "table1")
    assert "not sampled as" not in command(right, "--published", "table1")
    assert "not the published prompts" not in command(run)
    own = evaluation(tmp_path / "own", 0, ["evaluation"])
    assert "published table1: no row of it is about these sets" in command(own, "--published", "table1")


def test_what_stands_beside_the_averages(two_runs, command):
    """By loops over the file: pass@4, and which part of the squared error is sampling."""
    _, papo = two_runs
    row = json.loads(command(papo, "--format", "json"))["rows"][0]
    graded = grades(papo, 0)
    rates = row["rates"]["sets"]["mmk12"]
    assert rates["pass_at_k"] == pytest.approx(sum(any(of_prompt) for of_prompt in graded.values()) / 40)
    assert (rates["format"], rates["cut_off"], rates["unparsed"], rates["mean_tokens"]) == (1, 0, 0, 2)
    within = np.mean([np.var(of_prompt, ddof=1) for of_prompt in graded.values()]) / 4 / 40
    share = within / row["sets"]["mmk12"]["standard_error"] ** 2
    assert row["sampling_share"]["sets"]["mmk12"] == pytest.approx(share)
    text = command(papo, "--rates", "--power")
    assert f"{100 * rates['pass_at_k']:.2f}" in text and f"{100 * share:.2f}" in text
    assert "pass@k" not in command(papo)


def test_too_few_problems(tmp_path, command):
    """One problem tells nothing of a difference, few tell little; control: test_json, with forty."""
    runs = [
        evaluation(tmp_path / name, 0, ["mathverse"], skill=skill, prompts=5) for name, skill in (("a", 0), ("b", 1))
    ]
    found = json.loads(command(*runs, "--baseline", "a", "--format", "json"))
    cell = found["rows"][1]["sets"]["mathverse"]
    assert cell["difference"] > 0.3 and cell["standard_error"] is cell["interval"] is cell["p"] is None
    assert found["notes"] == ["too few problems for errors, intervals and p values to be trusted: mathverse 1"]
    assert "*" not in command(*runs, "--baseline", "a").partition("in percent")[0]


def test_published_alone(command):
    found = json.loads(command("--published", "table1", "--format", "json"))
    by_name = {row["name"]: row for row in found["rows"]}
    assert list(by_name["PAPO-G 7B"]["sets"]) == list(SETS)
    assert by_name["PAPO-G 7B"]["overall"]["avg"] == pytest.approx(0.6166)
    assert by_name["PAPO-G 7B"]["groups"]["vision"]["relative_gain"] == pytest.approx(0.0796)
    assert by_name["PAPO-D 7B"]["sets"] == {} and by_name["PAPO-D 7B"]["published"] is True


def test_seeds(tmp_path, command):
    """Three runs as a row: the mean of their averages, and their spread."""
    runs = [evaluation(tmp_path / f"seed{i}", 2, ["mmk12"], skill=0.6, seed=i) for i in range(3)]
    base = evaluation(tmp_path / "base", 0, ["mmk12"], skill=0.4)
    joined = "papo=" + ",".join(map(str, runs))
    found = json.loads(command(base, joined, "--baseline", "base", "--format", "json"))["rows"][1]
    alone = [json.loads(command(run, "--format", "json"))["rows"][0]["sets"]["mmk12"]["avg"] for run in runs]
    assert found["name"] == "papo" and found["sets"]["mmk12"]["avg"] == pytest.approx(np.mean(alone))
    assert found["seeds"]["sets"]["mmk12"]["deviation"] == pytest.approx(np.std(alone, ddof=1))
    assert "sd of 3 seeds" in command(base, joined) and "of it over seeds" not in command(base, joined)
    one_run = command(base, joined, "--baseline", "base")
    assert (
        "95 % of it over seeds" in one_run and "base is one run, of whose spread over seeds nothing is known" in one_run
    )
    low, high = found["seeds"]["overall"]["interval_of_difference"]
    half = 4.303 * np.std(alone, ddof=1) * np.sqrt(4 / 3)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
    others = [evaluation(tmp_path / f"base{i}", 0, ["mmk12"], skill=0.4, seed=i) for i in range(3)]
    both = ("base=" + ",".join(map(str, others)), joined, "--baseline", "base")
    assert "95 % of it over seeds" in command(*both) and "is one run" not in command(*both)
    low, high = json.loads(command(*both, "--format", "json"))["rows"][1]["seeds"]["overall"]["interval_of_difference"]
    assert low < np.mean(alone) - np.mean([average(run, "mmk12") for run in others]) < high
    with pytest.raises(compare.UserError, match="one checkpoint twice"):
        command(f"papo={runs[0]},{runs[0]}")


def test_a_mark_over_seeds_needs_the_interval_over_seeds(tmp_path, command):
    """Two runs that differ by much say nothing of a third; control: two that agree."""
    base = evaluation(tmp_path / "base", 0, ["mmk12"], skill=0.1)
    for skills, marked in (((0.3, 0.9), False), ((0.9, 0.9), True)):
        runs = [
            evaluation(tmp_path / f"{i}-{marked}", 2, ["mmk12"], skill=skill, seed=i) for i, skill in enumerate(skills)
        ]
        joined = "papo=" + ",".join(map(str, runs))
        row = json.loads(command(base, joined, "--baseline", "base", "--format", "json"))["rows"][1]
        assert row["sets"]["mmk12"]["p_corrected"] < 0.01
        low, high = row["seeds"]["sets"]["mmk12"]["interval_of_difference"]
        assert (low > 0) == marked
        text = command(base, joined, "--baseline", "base")
        assert (f"{100 * row['sets']['mmk12']['difference']:+.2f}*" in text) == marked
        low, high = row["seeds"]["sets"]["mmk12"]["interval"]  # of an accuracy: cut at nothing and all
        assert (low < 0 and high > 1) == (not marked) and (" 0.00..100.00 " in text) == (not marked)


def test_seeds_with_different_numbers_of_samples(tmp_path, command):
    """pass@ is that of the smaller number; maj@ of both is none of either. Control: test_seeds, with one number."""
    runs = [evaluation(tmp_path / f"k{k}", 2, ["mmk12"], samples=k) for k in (2, 4)]
    joined = "papo=" + ",".join(map(str, runs))
    row = json.loads(command(joined, "--format", "json"))["rows"][0]
    assert row["samples"] == {"mmk12": None} and "avg@k in percent" in command(joined)
    rates = row["rates"]["sets"]["mmk12"]
    assert rates["maj"] is None
    right = [grades(run) for run in runs]
    of_four = np.mean([1 - math.comb(4 - int(sum(g)), 2) / math.comb(4, 2) for g in right[1].values()])
    assert rates["pass_at_k"] == pytest.approx((np.mean([any(g) for g in right[0].values()]) + of_four) / 2)


def test_iterations(tmp_path, command):
    run = evaluation(tmp_path / "run", 0, ["mmk12"], skill=0.3)
    evaluation(run, 10, ["mmk12"], skill=0.8)
    evaluation(run, 9, ["mmk12"], skill=0.8)
    (run / "evaluation" / "iteration_0011" / "mmk12.partial").mkdir(parents=True)
    (run / "evaluation" / "iteration_0011" / "mmk12.partial" / "predictions.jsonl").write_text("")
    found = json.loads(command(f"{run}@0", run, f"{run}@9", "--format", "json"))["rows"]
    assert [row["name"] for row in found] == ["run@0", "run", "run@9"]
    assert found[0]["sets"]["mmk12"]["avg"] == pytest.approx(average(run, "mmk12"))
    assert found[1]["sets"] == found[2]["sets"]
    directly = json.loads(command(run / "evaluation" / "iteration_0010", "--format", "json"))["rows"]
    assert directly[0]["name"] == "run@10" and directly[0]["sets"] == found[1]["sets"]
    assert json.loads(command(run, "--iteration", "0", "--format", "json"))["rows"][0]["sets"] == found[0]["sets"]


def test_names(tmp_path, command):
    """Where the last parts of two paths are the same, the whole paths are the names; a baseline is found by its path,
    however that is written."""
    one = evaluation(tmp_path / "a" / "out", 0, ["mmk12"], skill=0.3)
    two = evaluation(tmp_path / "b" / "out", 0, ["mmk12"], skill=0.8)
    found = json.loads(command(one, two, "--baseline", one / "." / ".." / "out", "--format", "json"))
    assert [row["name"] for row in found["rows"]] == [str(one), str(two)] and found["baseline"] == str(one)
    assert found["rows"][1]["sets"]["mmk12"]["difference"] > 0
    by_text = json.loads(command(two, "--baseline", one, "--format", "json"))
    assert [row["name"] for row in by_text["rows"]] == [str(one), str(two)] and by_text["baseline"] == str(one)
    named = json.loads(command(f"x={one}", two, "--baseline", "x", "--format", "json"))
    assert [row["name"] for row in named["rows"]] == ["x", "out"]


def test_numbers_of_samples_may_differ(tmp_path, command):
    few = evaluation(tmp_path / "few", 0, ["mmk12"], samples=2)
    many = evaluation(tmp_path / "many", 0, ["mmk12"], samples=4)
    text = command(few, many, "--baseline", "few")
    assert "mmk12: numbers of samples differ: few avg@2, many avg@4" in text and "avg@k in percent" in text


def test_a_row_without_all_sets_has_no_average_over_them(tmp_path, command):
    whole = evaluation(tmp_path / "whole", 0, ["mmk12", "mathverse", "evaluation"])
    part = evaluation(tmp_path / "part", 0, ["mmk12"], skill=0.6)
    found = json.loads(command(whole, part, "--baseline", "whole", "--format", "json"))
    assert found["rows"][1]["groups"] == {} and found["rows"][1]["overall"] is None
    assert list(found["rows"][0]["sets"]) == ["mmk12", "mathverse", "evaluation"]
    assert found["notes"] == [
        "too few problems for errors, intervals and p values to be trusted: mathverse 8",
        "part lacks mathverse, evaluation: it has no averages over them",
    ]
    assert "part lacks" in command(whole, part)
    only = json.loads(command(whole, part, "--sets", "mmk12", "--format", "json"))
    assert only["rows"][1]["overall"] is not None and only["notes"] == []


REFUSED = {
    "value": (dict(protocol=PROTOCOL | {"temperature": 0.7}), r"mmk12: a and b differ in temperature \(1.0 and 0.7\)"),
    "key": (dict(protocol=PROTOCOL | {"top_p": 1.0}), r"differ in top_p \(not given and 1.0\)"),
    "prompts": (dict(data="e", prompts=39), r"differ in prompts \(40 and 39; their problems, answers or pictures\)"),
    "ids": (dict(prompts=39), "lacks prompt mmk12-39, which others of mmk12 have"),
    "more": (dict(prompts=41), "has prompt mmk12-40, which others of mmk12 lack"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_was_not_evaluated_alike_is_refused(tmp_path, command, kind):
    """Control: test_json."""
    different, problem = REFUSED[kind]
    runs = [evaluation(tmp_path / "a", 0, ["mmk12"]), evaluation(tmp_path / "b", 0, ["mmk12"], **different)]
    with pytest.raises(compare.UserError, match=problem) as error:
        command(*runs)
    assert len(error.value.lines) == 1


def test_another_checkpoint_in_between_is_refused(tmp_path, command):
    run = evaluation(tmp_path / "run", 0, ["mmk12"])
    evaluation(run, 0, ["mathverse"], checkpoint="other")
    with pytest.raises(compare.UserError, match="answered by another checkpoint"):
        command(run)


def test_bad_arguments(tmp_path, command):
    run = evaluation(tmp_path / "run", 3, ["mmk12"])
    (tmp_path / "empty").mkdir()
    for arguments, problem in (
        ([tmp_path / "gone"], "no such directory"),
        ([tmp_path / "empty"], "nothing was evaluated here"),
        ([f"{run}@2"], "iteration 2 was not evaluated: there is 3"),
        ([run, f"x={run}", f"x={run}@3"], "x: two rows of this name"),
        ([f"x={run},"], "write NAME=RUN"),
        ([f"{run},{run}"], "several training seeds need a name"),
        ([run, "--baseline", "rum"], r"--baseline rum: no row of that name, there is run; rum: no such directory"),
        ([run, "--image", "none"], "run was not answered with the picture none: .*without_images=true"),
        ([run, "--sets", "mmk13"], "none of these sets was evaluated here: there is mmk12"),
        ([run, "--sets", "mmk12", "mmk13"], "--sets mmk13: no row has it"),
        ([f"{run}/evaluation/iteration_0003/mmk12@1"], "is no run"),
    ):
        with pytest.raises(compare.UserError, match=problem) as error:
            command(*arguments)
        assert len(error.value.lines) == 1
    for arguments in ([], ["--published", "table1", "--image", "none"], ["--published", "table1", "--baseline", "x"]):
        with pytest.raises(SystemExit):
            command(*arguments)


def test_damaged_files(tmp_path, command):
    """Each is one line that names the file; control: whole, they are read."""
    run = evaluation(tmp_path / "run", 0, ["mmk12"])
    place = run / "evaluation" / "iteration_0000" / "mmk12"
    command(run)
    whole = (place / "predictions.jsonl").read_bytes()
    (place / "predictions.jsonl").write_bytes(whole[:-3] + whole[-2:])
    with pytest.raises(compare.UserError, match=r"predictions.jsonl: differs from its manifest, damaged"):
        command(run)
    (place / "manifest.json").unlink()
    lines = whole.splitlines(keepends=True)
    for content, problem in (
        (whole[:-9], r"predictions.jsonl:160: the last line is not complete"),
        (b"".join([lines[0], b"{}\n", *lines[2:]]), r"predictions.jsonl:2: not a Prediction record"),
        (whole.replace(b'"accuracy":1.0', b'"accuracy":0.5', 1), "accuracy 0.5"),
        (b"".join(lines[:-1]), r"prompt mmk12-39 has 3 samples, others have 4"),
        (b"", "holds no records"),
        (whole.replace(b'"original"', b'"masked"'), "holds no answers to the pictures as they are"),
    ):
        (place / "predictions.jsonl").write_bytes(content)
        with pytest.raises(compare.UserError, match=problem) as error:
            command(run)
        assert len(error.value.lines) == 1
    (place / "predictions.jsonl").write_bytes(whole)
    (place / "protocol.json").rename(place / "away.json")
    with pytest.raises(
        compare.UserError, match="mmk12: no protocol.json: evaluated by a version .*tools.evaluate --hf"
    ):
        command(run)
    (place / "protocol.json").write_text("{}")
    with pytest.raises(compare.UserError, match="protocol.json: .*: evaluate again"):
        command(run)


def test_one_checkpoint_in_two_rows_is_said(tmp_path, command):
    """Control: two checkpoints, of which nothing is said."""
    one = evaluation(tmp_path / "one", 0, ["mmk12"])
    shutil.copytree(one, tmp_path / "copy")
    said = "one and copy are one checkpoint: what differs is chance"
    assert said in command(one, tmp_path / "copy", "--baseline", "one")
    other = evaluation(tmp_path / "other", 0, ["mmk12"], skill=0.5)
    assert "one checkpoint" not in command(one, other, "--baseline", "one")


def test_sets_sampled_otherwise_have_no_average(tmp_path, command):
    mixed = evaluation(tmp_path / "mixed", 0, ["mmk12"])
    evaluation(mixed, 0, ["mathverse"], protocol=PROTOCOL | {"temperature": 0.2})
    with pytest.raises(UserError, match=r"sampled otherwise \(temperature\) than mathverse"):
        command(mixed)
    assert "mmk12" in command(mixed, "--sets", "mmk12")


def test_names_of_others_are_shown_and_not_obeyed(tmp_path, command):
    run = evaluation(tmp_path / "foreign", 0, ["mmk12"], protocol=PROTOCOL | {"k\x1b[31m": 1})
    place = run / "evaluation" / "iteration_0000" / "mmk12"
    with StageOutput("stage7_evaluate", place.with_name("other"), {}, {}) as out:
        shutil.copy(place / "predictions.jsonl", out.partial)
        written = json.loads((place / "protocol.json").read_text()) | {"set": "o\x1b[31m", "groups": ["g\x1b[32m"]}
        (out.partial / "protocol.json").write_text(json.dumps(written))
    for form in ("text", "markdown", "latex"):
        assert "\x1b" not in command(run, "--format", form)


def test_an_average_over_a_part_of_its_group_says_so(tmp_path, command):
    """Control: a group whose sets are all there."""
    run = evaluation(tmp_path / "part", 0, ["mmk12", "mathverse"])
    assert "general: the mean over" not in command(run)
    for name in ("mmk12", "mathverse"):
        place = tmp_path / "whole" / "evaluation" / "iteration_0000" / name
        with StageOutput("stage7_evaluate", place, {}, {}) as out:
            old = run / "evaluation" / "iteration_0000" / name
            shutil.copy(old / "predictions.jsonl", out.partial)
            sets = {"group_sets": {"general": ["mmk12", "we_math", "mathverse"]}}
            (out.partial / "protocol.json").write_text(
                json.dumps(json.loads((old / "protocol.json").read_text()) | sets)
            )
    assert "general: the mean over 2 of its 3 sets, without we_math" in command(tmp_path / "whole")

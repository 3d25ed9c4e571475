"""tools.evaluate on the nine sets in miniature, from files as their publishers have them, with the real server."""

import json
import shutil
import subprocess
import sys

import pytest

from megatron_papo.errors import UserError
from megatron_papo.evaluation.statistics import pass_at_k
from megatron_papo.run.command_line import StageParser
from megatron_papo.run.output_lock import OutputLock
from megatron_papo.run.records import Prediction, Prompt, read_jsonl
from tests.helpers import DEMO_CONFIG, ROOT, run_module, settings

GROUPS = {
    "general": ["geometry3k", "mathvista", "we_math", "mmk12", "mathverse"],
    "vision": ["logicvista", "clevr_count", "mmmu_pro", "mathverse_v"],
}
SETS = [name for names in GROUPS.values() for name in names]
SAMPLES = 2


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The directory of the miniature: tables, archives, miniature.yaml."""
    output = tmp_path_factory.mktemp("suite") / "miniature"
    made = run_module("tools.miniature_suite", "--output", output, "--problems", 4)
    assert made.returncode == 0, made.stderr
    return output


@pytest.fixture(scope="module")
def counting_model(tmp_path_factory):
    """The demo's tiny model after a short cold start: it answers in the format, and is right now and then."""
    root = tmp_path_factory.mktemp("counting")
    wanted = ["--config", DEMO_CONFIG, *settings("data.train.count=8", "data.sft.count=512", "sft.steps=40")]
    data = run_module("stages.stage1_prepare_data", *wanted, "--output", root / "data")
    assert data.returncode == 0, data.stderr
    inputs = ["--data", root / "data", "--hf", root / "data" / "model", "--output", root / "sft"]
    torchrun = ["tools.torchrun", "--standalone", "--nproc-per-node", 2, "-m", "--", "stages.stage2_sft"]
    trained = run_module(*torchrun, *wanted, *inputs)
    assert trained.returncode == 0, trained.stderr
    return root / "sft"


@pytest.fixture(scope="module")
def evaluate(server, server_dir, miniature, counting_model):
    """Runs the tool; the model, suite and servers are given."""

    def call(output, *arguments, overrides=()):
        wanted = settings(f"evaluation.samples_per_prompt={SAMPLES}", "evaluation.max_response_tokens=24", *overrides)
        inputs = ["--hf", counting_model, "--suite", miniature / "miniature.yaml", "--server", server_dir]
        return run_module("tools.evaluate", *inputs, "--output", output, *wanted, *arguments)

    return call


@pytest.fixture(scope="module")
def evaluated(evaluate, tmp_path_factory):
    """The output, and what --json printed."""
    output = tmp_path_factory.mktemp("evaluated") / "tiny"
    shown = ["evaluation.masked_images=true", "evaluation.without_images=true"]
    done = evaluate(output, "--json", overrides=shown)
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout), done.stderr


def predictions_of(output, name, image="original"):
    records = read_jsonl(output / "evaluation" / "iteration_0000" / name / "predictions.jsonl", Prediction)
    return [record for record in records if record.image == image]


def by_prompt(records):
    right = {}
    for record in records:
        right.setdefault(record.prompt_id, []).append(record.rewards.accuracy)
    return right


def test_the_object_says_what_the_predictions_say(evaluated):
    output, printed, _ = evaluated
    assert list(printed["sets"]) == SETS and list(printed["groups"]) == list(GROUPS)
    for image, numbers in (("original", printed), *printed["images"].items()):
        for name in SETS:
            right = by_prompt(predictions_of(output, name, image))
            assert all(len(samples) == SAMPLES for samples in right.values())
            entry = numbers["sets"][name]
            assert (entry["prompts"], entry["samples_per_prompt"]) == (len(right), SAMPLES)
            assert entry["avg"] == pytest.approx(sum(map(sum, right.values())) / (SAMPLES * len(right)))
            solved = sum(any(samples) for samples in right.values()) / len(right)
            assert entry["pass_at"][str(SAMPLES)] == pytest.approx(solved)
        for group, names in GROUPS.items():
            mean = sum(numbers["sets"][name]["avg"] for name in names) / len(names)
            assert numbers["groups"][group]["avg"] == pytest.approx(mean)
        assert numbers["overall"]["avg"] == pytest.approx(sum(numbers["sets"][name]["avg"] for name in SETS) / 9)
    assert set(printed["images"]) == {"masked", "none"}
    averages = {numbers["avg"] for numbers in printed["sets"].values()}
    assert len(averages) > 2 and 0.02 < printed["overall"]["avg"] < 0.98  # a control: there is something to average


def test_prompts_are_those_of_the_files(evaluated):
    """Verbatim, every row, versions of a problem under one name in both sets; without the picture no image token."""
    output, _, _ = evaluated
    sets = output / "evaluation" / "sets"
    prompts = {name: read_jsonl(sets / name / "prompts.jsonl", Prompt) for name in SETS}
    for records in prompts.values():
        assert all(prompt.problem.startswith("<image>") for prompt in records)
        assert all(prompt.problem.endswith("\n\nYou first think.") for prompt in records)
        assert all(len(prompt.images) == 1 for prompt in records)
    problems = {name: [prompt.problem_id for prompt in records] for name, records in prompts.items()}
    assert problems["mathverse"] == [f"mathverse/{number}" for number in ids(problems["mathverse"]) for _ in range(5)]
    assert problems["mathverse_v"] == [f"mathverse/{number}" for number in ids(problems["mathverse"]) for _ in range(3)]
    assert len(set(problems["geometry3k"])) == len(problems["geometry3k"]) == 4
    alone = [prompt.without_images() for prompt in prompts["geometry3k"]]
    assert all(len(a.token_ids) < len(p.token_ids) for a, p in zip(alone, prompts["geometry3k"], strict=True))
    answers = [
        [record.response_token_ids for record in predictions_of(output, "mmk12", image)]
        for image in ("original", "masked", "none")
    ]
    assert len({json.dumps(part) for part in answers}) == 3  # the same seeds, three things shown


def ids(problems):
    return list(dict.fromkeys(problem.partition("/")[2] for problem in problems))


def test_the_protocol_is_stated(evaluated):
    output, _, _ = evaluated
    stated = json.loads((output / "evaluation" / "iteration_0000" / "mathverse_v" / "protocol.json").read_text())
    assert stated["problems_of"] == "mathverse" and stated["groups"] == ["vision"] and not stated["chosen_on"]
    protocol = stated["protocol"]
    published = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "resize": "published_evaluation"}
    published |= {"min_pixels": 1024, "max_pixels": 589824, "prompt_template": "{problem}", "grading": "mathruler"}
    assert {key: protocol[key] for key in published} == published


def test_it_goes_on_and_asks_for_more_samples_only(evaluated, evaluate, tmp_path):
    output = tmp_path / "more"
    shutil.copytree(evaluated[0], output)
    shown = ["evaluation.masked_images=true", "evaluation.without_images=true"]
    again = evaluate(output, overrides=shown)
    assert again.returncode == 0 and "samples/s" not in again.stderr, again.stderr  # nothing was sampled
    assert "mathverse_v" in again.stdout
    before = (output / "evaluation" / "iteration_0000" / "mmk12" / "predictions.jsonl").read_bytes()
    more = evaluate(output, "--sets", "mmk12", overrides=[*shown, "evaluation.samples_per_prompt=3"])
    assert more.returncode == 0, more.stderr
    assert "the responses that are there are kept" in more.stdout
    assert f"mmk12: {2 * 3 * 4} samples are kept" in more.stdout and "samples are kept" not in evaluated[2]
    stored = (output / "evaluation" / "iteration_0000" / "mmk12.samples.jsonl").read_text()
    assert len(stored.splitlines()) == 3 * 3 * 4  # nothing was sampled twice
    records = read_jsonl(output / "evaluation" / "iteration_0000" / "mmk12" / "predictions.jsonl", Prediction)
    assert len(records) == 3 * 3 * 4
    kept = "".join(record.model_dump_json() + "\n" for record in records if record.sample < SAMPLES)
    assert kept.encode() == before


def test_a_set_that_is_named_twice_is_one_set(evaluated):
    """Several names are several sets, in the order of the suite's; control: one that there is not."""
    run = ["--run", str(evaluated[0]), "--iteration", "0"]
    parser = StageParser("stage7_evaluate", "")
    for names, expected in ((["mmk12", "geometry3k"], ["mmk12", "geometry3k"]), (["mmk12", "mmk12"], ["mmk12"])):
        tasks = parser.parse([*run, *(word for name in names for word in ("--evaluation-set", name))])[1]
        assert [task.turn.evaluation_set for task in tasks] == expected
    with pytest.raises(UserError, match="--evaluation-set mmk13: the run has no set of that name"):
        parser.parse([*run, "--evaluation-set", "mmk12", "--evaluation-set", "mmk13"])


@pytest.mark.parametrize(
    "arguments, overrides, said",
    [
        (["--sets", "mathvers"], [], "--sets mathvers: the suite has no set of that name"),
        (["--source", "/nowhere"], [], "/nowhere"),
        (
            [],
            ["evaluation.benchmarks.mmmu_pro.split=none", "evaluation.benchmarks.mmmu_pro.image_archive=null"],
            "no table of split none",
        ),
        ([], ["evaluation.benchmarks.mmk12.image_archive=none.zip"], "mmk12"),
        ([], ["evaluation.top_kk=2"], "did you mean top_k?"),
    ],
)
def test_what_is_wrong_is_said_at_once(evaluate, tmp_path, arguments, overrides, said):
    refused = evaluate(tmp_path / "none", *arguments, overrides=overrides)
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr
    assert any(said in line for line in errors), refused.stderr


def test_other_grades_and_groups_ask_nobody(evaluated, evaluate, tmp_path):
    output = tmp_path / "renamed"
    shutil.copytree(evaluated[0], output)
    changes = ["evaluation.benchmarks.mmk12.groups=[mine]", "evaluation.benchmarks.mmk12.grading=published"]
    shown = ["evaluation.masked_images=true", "evaluation.without_images=true"]
    done = evaluate(output, "--json", "--sets", "mmk12", overrides=[*shown, *changes])
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["groups"]) == ["mine"]
    store = (output / "evaluation" / "iteration_0000" / "mmk12.samples.jsonl").read_bytes()
    assert store == (evaluated[0] / "evaluation" / "iteration_0000" / "mmk12.samples.jsonl").read_bytes()
    fewer = evaluate(output, "--sets", "mmk12", overrides=[*shown, *changes, "evaluation.samples_per_prompt=1"])
    assert fewer.returncode == 2 and "samples_per_prompt" in fewer.stderr, fewer.stderr


def test_a_mistake_leaves_nothing_behind(evaluate, tmp_path, counting_model):
    output = tmp_path / "corrected"
    for wrong in (["--hf", tmp_path / "none"], ["--sets", "none"], ["--server", "http://user:s3cret@127.0.0.1:9"]):
        refused = evaluate(output, *wrong)
        assert refused.returncode == 2 and not output.exists() and "s3cret" not in refused.stderr, refused.stderr


def test_two_at_once_do_not_meet(evaluate, tmp_path):
    output = tmp_path / "one"
    lock = OutputLock(output)
    refused = evaluate(output)
    lock.release()
    assert refused.returncode == 2 and "another process is making it" in refused.stderr, refused.stderr
    assert not output.exists()


def test_another_checkpoint_is_refused(evaluated, evaluate, checkpoints):
    refused = evaluate(evaluated[0], "--hf", checkpoints.second)
    assert refused.returncode == 2 and "choose another --output" in refused.stderr, refused.stderr


def test_compare_reads_it(evaluated):
    command = [sys.executable, "-m", "tools.compare", str(evaluated[0]), "--format", "json", "--published", "table1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert rows[0]["overall"]["avg"] == pytest.approx(evaluated[1]["overall"]["avg"]) and len(rows) > 1


def test_the_reference_disagrees_where_it_should():
    """A control of the shares above: of two samples one right, pass@1 is a half and pass@2 is 1."""
    import numpy as np

    assert pass_at_k(np.array([[True, False]])) == {1: 0.5, 2: 1.0}

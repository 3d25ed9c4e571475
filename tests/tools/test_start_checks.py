"""What can be known at the start is said at the start, all of it, each with what cures it."""

import json
import re
import resource
import shutil

import pytest

from megatron_papo.config import changes
from megatron_papo.config_files import load_config
from megatron_papo.data.fingerprint import source_fingerprint
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.synthetic.tiny_model import make_tiny_model
from tests.helpers import DEMO_CONFIG, ROOT
from tools import start_checks
from tools.start_checks import (
    descriptors_note,
    found_by,
    problems_of_machine,
    problems_of_places,
    problems_of_run,
    require_gpus,
)

ALL = ["1", "2", "3", "7:0", "4:1", "5:1", "6:1", "7:1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("start") / "model"
    make_tiny_model(directory, seed=1)
    return directory


@pytest.fixture
def run_with(model, tmp_path):
    def make(*overrides, model=model):
        return RunDirectory(tmp_path / "run", load_config(DEMO_CONFIG, [f"model.path={model}", *overrides]))

    return make


CONTRADICTIONS = {
    "parallel.tensor_model_parallel_size=3": "3 does not divide the text attention heads 4.*--set parallel.tensor_",
    "parallel.pipeline_model_parallel_size=5": "5 does not divide the .* text layers.*--set parallel.pipeline_model",
    "data.max_pixels=99999999": "takes pictures of at most .*--set data.max_pixels=",
    "data.max_prompt_tokens=4090": r"takes 4096 tokens .*--set data.max_prompt_tokens=4076",
    "server.max_total_tokens=50": r"cannot hold one request .* = 84: --set server.max_total_tokens=84",
}


@pytest.mark.parametrize("override, message", CONTRADICTIONS.items(), ids=CONTRADICTIONS)
def test_each_contradiction_has_a_cure(run_with, override, message):
    assert problems_of_run(run_with(), ALL) == []  # control
    found = problems_of_run(run_with(override), ALL)
    assert found and any(re.search(message, line) for line in found), found
    assert problems_of_run(run_with(override), []) == []  # nothing left to do


def test_all_of_them_at_once(run_with):
    found = "\n".join(problems_of_run(run_with(*CONTRADICTIONS), ALL))
    for part in ("attention heads", "text layers", "at most", "takes 4096 tokens", "cannot hold one request"):
        assert part in found


@pytest.mark.parametrize(
    "name, message",
    [
        ("preprocessor_config.json", "preprocessor_config.json: not there"),
        ("tokenizer.json", "tokenizer.json"),
        ("model.safetensors", "no model.safetensors"),
        ("config.json", "config.json: cannot be read"),
    ],
)
def test_files_that_a_later_stage_will_want(run_with, model, tmp_path, name, message):
    incomplete = shutil.copytree(model, tmp_path / "incomplete")
    (incomplete / name).unlink()
    assert any(message in line for line in problems_of_run(run_with(model=incomplete), ALL))


def test_tokens_beyond_the_vocabulary(run_with, model, tmp_path):
    grown = shutil.copytree(model, tmp_path / "grown")
    tree = json.loads((grown / "tokenizer.json").read_text())
    tree["model"]["vocab"]["mine"] = 100_000
    (grown / "tokenizer.json").write_text(json.dumps(tree))
    assert any("its tokenizer has ids up to" in line for line in problems_of_run(run_with(model=grown), ALL))


def test_what_this_machine_lacks(run_with, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert problems_of_machine(run_with(), ALL, own_launcher=False) == []  # control
    overrides = ["server.python=/no/python", "server.tensor_parallel_size=2", "data.train.source=/nowhere.jsonl"]
    found = "\n".join(problems_of_machine(run_with(*overrides, model="/nowhere"), ALL, own_launcher=False))
    assert "/no/python: no such Python for SGLang" in found
    assert "server.tensor_parallel_size: a server on a CPU is one process" in found
    assert "data.train.source: /nowhere.jsonl: no such file" in found
    assert "/nowhere: no such directory" in found
    of_training = problems_of_machine(run_with(*overrides), ["5:2"], own_launcher=False)
    assert of_training == []  # nothing of what stage 5 needs


def test_fewer_files_than_requests_are_a_note(run_with, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    assert descriptors_note(run_with("rollout.concurrency=4000").config) is None
    assert "--set rollout.concurrency=4000" in descriptors_note(run_with("rollout.concurrency=5000").config)


def test_no_files_for_a_server_are_an_error(run_with, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (64, 64))
    (line,) = problems_of_machine(run_with(), ALL, own_launcher=False)
    assert "this process may open 64 files, which leaves none for a server: raise it" in line
    assert problems_of_machine(run_with(), ["3", "6:1"], own_launcher=False) == []  # control: no server is asked


@pytest.mark.parametrize(
    "overrides, count, message",
    [
        (["parallel.data_parallel_size=4"], 8, "= 16 processes, 8 GPUs here: lower --set parallel.data_parallel_size="),
        (["server.first_gpu=8"], 8, "GPUs 8 to 8 .* 8 GPUs here"),
        (["server.first_gpu=1"], 8, "training takes GPUs 0 to 3: --set server.first_gpu=4"),
        (["server.first_gpu=4"], 8, None),
        (["server.first_gpu=1", "server.memory_fraction=0.2"], 8, None),
        (["parallel.data_parallel_size=4"], 0, None),
    ],
)
def test_gpus(run_with, monkeypatch, overrides, count, message):
    monkeypatch.setattr(start_checks, "count_gpus", lambda: count)
    found = found_by([lambda: require_gpus(run_with(*overrides).config)])
    assert found == [] if message is None else re.search(message, found[0]), found


def test_servers_on_other_nodes_take_no_gpus_ports_or_interfaces_here(run_with, monkeypatch):
    monkeypatch.setattr(start_checks, "count_gpus", lambda: 4)
    run = run_with("server.first_gpu=8", "server.host=ib7", "server.port=1")
    here = problems_of_machine(run, ["4:1", "5:1"], own_launcher=False)
    assert any("server.host ib7" in line for line in here) and any("GPUs 8 to 8" in line for line in here)
    monkeypatch.setenv("SERVER_LAUNCHER", "srun --nodes=2")
    assert problems_of_machine(run, ["4:1", "5:1"], own_launcher=False) == []
    [line] = problems_of_machine(run_with("server.shares_gpus=true"), ["4:1"], own_launcher=False)
    assert line.startswith("server.shares_gpus: is for one machine, SERVER_LAUNCHER starts servers on nodes")
    monkeypatch.setenv("SERVER_LAUNCHER", "srun 'open")
    [line] = problems_of_machine(run, ["4:1"], own_launcher=False)
    assert line == "SERVER_LAUNCHER=srun 'open: No closing quotation: give a command, such as " + line.split("as ")[1]


def test_a_disk_that_is_too_small(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    with open(model / "model.safetensors", "wb") as stream:
        stream.truncate(7_500_000_000)  # 3.75 G parameters; a sparse file
    preset = load_config(ROOT / "configs" / "papo_g_3b.yaml", [f"model.path={model}", "keep_checkpoints=null"])
    (line,) = problems_of_machine(RunDirectory(tmp_path, preset), ["5:1"], own_launcher=True)
    assert "(checkpoints and exports)" in line and "--set keep_checkpoints=1" in line


def test_a_place_with_other_content_is_refused_before_it_is_written(run_with, tmp_path):
    for name, answer in (("a", 1), ("same", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        row = {"problem": "?", "answer": str(answer)}
        (tmp_path / name / "rows.jsonl").write_text(json.dumps(row) + "\n")

    def at(name):
        return run_with(f"data.train.source={tmp_path}/{name}/rows.jsonl", "data.sft=null", "sft=null")

    old = at("a")
    manifest = {
        "stage": "stage1_prepare_data",
        "fingerprint": "1",
        "files": {},
        "recipe": {"inputs": {"train": source_fingerprint(old.config.data.train, old.config.data)}},
    }
    old.data.mkdir(parents=True)
    (old.data / "manifest.json").write_text(json.dumps(manifest))
    for name, is_same in (("same", True), ("other", False)):
        found = problems_of_places(at(name), changes(old.config, at(name).config))
        assert (found == []) == is_same
    assert f"--set data.train.source={tmp_path}/a/rows.jsonl, or choose another --name" in found[0]

"""tools.gpu_acceptance without a GPU: what it will find on one it finds here at tiny sizes, faults included."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from megatron_papo.checkpoint.convert import HFCheckpoint, hf_to_megatron
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.synthetic.tiny_model import make_tiny_model
from tests.helpers import ROOT, run_module
from tools.gpu_acceptance import __main__ as command
from tools.gpu_acceptance import checkpoint, iteration, kernels, parity
from tools.gpu_acceptance.report import Fact, Line, Section, as_markdown
from tools.gpu_acceptance.task import Task


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    return Task(tmp_path_factory.mktemp("acceptance"), "cpu", quick=True)


def lines_of(entries) -> dict[str, Line]:
    return {entry.what: entry for entry in entries if isinstance(entry, Line)}


def test_the_command(tmp_path):
    """Two sections; typed again, they are kept."""
    given = ["--output", tmp_path, "--device", "cpu", "--sections", "communication,environment"]
    result = run_module("tools.gpu_acceptance", *given)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is True and report["settings"]["device"] == "cpu"
    assert [section["name"] for section in report["sections"]] == ["environment", "communication"]
    [line] = report["sections"][1]["lines"]
    assert line["result"] == "pass" and "reduce-scatter" in line["found"] and "send and receive" in line["found"]
    table = (tmp_path / "report.md").read_text()
    assert "**passed**" in table and re.search(r"\| communication, \d+ s \| 2 processes \| pass \| gloo: ", table)
    assert "| torch |" in table and "not possible | --device cpu |" in table
    again = run_module("tools.gpu_acceptance", *given)
    assert again.returncode == 0 and again.stdout.count("passed before, kept") == 2


@pytest.fixture(scope="module")
def sides(task) -> parity.Sides:
    return parity.sides_of(task)


def test_the_model_equals_transformers(sides):
    found = lines_of(parity.compare(sides))
    assert len(found) == 6
    assert {what: line for what, line in found.items() if line.result != "pass"} == {}


@pytest.mark.parametrize("section, checks", [(kernels, 3), (checkpoint, 5)], ids=["kernels", "checkpoint"])
def test_the_training_part(task, section, checks):
    found = lines_of(section.run(task))
    assert len(found) == checks
    assert {what: line for what, line in found.items() if line.result != "pass"} == {}


def test_an_iteration_is_measured(task):
    found = iteration.measure(task.output, "cpu", quick=True)
    assert set(found["layouts"]) == {"plain", "group"} and "4 decoder layers" in found["shape"]
    for metrics in found["layouts"].values():
        assert metrics["moved"] and metrics["gradient_norm"] > 0
        words = iteration.as_words(metrics | {"mfu": 0.25, "peak_memory_bytes": 2e9})
        assert "tokens/s, MFU 25.0%" in words and "sweeps" in words and "2.0 GB" in words and "plan" not in words
        assert iteration.as_words(metrics | {"peak_memory_bytes": 2e9, "planned_bytes": 3e9}).endswith(
            "rollouts has 3.0"
        )
    # the group layout computes each prompt once for its group
    plain, group = found["layouts"]["plain"], found["layouts"]["group"]
    assert group["sweep_tokens_computed"] < 0.5 * plain["sweep_tokens_computed"]


def test_other_weights_fail(task, sides, tmp_path):
    """Ours is another checkpoint of the same shape: every comparison with transformers notices."""
    hf_dir, _ = task.checkpoint()
    make_tiny_model(tmp_path / "hf", seed=2, sizes=task._sizes())
    (tmp_path / "megatron").mkdir()
    hf_to_megatron(HFCheckpoint(tmp_path / "hf"), tmp_path / "megatron")
    shape = parity.Shape(2, 100, 40)
    config = task.config("bfloat16", [*shape.changes, "rollout.group_size=3"])
    hf = read_hf_config(hf_dir)
    rows = task.rows(hf, config, tmp_path / "pictures", shape)
    other = parity.by_ours(tmp_path / "megatron", hf, rows, tmp_path / "pictures", config)
    found = lines_of(parity.compare(dataclasses.replace(sides, ours=other, exact=other)))
    failed = {what for what, line in found.items() if line.result == "fail"}
    assert failed == {what for what in found if not what.startswith("control")}


def test_a_section_that_takes_too_long_or_fails_is_said_and_runs_again(tmp_path, monkeypatch, capsys):
    task = Task(tmp_path, "cpu", quick=True)
    monkeypatch.setattr(command, "LIMIT_SECONDS", 0.2)
    assert command.run_all(task, ["environment"]) == 1
    out = capsys.readouterr().out
    assert "ended after 0.2 s" in out and "failed: environment" in out
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is False
    assert "**FAILED**" in (tmp_path / "report.md").read_text()
    section = Section.read(tmp_path, "environment")
    assert section.failed and not section.finished
    monkeypatch.undo()
    (tmp_path / "model").write_text("in the way")  # no directory: the section ends with an error
    section = command.run_in_process(task, "checkpoint", {})
    assert section.failed and "ended with status 1: " in section.lines[-1].found and "model" in section.lines[-1].found


def test_a_section_whose_packages_are_missing_is_not_possible(tmp_path, monkeypatch):
    monkeypatch.setitem(command.SECTIONS, "kernels", ("torch", "no_such_package", "no_such.module"))
    Section("kernels", {}).write(tmp_path)
    command.run_section(Task(tmp_path, "cpu", quick=True), "kernels")
    [line] = Section.read(tmp_path, "kernels").lines
    assert line.result == "not possible" and "no_such_package, no_such.module missing" in line.found


def test_it_begins_with_nothing_but_python():
    """-S: no installed package can be imported."""
    modules = ", ".join(f"tools.gpu_acceptance.{name}" for name in (*command.SECTIONS, "__main__"))
    for program, status in ((f"import {modules}", 0), ("import torch", 1)):
        done = subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stderr


@pytest.mark.parametrize(
    "given, problem",
    [
        (["--sections", "parity,nccl"], "--sections 'nccl': there is no such section: environment, "),
        (["--output", "/dev/null/x", "--device", "cpu"], "cannot be made"),
        ([], "no GPU here"),
    ],
)
def test_bad_input_is_one_line(tmp_path, given, problem, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    monkeypatch.setattr(command, "DEVICE_FILE", tmp_path / "none")
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance", "--output", str(tmp_path / "out"), *given])
    assert command.main() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and problem in line


def test_a_report_is_a_table_whatever_was_found():
    section = Section("parity", {}, [Line("a | b", "fail", "c\nd")], [Fact("e", "f")], 3.2, finished=True)
    text = as_markdown([section], passed=False)
    assert "| parity, 3 s | a \\| b | **fail** | c d |" in text and "| e | f |" in text
    assert "0 pass, 1 fail, 0 not possible" in text


def test_a_damaged_file_of_a_section_counts_for_nothing(tmp_path):
    assert Section.read(tmp_path, "parity") is None
    Section("parity", {"device": "cpu"}, [Line("a", "pass", "b")], finished=True).write(tmp_path)
    assert Section.read(tmp_path, "parity").failed is False
    for text in ("", "[]", "{}", '{"lines": 1, "facts": []}', '{"lines": [{"what": 1}], "facts": []}'):
        (tmp_path / "parity.json").write_text(text)
        assert Section.read(tmp_path, "parity") is None


def test_the_sections_with_a_server(tmp_path):
    given = ["--output", tmp_path, "--device", "cpu", "--sections", "server,hand_over"]
    result = run_module("tools.gpu_acceptance", *given, timeout=1100)
    assert result.returncode == 0, result.stdout + result.stderr
    sections = {section["name"]: section for section in json.loads((tmp_path / "report.json").read_text())["sections"]}
    results = {line["what"]: line["result"] for section in sections.values() for line in section["lines"]}
    assert len(sections["server"]["lines"]) == 10 and results.pop("SGLang gives up its memory") == "not possible"
    assert set(results.values()) == {"pass"}
    assert not (tmp_path / "server" / "server.json").exists()  # stopped

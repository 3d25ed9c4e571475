"""Stages 4 and 7 that are killed in the middle ask only for what is missing, and publish the same bytes. Through the
command line, with a false server that samples by the seed."""

import json
import os
import signal
import subprocess

import pytest
from tokenizers import Tokenizer

from megatron_papo.run.records import Prompt, read_jsonl
from tests.helpers import DEMO_CONFIG, ROOT, command_of, settings
from tests.sglang.false_server import false_server

SMALL = ["rollout.rollout_batch_size=8", "rollout.group_size=3", "rollout.max_response_tokens=40"]
SMALL += ["rollout.concurrency=4", "evaluation.max_response_tokens=40", "evaluation.samples_per_prompt=2"]
STORE = "output.samples.jsonl"


def half_right(data, tokenizer):
    """Of the responses to a prompt, those with an odd seed are its answer."""
    answers = {tuple(prompt.token_ids): prompt.answer for prompt in read_jsonl(data / "prompts.jsonl", Prompt)}

    def choose(body):
        if body["sampling_params"]["sampling_seed"] % 2 == 0:
            return None
        return tokenizer.encode(f"<think>I count.</think> \\boxed{{{answers[tuple(body['input_ids'])]}}}").ids

    return choose


class Stage:
    """A stage before a false server, run again and again into one directory."""

    def __init__(self, name, data, hf, directory, server, behind):
        self.name, self.inputs, self.server, self.behind = name, ["--data", data, "--hf", hf], server, behind
        self.output, self.store = directory / "output", directory / STORE

    def run(self, *overrides, kill_at=None):
        """Return the exit status and what was asked for. kill_at: the stage is killed at this request."""
        iteration = ["--iteration", 1] if "stage4" in self.name else []
        where = ["--server", self.server.url, "--output", self.output, *iteration]
        command = [self.name, "--config", DEMO_CONFIG, *settings(*SMALL, *overrides), *self.inputs, *where]
        process = subprocess.Popen(command_of(*command), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.behind.bodies.clear()

        def fault(number, answer):
            if number == kill_at:
                os.kill(process.pid, signal.SIGKILL)

        self.behind.fault = fault
        errors = process.communicate(timeout=120)[1]
        assert process.returncode in (0, -signal.SIGKILL), errors
        asked = [body for body in self.behind.bodies if body["return_logprob"] and "logprob_start_len" not in body]
        return process.returncode, [body["sampling_params"]["sampling_seed"] for body in asked]


@pytest.fixture
def stage4(demo_data, tiny_hf, tmp_path):
    with false_server() as (server, behind):
        behind.choose = half_right(demo_data, Tokenizer.from_file(str(tiny_hf / "tokenizer.json")))
        yield Stage("stages.stage4_rollout", demo_data, tiny_hf, tmp_path, server, behind)


def test_rollouts_of_several_rounds(stage4, tmp_path):
    overrides = ["rollout.dynamic_sampling={max_rounds: 9, generation_batch_size: 5}"]
    status, all_of_them = stage4.run(*overrides)
    assert status == 0 and not stage4.store.exists() and len(set(all_of_them)) == len(all_of_them) >= 24
    stage4.output.rename(tmp_path / "undisturbed")
    assert stage4.run(*overrides, kill_at=17)[0] != 0
    kept = stage4.store.read_bytes().splitlines()
    assert 10 < len(kept) <= 17 and not stage4.output.exists()
    stage4.store.write_bytes(b"\n".join(kept[:-1]) + b"\n" + kept[-1][:50])  # killed while it wrote a line
    status, asked = stage4.run(*overrides)
    assert status == 0 and len(asked) == len(all_of_them) - len(kept) + 1 and set(asked) < set(all_of_them)
    one, other = ((place / "rollouts.jsonl").read_bytes() for place in (stage4.output, tmp_path / "undisturbed"))
    assert one == other and not stage4.store.exists()
    counts = json.loads((stage4.output / "manifest.json").read_text())["counts"]
    assert (
        counts["requests_stored"] == len(kept) - 1 < counts["requests_stored_tokens"]
        and 0 < counts["accuracy_kept"] < 1
    )


def test_an_evaluation_with_more_samples_asks_for_the_others(evaluation_data, tiny_hf, tmp_path):
    with false_server() as (server, behind):
        stage = Stage("stages.stage7_evaluate", evaluation_data, tiny_hf, tmp_path, server, behind)
        status, all_of_them = stage.run()
        assert status == 0 and len(all_of_them) == 2 * 2 * 32  # with and without the pictures
        stage.output.rename(tmp_path / "two")
        status, asked = stage.run("evaluation.samples_per_prompt=3", kill_at=30)
        assert status != 0
        status, rest = stage.run("evaluation.samples_per_prompt=3")
        assert status == 0 and not set(rest) & set(all_of_them)
        assert 2 * 32 <= len(asked) + len(rest) <= 2 * 32 + 4  # those under way were lost
        metrics = json.loads((stage.output / "metrics.json").read_text())
        assert metrics["samples_per_prompt"] == 3 and metrics["responses"] == 3 * 32

"""tools.check_parity with real servers: equal checkpoints pass, and every fault is noticed, through the command
line."""

import json
import shutil

import pytest

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.sglang.client import SglangClient
from tests.helpers import DEMO_CONFIG, run_module
from tools import check_parity


@pytest.fixture(scope="module")
def megatron(checkpoints, tmp_path_factory):
    """The first checkpoint in Megatron's format."""
    output = tmp_path_factory.mktemp("megatron") / "first"
    made = run_module("tools.convert", "to-megatron", "--hf", checkpoints.first, "--output", output)
    assert made.returncode == 0, made.stderr
    return output


def check(*arguments, server=None):
    """-> (exit status, the JSON object of the last line, everything printed)."""
    env = {"SGLANG_API_KEY": server.api_key} if server else {}
    result = run_module("tools.check_parity", *arguments, env=env)
    lines = result.stdout.splitlines()
    return (
        result.returncode,
        json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None,
        result.stdout + result.stderr,
    )


@pytest.fixture(scope="module")
def own_server(checkpoints, megatron):
    """Everything by default: its own server, its own prompts; and the four faults made on purpose."""
    return check("--hf", checkpoints.first, "--megatron", megatron, "--controls")


def test_equal_checkpoints_pass(own_server):
    status, answer, text = own_server
    assert status == 0 and answer["passed"] is True, text
    # float32 on both sides; a model that samples forbidden tokens with 10 % probability: the allowed ones are accounted
    # for exactly
    assert answer["max_abs_difference"] < 1e-4 and 0 < answer["mean_abs_difference"] < 1e-5
    assert answer["tokens"] > 2000 and abs(answer["sampling_bias"]) < 5 * answer["sampling_bias_error"]


@pytest.mark.parametrize("control", ["resize", "position_ids", "stale_weights", "top_p"])
def test_faults_made_on_purpose_are_noticed(own_server, control):
    _, answer, text = own_server
    found = answer["controls"][control]
    assert found["noticed"] and f"control {control}: " in text
    if control == "top_p":  # in how surprising the tokens are, and nowhere else
        assert found["mean_abs_difference"] < 1e-5 and found["sampling_bias"] < -0.05
    else:
        assert found["mean_abs_difference"] > 1e-3


def test_a_stale_server_fails_with_the_worst_tokens(server, client, checkpoints, megatron, tmp_path):
    """A server that somebody forgot to update: not passed, and it is left as it is. With --load it is brought up to
    date and passes."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"problem": "How many squares?", "images": ["a.png"]}) + "\n")
    from PIL import Image

    Image.new("RGB", (200, 100), (200, 30, 90)).save(tmp_path / "a.png")
    common = [
        "--hf",
        checkpoints.first,
        "--megatron",
        megatron,
        "--server",
        server.url,
        "--prompts",
        tmp_path / "prompts.jsonl",
    ]
    client.update_weights(checkpoints.second, "second")
    status, answer, text = check(*common, server=server)
    assert (
        status == 1
        and answer["passed"] is False
        and answer["mean_abs_difference"] > 0.1
        and answer["weight_version"] == "second"
    )
    assert "failed: log-probs differ by" in text and "line_1 sample" in text and ">>" in text and "<<" in text
    assert SglangClient([server], 1, 60).weight_versions() == ["second"]
    status, answer, text = check(*common, "--load", server=server)
    assert status == 0 and answer["passed"] is True and answer["max_abs_difference"] < 1e-4, text
    # a limit of one's own; and top_p of a configuration gives tokens that are no samples of the policy, with equal
    # log-probs
    status, answer, text = check(*common, "--set", "rollout.top_p=0.5", "--max-difference", "1e-9", server=server)
    assert status == 1 and answer["limits"]["max"] == 1e-9 and "limit 1e-09" in text
    assert "less surprising than samples of the policy" in text and answer["max_abs_difference"] < 1e-4


@pytest.mark.parametrize(
    "line, words",
    [
        ("not json", "cannot be read as JSONL"),
        ('{"images": []}', "expected an object with `problem`"),
        ('{"problem": "?", "images": ["none.png"]}', "none.png"),
    ],
)
def test_bad_prompts(checkpoints, tmp_path, line, words):
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=words):
        check_parity.read_prompts(tmp_path / "prompts.jsonl", checkpoints.first, load_config(DEMO_CONFIG))


def test_another_checkpoint_fails_before_a_server_is_asked(checkpoints, megatron, tmp_path):
    broken = tmp_path / "megatron"
    shutil.copytree(megatron, broken)
    (broken / "hf" / "config.json").unlink()
    result = run_module("tools.check_parity", "--hf", checkpoints.first, "--megatron", broken)
    assert result.returncode == 2 and "config.json" in result.stderr

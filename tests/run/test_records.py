"""JSONL files: round trip, and one line that names file and line number for every kind of damage."""

from pathlib import Path

import pytest

from megatron_papo.errors import UserError
from megatron_papo.run.records import Prompt, Rewards, Rollout, groups_of, read_jsonl, write_jsonl

HERE = Path("rollouts.jsonl")


def prompt(number):
    return Prompt(
        id=f"p{number}", problem="how many?\n<image>", answer="3", token_ids=[1, 2], num_tokens=5, images=["a.png"]
    )


def rollout(group, sample, prompt_id=None):
    return Rollout(
        prompt_id=prompt_id or f"p{group}",
        iteration=1,
        epoch=0,
        group=group,
        sample=sample,
        answer="3",
        prompt_token_ids=[1],
        prompt_num_tokens=1,
        images=[],
        response_token_ids=[2],
        rollout_log_probs=[-0.1],
        text="x",
        finish_reason="stop",
        rewards=Rewards(overall=1.0, accuracy=1.0, format=1.0),
        temperature=1.0,
        top_p=1.0,
        sampling_seed=2**62,
        masked_image_seed=3,
        weight_version="v",
    )


def test_round_trip(tmp_path):
    records = [prompt(0), prompt(1)]
    assert write_jsonl(tmp_path / "f.jsonl", records) == 2
    assert read_jsonl(tmp_path / "f.jsonl", Prompt) == records
    write_jsonl(tmp_path / "g.jsonl", [rollout(0, 0)])
    assert read_jsonl(tmp_path / "g.jsonl", Rollout)[0].sampling_seed == 2**62


@pytest.mark.parametrize(
    "field, value",
    [
        ("rollout_log_probs", [float("nan")]),
        ("rollout_log_probs", [float("-inf")]),
        ("rollout_log_probs", [0.5]),
        ("response_token_ids", [-1]),
        ("temperature", float("inf")),
        ("rewards", Rewards(overall=1.0, accuracy=1.0, format=1.0).model_copy(update={"overall": float("nan")})),
    ],
)
def test_nothing_is_written_that_is_refused_when_it_is_read(tmp_path, field, value):
    """Control: pydantic alone writes null."""
    wrong = rollout(0, 1).model_copy(update={field: value})
    with pytest.raises(UserError, match=rf"f.jsonl:2: not written: {field}"):
        write_jsonl(tmp_path / "f.jsonl", [rollout(0, 0), wrong])
    (tmp_path / "g.jsonl").write_text(wrong.model_dump_json() + "\n")
    with pytest.raises(UserError, match=f"g.jsonl:1: not a Rollout record: {field}"):
        read_jsonl(tmp_path / "g.jsonl", Rollout)


def test_damage(tmp_path):
    file = tmp_path / "f.jsonl"
    write_jsonl(file, [prompt(0), prompt(1)])
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"f.jsonl:2: the last line is not complete"):
        read_jsonl(file, Prompt)
    file.write_bytes(whole.replace(b'"problem"', b'"problme"', 1))
    with pytest.raises(UserError, match=r"f.jsonl:1: not a Prompt record: problem"):
        read_jsonl(file, Prompt)
    with pytest.raises(UserError, match=r"f.jsonl:1: not a Rollout record"):
        file.write_bytes(whole)
        read_jsonl(file, Rollout)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="holds no records"):
        read_jsonl(file, Prompt)
    with pytest.raises(UserError, match="cannot be read"):
        read_jsonl(tmp_path / "none.jsonl", Prompt)


def test_groups():
    whole = [rollout(g, s) for g in range(3) for s in range(2)]
    assert [len(group) for group in groups_of(whole, 2, HERE)] == [2, 2, 2]
    for broken in (
        whole[:-1],
        whole[:2] + whole[4:],
        [whole[1], whole[0]],
        [rollout(0, 0), rollout(0, 1, prompt_id="other")],
    ):
        with pytest.raises(UserError, match="groups|group"):
            list(groups_of(broken, 2, HERE))

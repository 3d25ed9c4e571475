"""Outputs appear whole or not at all; damaged, foreign and outdated ones are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run import stage_output
from megatron_papo.run.stage_output import Input, StageOutput, input_made_or_from_outside, read_manifest, require_input

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def output(directory, *overrides, stage="stage1_prepare_data", inputs=None, arguments=None):
    config = load_config(DEMO, overrides)
    values = {"seed": config.seed, "rollout": config.rollout.model_dump(), "model.dtype": config.model.dtype}
    return StageOutput(stage, directory, values, inputs or {}, arguments)


def make(directory, text="hello", **options):
    out = output(directory, **options)
    with out:
        (out.partial / "sub").mkdir()
        (out.partial / "sub" / "file.txt").write_text(text)
        out.counts["files"] = 1
    return out


def test_publishes_with_everything_recorded(tmp_path):
    out = make(tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    assert not out.partial.exists()
    assert manifest.fingerprint == out.fingerprint
    assert manifest.counts == {"files": 1}
    assert manifest.files["sub/file.txt"].model_dump() == {
        "bytes": 5,
        "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",  # sha256sum of "hello"
    }
    assert manifest.packages["torch"] and manifest.seconds > 0
    assert output(tmp_path / "data").done
    assert not output(tmp_path / "other").done


def test_the_fingerprint_covers_what_the_stage_reads_and_nothing_else(tmp_path):
    base = output(tmp_path / "x").fingerprint
    assert output(tmp_path / "y").fingerprint == base
    assert output(tmp_path / "x", "optimizer.learning_rate=1").fingerprint == base
    different = [
        output(tmp_path / "x", "seed=2"),
        output(tmp_path / "x", "rollout.temperature=0.5"),
        output(tmp_path / "x", "model.dtype=bfloat16"),
        output(tmp_path / "x", stage="stage2_sft"),
        output(tmp_path / "x", inputs={"a": Input(None, "1")}),
        output(tmp_path / "x", arguments={"iteration": 1}),
    ]
    assert len({base, *(out.fingerprint for out in different)}) == 7


def test_an_output_made_from_something_else_is_kept_and_named(tmp_path):
    make(tmp_path / "data")
    with pytest.raises(UserError, match="differs in config.seed"):
        output(tmp_path / "data", "seed=2")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(UserError, match="not an output of this pipeline"):
        output(tmp_path / "foreign")


@pytest.mark.parametrize("kind", ["file", "fifo", "dangling", "loop", "device", "long", "nul", "below a file"])
def test_a_place_where_no_directory_can_be_is_refused_before_the_work(tmp_path, kind):
    place = tmp_path / "out"
    if kind == "file":
        place.write_text("mine")
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind in ("dangling", "loop"):
        place.symlink_to(tmp_path / "nothing" if kind == "dangling" else place)
    elif kind == "below a file":
        (tmp_path / "file").write_text("mine")
        place = tmp_path / "file" / "out"
    else:
        place = {"device": Path("/dev/null"), "long": tmp_path / ("x" * 250), "nul": tmp_path / "a\0b"}[kind]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as said:
        output(place)
    assert said.value.lines[0].startswith(str(place)[:100].partition("\0")[0]) and "another --output" in str(said.value)
    assert sorted(tmp_path.iterdir()) == before
    output(tmp_path / ("x" * 200))  # control


def test_a_lock_file_with_content_is_somebodys_own(tmp_path):
    lock = tmp_path / "poetry.lock"
    lock.write_text("[[package]]")
    with pytest.raises(UserError, match="poetry.lock: is in the way"), output(tmp_path / "poetry"):
        pass
    assert lock.read_text() == "[[package]]" and list(tmp_path.iterdir()) == [lock]
    lock.write_text("")  # as a killed process leaves it
    make(tmp_path / "poetry")
    assert not lock.exists() and read_manifest(tmp_path / "poetry") is not None
    with output(tmp_path / "other"):
        (tmp_path / "other.lock").write_text("written meanwhile")
    assert (tmp_path / "other.lock").read_text() == "written meanwhile"


def test_an_error_leaves_nothing(tmp_path):
    out = output(tmp_path / "data")
    with pytest.raises(ZeroDivisionError), out:
        (out.partial / "file").write_text("x")
        1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_only_a_partial_that_the_next_attempt_replaces(tmp_path):
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2]); import test_stage_output as t;"
        "from pathlib import Path;"
        "out = t.output(Path(sys.argv[1]));"
        "out.__enter__(); (out.partial / 'stale').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "data"), str(Path(__file__).parent)], env=environment)
    assert (tmp_path / "data.partial" / "stale").exists() and not (tmp_path / "data").exists()
    with pytest.raises(UserError, match="only an unfinished .partial is there"):
        require_input(tmp_path / "data", ("stage1_prepare_data",), "COMMAND")
    make(tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]
    assert not (tmp_path / "data" / "stale").exists()


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda d: (d / "sub" / "file.txt").write_text("hellp"), "differs from its manifest"),
        (lambda d: (d / "sub" / "file.txt").write_text("hell"), "differs from its manifest"),
        (lambda d: (d / "sub" / "file.txt").unlink(), "missing"),
    ],
)
def test_damage_is_found_before_the_input_is_used(tmp_path, damage, expected):
    make(tmp_path / "data")
    user = output(
        tmp_path / "next",
        stage="stage4_rollout",
        inputs={"data": require_input(tmp_path / "data", ("stage1_prepare_data",), "C")},
    )
    with user:
        pass
    damage(tmp_path / "data")
    user = output(
        tmp_path / "again",
        stage="stage4_rollout",
        inputs={"data": require_input(tmp_path / "data", ("stage1_prepare_data",), "C")},
    )
    with pytest.raises(UserError, match=expected), user:
        pass
    assert not (tmp_path / "again").exists() and not (tmp_path / "again.partial").exists()


def test_missing_and_foreign_inputs_name_the_command(tmp_path):
    with pytest.raises(UserError, match="not there: make it with: COMMAND"):
        require_input(tmp_path / "data", ("stage1_prepare_data",), "COMMAND")
    make(tmp_path / "data")
    with pytest.raises(UserError, match="made by stage1_prepare_data, expected the output of stage3.*COMMAND"):
        require_input(tmp_path / "data", ("stage3_convert_to_megatron",), "COMMAND")
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="no manifest.json"):
        require_input(tmp_path / "plain", ("stage1_prepare_data",), "COMMAND")
    (tmp_path / "data" / "manifest.json").write_text('{"stage": ')
    with pytest.raises(UserError, match="damaged manifest"):
        require_input(tmp_path / "data", ("stage1_prepare_data",), "COMMAND")


def test_outside_inputs_count_by_content(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_text("1")
    first = input_made_or_from_outside(tmp_path / "a", "hint").fingerprint
    (tmp_path / "a").rename(tmp_path / "b")
    assert input_made_or_from_outside(tmp_path / "b", "hint").fingerprint == first
    (tmp_path / "b" / "f").write_text("2")
    assert input_made_or_from_outside(tmp_path / "b", "hint").fingerprint != first
    with pytest.raises(UserError, match="not there: hint"):
        input_made_or_from_outside(tmp_path / "c", "hint")


def test_what_a_stage_made_counts_by_its_recipe(tmp_path):
    made = make(tmp_path / "data")
    assert input_made_or_from_outside(tmp_path / "data", "hint").fingerprint == made.fingerprint
    (tmp_path / "data" / "sub" / "file.txt").write_text("other bits of another GPU")
    assert input_made_or_from_outside(tmp_path / "data", "hint").fingerprint == made.fingerprint


def test_files_are_verified_once_however_many_inputs_lie_there(tmp_path, count_of_hashes):
    make(tmp_path / "data")
    same = {name: require_input(tmp_path / "data", ("stage1_prepare_data",), "C") for name in ("a", "b", "c")}
    before = len(count_of_hashes)
    with output(tmp_path / "next", stage="stage4_rollout", inputs=same):
        assert count_of_hashes[before:] == [tmp_path / "data" / "sub" / "file.txt"]
    trusted = {name: Input(made.path, made.fingerprint, verify=False) for name, made in same.items()}
    before = len(count_of_hashes)
    with output(tmp_path / "again", stage="stage4_rollout", inputs=trusted):
        assert count_of_hashes[before:] == []


@pytest.fixture
def count_of_hashes(monkeypatch):
    """The files that are hashed, in order; the hashing is the real one."""
    hashed, real = [], stage_output.file_hash
    monkeypatch.setattr(stage_output, "file_hash", lambda path: hashed.append(path) or real(path))
    return hashed


def test_nothing_but_git_is_missing_without_git(tmp_path):
    """What only describes a run does not end it."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_stage_output as t; from pathlib import Path;"
        "t.make(Path(sys.argv[1]))"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path / "data"), str(Path(__file__).parent)]
    subprocess.run(command, env=environment, check=True)
    assert read_manifest(tmp_path / "data").git_commit is None


def test_manifest_is_plain_json(tmp_path):
    make(tmp_path / "data")
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["stage"] == "stage1_prepare_data"

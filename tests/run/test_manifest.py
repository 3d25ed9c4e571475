"""Records that somebody damaged or forged are one line."""

import json
import re

import pytest

from megatron_papo.checkpoint.proof import require_proof
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.manifest import read_manifest, require_weights
from megatron_papo.run.outside import MEMORY, remembered_fingerprint
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stage_output import nested, verify_files
from megatron_papo.run.stages import STAGES, Turn
from megatron_papo.run.state import require_current
from tests.helpers import DEMO_CONFIG

GOOD = {"stage": "stage1_prepare_data", "fingerprint": "f" * 64, "files": {"a": {"bytes": 1, "sha256": "0" * 64}}}
NONE = ["", "[]", "1", "null", "{}", '"text"', "[" * 100_000, "\x00", "{" + '"a":{' * 3000, "\xff\xfe"]
BAD = [
    GOOD | {"files": []},
    GOOD | {"files": {"a": {"bytes": -1, "sha256": "0"}}},
    GOOD | {"files": {"a": {"bytes": 1.5, "sha256": "0"}}},
    GOOD | {"files": {"a": {"bytes": "1", "sha256": "0"}}},
    GOOD | {"files": {"../a": {"bytes": 1, "sha256": "0"}}},
    GOOD | {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}},
    GOOD | {"files": {"n" * 300: {"bytes": 1, "sha256": "0"}}},
    GOOD | {"files": {"a\x00b": {"bytes": 1, "sha256": "0"}}},
    GOOD | {"fingerprint": ""},
    GOOD | {"fingerprint": 7},
    GOOD | {"counts": []},
    GOOD | {"seconds": -1},
    GOOD | {"recipe": {"inputs": {"data": 3}}},
    GOOD | {"inputs": {"data": None}},
]


@pytest.mark.parametrize("text", NONE + [json.dumps(tree) for tree in BAD], ids=lambda text: text[:60] + str(len(text)))
def test_a_manifest_that_is_none(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="manifest.json: .*damaged manifest: remove .* and make it again") as said:
        read_manifest(tmp_path)
    assert len(said.value.lines) == 1 and len(str(said.value)) < 1000
    (tmp_path / "manifest.json").write_text(json.dumps(GOOD))
    assert read_manifest(tmp_path).stage == "stage1_prepare_data"  # control


@pytest.mark.parametrize("text", [*NONE, '{"key": "rm -rf"}', '{"key": 3}'])
def test_a_note_of_deleted_weights_that_is_none(tmp_path, text):
    (tmp_path / "pruned.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="pruned.json: .*: make .* again"):
        require_weights(tmp_path)


@pytest.mark.parametrize("text", [*NONE, '{"version": 2, "tensors": []}', '{"version": 2, "passed": "yes"}'])
def test_a_proof_that_is_none(tmp_path, text):
    (tmp_path / "proof.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="proof.json: .*damaged proof: convert the checkpoint again"):
        require_proof(tmp_path)


@pytest.mark.parametrize("text", [*NONE, '{"x": {"stamps": 1, "fingerprint": 2}}'])
def test_a_memory_that_is_none_is_forgotten(tmp_path, text):
    (tmp_path / "file").write_text("x")
    (tmp_path / MEMORY).write_bytes(text.encode("latin-1"))
    assert remembered_fingerprint(tmp_path, tmp_path / "file", lambda path: "new") == "new"
    assert remembered_fingerprint(tmp_path, tmp_path / "file", lambda path: "again") == "new"


def test_a_renamed_run_is_made_again_by_its_present_name(tmp_path):
    data = tmp_path / "new name" / "data"
    data.mkdir(parents=True)
    (data.parent / ".config.yaml").touch()
    command = ".venv/bin/python -m stages.stage1_prepare_data --run runs/old --iteration 1"
    (data / "manifest.json").write_text(json.dumps(GOOD | {"command": command}))
    with pytest.raises(UserError) as said:
        verify_files(data)
    assert f"stages.stage1_prepare_data --run '{data.parent}' --iteration 1" in str(said.value)


@pytest.mark.parametrize(
    "override, reason",
    [
        ("data.evaluation.source=/nowhere.parquet", "data.evaluation.source is /nowhere.parquet, was /a.jsonl"),
        ("data.prompt_template={problem}!", "config.data.prompt_template"),
    ],
)
def test_data_that_changed_is_noticed_where_stage_1_is_not_asked_for(tmp_path, override, reason):
    """As `--stages 7` does: what the set was made from is compared with the configuration, and the key is named."""
    model = ["model.path=/model", "data.evaluation.source=/a.jsonl"]
    turn = Turn(evaluation_set="evaluation")
    old = RunDirectory(tmp_path, load_config(DEMO_CONFIG, model))
    stage = STAGES["stage1_prepare_data"]
    recipe = {
        "stage": stage.name,
        "config": nested(stage.values(old.config, turn)),
        "arguments": stage.arguments(turn),
        "inputs": {},
    }
    place = old.evaluation_data("evaluation")
    place.mkdir(parents=True)
    inputs = {"evaluation": "/a.jsonl", "hf": "/model", "tokenizer": "/model"}
    (place / "manifest.json").write_text(json.dumps(GOOD | {"recipe": recipe, "inputs": inputs}))
    require_current(old, place)  # control
    with pytest.raises(UserError, match=re.escape(reason)):
        require_current(RunDirectory(tmp_path, load_config(DEMO_CONFIG, [*model, override])), place)

"""tools.plan_memory as a user runs it: its JSON, its tables, what it refuses."""

import json

import pytest

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from tests.helpers import DEMO_CONFIG, run_module
from tools import plan_memory, start_run
from tools.convert.geometry import config_tree

TINY = ["--config", "configs/demo.yaml", "--geometry", "tiny"]
ONE = "parallel.tensor_model_parallel_size=1 parallel.pipeline_model_parallel_size=1 parallel.sequence_parallel=false"
LAYOUT = [word for setting in ONE.split() for word in ("--set", setting)]


def test_json(tmp_path, monkeypatch):
    arguments = [*TINY, *LAYOUT, "--json", "--gpu-memory", "1GB", "--set", "data.max_prompt_tokens=64"]
    done = run_module("tools.plan_memory", *arguments, env={"XDG_CACHE_HOME": str(tmp_path)}, timeout=600)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    (rank,) = plan["ranks"]
    assert {key: rank[key] for key in ("rank", "tensor", "pipeline", "data")} == dict.fromkeys(
        ("rank", "tensor", "pipeline", "data"), 0
    )
    phases = ["build", "resident", "sweep_reference", "sweep_policy", "update", "optimizer", "save", "export"]
    assert list(rank["phases"]) == phases
    assert all(0 < phase["live_bytes"] <= phase["peak_bytes"] for phase in rank["phases"].values())
    assert {"host", "disk", "tokens", "flops", "fits"} <= plan.keys()
    assert plan["fits"] is False and "rank 0" in plan["problems"][0]
    assert plan["disk"]["export"] == 4 * rank["parameters"]  # float32
    assert list((tmp_path / "megatron_papo" / "plan").glob("*.json"))
    # a dry run prints what is known, and nothing of what would have to be traced
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config_tree("tiny")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    of_model = [*LAYOUT[1::2], f"model.path={tmp_path / 'model'}"]
    known, unknown = (load_config(DEMO_CONFIG, [*of_model, f"data.max_prompt_tokens={n}"]) for n in (64, 65))
    assert "TP1 x PP1 x DP1" in "\n".join(plan_memory.needs(known, None))
    assert plan_memory.needs(unknown, None) == []


def test_a_plan_is_of_a_dry_run(monkeypatch):
    with pytest.raises(UserError, match="--plan goes with --dry-run"):
        start_run.parse(["--plan", "80GB"])
    with pytest.raises(UserError, match="--plan 80: a number with its unit is expected"):
        start_run.parse(["--plan", "80", "--dry-run"])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--geometry", "9b"], "--geometry 9b: no such size, there are tiny, 3b, 7b, 32b, 72b: or give --model DIR"),
        (["--geometry", "3b", "--gpu-memory", "80"], "--gpu-memory 80: a number with its unit is expected"),
        (["--geometry", "3b", "--gpu-memory", "80 lb"], "--gpu-memory 80 lb: a number with its unit"),
        (["--geometry", "3b", "--rank", "4"], "--rank 4: the layout has ranks 0 to 3: give one of them"),
        (["--geometry", "3b", "--rank", "-1"], "--rank -1: the layout has ranks 0 to 3"),
        (["--geometry", "3b", "--set", "parallel.tensor_model_parallel_size=3"],
         "parallel.tensor_model_parallel_size 3 does not divide the text attention heads 16"),
        (["--geometry", "3b", "--gpu", "TPU"], "--gpu TPU: its peak is not known"),
        (["--geometry", "3b", "--mfu", "0"], "--mfu 0.0: give a share above 0"),
        (["--model", "nowhere"], "nowhere: no such directory: give --model DIR, or --geometry"),
        (["--geometry", "3b", "--fit"], "--fit and --gpus go together: give both, e.g. --fit --gpus 8"),
        (["--geometry", "3b", "--gpus", "8"], "--fit and --gpus go together"),
        (["--geometry", "3b", "--fit", "--gpus", "8", "--all"], "--fit looks at ranks by itself"),
        (["--geometry", "3b", "--fit", "--gpus", "0"], "--gpus 0: give the number of GPUs, at least 1"),
        (["--geometry", "3b", "--fit", "--gpus", "12"], "--gpus 12: of several nodes with 8 GPUs each"),
        (["--geometry", "72b", "--fit", "--gpus", "1"], "--fit: no layout of 1 GPUs of 80GB holds this model"),
        (["--geometry", "3b", "--write", "/nowhere/file.yaml"], "--write /nowhere/file.yaml: no such directory"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments, said, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan_memory", "--config", "configs/demo.yaml", *arguments])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError) as refused:
        plan_memory.main()
    assert refused.value.lines[0].startswith(said)
    assert all("\n" not in line for line in refused.value.lines)


def test_sizes_have_units():
    assert plan_memory.size_in_bytes("80GB") == 80_000_000_000
    assert plan_memory.size_in_bytes("1.5 GiB") == 3 * 2**29

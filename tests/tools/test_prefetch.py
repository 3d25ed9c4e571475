"""tools.prefetch against a hub on loopback, and what a run says and does afterwards without a network."""

import json
import re
import shutil

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.helpers import run_module, settings
from tests.hub import serving

PRESET = "configs/papo_g_3b.yaml"
DATA = ["data.train.source=me/rows", "data.evaluation.source=me/rows"]


@pytest.fixture(scope="module")
def hub(tiny_hf, demo_data, tmp_path_factory):
    """The demo's model by an official name, with pickled weights beside it, and four of its rows as a data set."""
    root = tmp_path_factory.mktemp("hub")
    model = shutil.copytree(tiny_hf, root / "model")
    (model / "pytorch_model.bin").write_bytes(b"pickled")
    rows = [json.loads(line) for line in (demo_data / "prompts.jsonl").read_text().splitlines()[:4]]
    pictures = [[{"bytes": (demo_data / row["images"][0]).read_bytes(), "path": None}] for row in rows]
    columns = {
        "problem": [f"<image>{number}" for number in range(4)],
        "answer": ["1", "2", "3", "4"],
        "images": pictures,
    }
    (root / "rows" / "data").mkdir(parents=True)
    parquet.write_table(pa.table(columns), root / "rows" / "data" / "train-00000-of-00001.parquet")
    with serving({"models/Qwen/Qwen2.5-VL-3B-Instruct": model, "datasets/me/rows": root / "rows"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home") / "cache"


def prefetch(hub, home, *overrides, **environment):
    where = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return run_module("tools.prefetch", "--config", PRESET, *settings(*overrides), env=where | environment)


def test_a_run_without_a_network_reads_what_was_downloaded(hub, home, tmp_path):
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}

    def start(*overrides):  # what run_all.sh asks first
        arguments = ["--config", PRESET, "--name", "none", "--stages", "1", "--dry-run", "--write"]
        return run_module("tools.start_run", *arguments, *settings(*DATA, *overrides), env=offline).stderr

    before = start()
    assert "HF_HUB_OFFLINE is set: where there is a network run" in before  # both are missing, both are said
    command = f".venv/bin/python -m tools.prefetch --config {PRESET} {' '.join(settings(*DATA))}"
    assert before.count(command) == 3 and "Qwen2.5-VL-3B-Instruct: no such directory" in before

    done = prefetch(hub, home, *DATA)
    assert done.returncode == 0, done.stderr
    assert sorted(set(hub.downloads)) == sorted(set(hub.downloads) - {"pytorch_model.bin"})
    assert {"model.safetensors", "tokenizer.json", "train-00000-of-00001.parquet"} <= set(hub.downloads)
    variables, command = done.stdout.rstrip().splitlines()[-2:]
    assert variables.split() == ["export", f"HF_HOME={home}", "HF_HUB_OFFLINE=1"]
    path = command.split("model.path=")[1]
    assert command.split()[:4] == ["bash", "run_all.sh", "--config", PRESET] and path.startswith(str(home))

    assert "me/rows" not in start(f"model.path={path}") and "no such directory" not in start(f"model.path={path}")
    limits = ["data.min_pixels=3136", "data.max_pixels=50176", "rollout.rollout_batch_size=4", f"model.path={path}"]
    limits += ["training.global_batch_size=4", "parallel.data_parallel_size=4", "data.max_suspicious_share=1"]
    arguments = ["--config", PRESET, *settings(*DATA, *limits), "--output", tmp_path / "data"]
    made = run_module("stages.stage1_prepare_data", *arguments, env=offline)
    assert made.returncode == 0, made.stderr
    assert len((tmp_path / "data" / "prompts.jsonl").read_text().splitlines()) == 4

    hub.downloads.clear()
    again = prefetch(hub, home, *DATA)
    assert again.returncode == 0 and hub.downloads == [], "what is there is not downloaded again"


@pytest.mark.parametrize(
    "overrides, environment, message",
    [
        (["model.path=me/other"], {}, "me/other: no such model on http"),
        (["model.path=/data/mine"], {}, "model.path /data/mine: not there, and no name of the hub: say which"),
        (
            [],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "Qwen/Qwen2.5-VL-3B-Instruct: http://127.0.0.1:9 does not give it \\(.*\\): is there a network here",
        ),
        ([], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it here"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line(hub, tmp_path, overrides, environment, message):
    done = prefetch(hub, tmp_path, *overrides, **environment)
    assert done.returncode == 2 and re.fullmatch(f"error: {message}.*\n", done.stderr), done.stderr

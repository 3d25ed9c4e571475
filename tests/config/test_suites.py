"""configs/benchmarks: the published suite has the published protocol and the nine sets, every key spelled out."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_papo.config import BenchmarkConfig
from megatron_papo.config_files import load_config, resolve_config
from megatron_papo.errors import UserError
from tests.helpers import ROOT

CONFIGS = ROOT / "configs"
PAPO = CONFIGS / "benchmarks" / "papo.yaml"
PROTOCOL = {
    "samples_per_prompt": 8,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "max_response_tokens": 2048,
    "min_pixels": 1024,
    "max_pixels": 589824,
    "resize": "published",
}
"""PAPO-Eval b57d909: its scripts, and the defaults that they leave."""
OF_EACH_SET = {
    "source": "PAPO-Galaxy/PAPO_eval",
    "count": None,
    "form": "messages",
    "prompt_template": "{problem}",
    "strip_problem": False,
    "system_prompt": "You are a helpful assistant.",
    "min_pixels": None,
    "max_pixels": None,
    "resize": None,
    "grading": "mathruler",
}
SETS = {
    # split, archive without _images.zip, group, rule of problems, rows
    "geometry3k": ("hiyouga_geometry3k", "hiyouga_geometry3k", "general", "row", 601),
    "mathvista": ("AI4Math_MathVista", "AI4Math_MathVista", "general", "row", 1000),
    "we_math": ("We_Math", "We-Math_We-Math", "general", "row", 1740),
    "mmk12": ("PAPO_MMK12", "PAPO_MMK12_test", "general", "row", 2000),
    "mathverse": ("AI4Math_MathVerse", "AI4Math_MathVerse", "general", "block:5", 2180),
    "logicvista": ("lscpku_LogicVista", "lscpku_LogicVista", "vision", "row", 447),
    "clevr_count": ("BUAADreamer_clevr_count_70k", "BUAADreamer_clevr_count_70k", "vision", "row", 200),
    "mmmu_pro": ("MMMU_MMMU_Pro", "MMMU_MMMU_Pro", "vision", "row", 1730),
    "mathverse_v": (
        "AI4Math_MathVerse_vision_dependent", "AI4Math_MathVerse_vision_dependent", "vision", "block:3", 1308,
    ),
}  # fmt: skip
NOT_OF_MESSAGES = {"problem_key", "answer_key", "images_key", "target_key", "saliency_key"}
"""Names of columns, which only the form `columns` has."""


def differences(path: Path) -> dict[str, object]:
    """{dotted key: value} of what is not as published."""
    evaluation = resolve_config(path, ["model.path=m"], below=CONFIGS / "published.yaml").config.evaluation
    found = {key: getattr(evaluation, key) for key, value in PROTOCOL.items() if getattr(evaluation, key) != value}
    assert list(evaluation.benchmarks) == list(SETS)
    for name, (split, archive, group, rule, _) in SETS.items():
        problems_of = "mathverse" if name == "mathverse_v" else None
        expected = OF_EACH_SET | {"split": split, "image_archive": f"{archive}_images.zip", "groups": [group]}
        expected |= {"problem_by": rule, "problems_of": problems_of}
        entry = evaluation.benchmarks[name]
        found |= {f"{name}.{key}": getattr(entry, key) for key in expected if getattr(entry, key) != expected[key]}
    return found


def test_the_suite_is_the_published_one():
    assert differences(PAPO) == {}


def test_rows_and_problems():
    """Together as many as the authors evaluate; both of MathVerse's sets show 436 problems."""
    assert sum(row[4] for row in SETS.values()) == 11206
    assert SETS["mathverse"][4] / 5 == SETS["mathverse_v"][4] / 3 == 436
    text = PAPO.read_text()
    for name, row in SETS.items():
        assert any(line.split() == [f"{name}:", "#", str(row[4]), "rows"] for line in text.splitlines())


@pytest.mark.parametrize(
    "old, new, key",
    [
        ("top_k: 50", "top_k: -1", "top_k"),
        ("max_pixels: 589824", "max_pixels: 1003520", "max_pixels"),
        ("split: We_Math,", "split: We-Math,", "we_math.split"),
        ('problem_by: "block:3"', 'problem_by: "block:5"', "mathverse_v.problem_by"),
        ("problems_of: mathverse,", "problems_of: null,", "mathverse_v.problems_of"),
    ],
)
def test_a_changed_number_is_noticed(tmp_path, old, new, key):
    text = PAPO.read_text()
    assert text.count(old) == 1
    (tmp_path / "papo.yaml").write_text(text.replace(old, new))
    assert list(differences(tmp_path / "papo.yaml")) == [key]


def test_every_key_of_a_set_is_spelled_out():
    said = yaml.safe_load(PAPO.read_text())["evaluation"]
    assert PROTOCOL.keys() <= said.keys()
    for entry in said["benchmarks"].values():
        assert BenchmarkConfig.model_fields.keys() - NOT_OF_MESSAGES == entry.keys()


def test_a_preset_takes_the_suite_as_a_part(tmp_path):
    shutil.copytree(CONFIGS, tmp_path / "configs")
    mine = tmp_path / "configs" / "mine.yaml"
    mine.write_text(
        "extends: [published.yaml, 3b_8x80gb.yaml, benchmarks/papo.yaml]\n"
        "evaluation: {source: /data/papo, benchmarks: {mmk12: {count: 100}}}\n"
    )
    config = load_config(mine, ["data.evaluation=null", "evaluation.validation=mmk12"])
    assert list(config.evaluation_sets) == list(SETS)
    assert {entry.source for entry in config.evaluation_sets.values()} == {"/data/papo"}
    assert config.evaluation_sets["mmk12"].count == 100 and config.evaluation_sets["mathvista"].count is None
    mine.write_text(mine.read_text().replace("mmk12:", "mmk_12:"))
    with pytest.raises(UserError, match="evaluation.benchmarks.mmk_12.source"):
        load_config(mine)


def test_the_suite_of_the_pages_samples_and_shows_pictures_alike():
    papo, pages = (
        yaml.safe_load((CONFIGS / "benchmarks" / f"{name}.yaml").read_text()) for name in ("papo", "hub_pages")
    )
    assert {key: pages["evaluation"][key] for key in PROTOCOL} == PROTOCOL
    config = resolve_config(
        CONFIGS / "benchmarks" / "hub_pages.yaml", ["model.path=m"], below=CONFIGS / "published.yaml"
    )
    for name, entry in config.config.evaluation.benchmarks.items():
        assert entry.form == name and entry.groups == papo["evaluation"]["benchmarks"][name]["groups"]


def test_every_suite_is_here():
    assert sorted(path.name for path in (CONFIGS / "benchmarks").iterdir()) == ["hub_pages.yaml", "papo.yaml"]


def test_the_files_that_the_page_shows_are_configurations(tmp_path):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    shown = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    shutil.copytree(CONFIGS, tmp_path / "configs")
    sets = []
    for number, text in enumerate(shown):
        (tmp_path / "configs" / f"{number}.yaml").write_text(text)
        sets.append(list(load_config(tmp_path / "configs" / f"{number}.yaml").evaluation_sets))
    assert sets == [list(SETS), [*SETS, "my_set"]]


def test_a_local_copy_takes_the_place_of_hub_names_alone():
    """A set of one's own, named as a file, stays where it is."""
    own = {"own": "/data/own/test.jsonl", "relative": "own.parquet", "folder": "./own"}
    sets = [f"evaluation.benchmarks.{name}.source={source}" for name, source in own.items()]
    hub = "evaluation.benchmarks.hub.source=OWNER/NAME"
    config = load_config(CONFIGS / "demo.yaml", [*sets, hub, "evaluation.source=/copy"])
    found = {name: entry.source for name, entry in config.evaluation_sets.items()}
    assert found == own | {"hub": "/copy", "evaluation": "synthetic"}

"""The miniature has the release's names and quirks, and stage 1 makes prompts of it that the demo's model can read."""

import re
import zipfile

import pytest
import yaml
from pyarrow import parquet

from megatron_papo.config import DataConfig, SyntheticTaskConfig
from megatron_papo.config_files import load_config, resolve_config
from megatron_papo.data.chat import ChatFormat, RenderSettings
from megatron_papo.data.prompts import PromptMaker
from megatron_papo.data.rows import read_rows
from megatron_papo.pictures.preprocess import PictureSettings
from megatron_papo.pictures.store import ImageStore
from megatron_papo.synthetic.miniature import SETS, VISION_VERSIONS, write_miniature
from megatron_papo.synthetic.tiny_tokenizer import make_tiny_tokenizer
from tests.helpers import DEMO_CONFIG, ROOT
from tools.miniature_suite import suite_of

PAPO = ROOT / "configs" / "benchmarks" / "papo.yaml"


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    directory = tmp_path_factory.mktemp("miniature")
    write_miniature(directory, SyntheticTaskConfig(), seed=1, problems=2)
    return directory


def test_files_are_called_as_the_suite_says(miniature):
    sets = resolve_config(
        PAPO, ["model.path=m"], below=ROOT / "configs" / "published.yaml"
    ).config.evaluation.benchmarks
    tables = {f"data/{entry.split}-00000-of-00001.parquet" for entry in sets.values()}
    names = {path.relative_to(miniature).as_posix() for path in miniature.rglob("*") if path.is_file()}
    assert names == tables | {entry.image_archive for entry in sets.values()}
    assert [entry.name for entry in SETS] == list(sets)


def rows_of(directory, split):
    return parquet.read_table(directory / "data" / f"{split}-00000-of-00001.parquet").to_pylist()


def test_the_suite_file_says_what_is_there(tmp_path):
    """Rows by its own counts; control: the published suite, whose counts are others."""
    counts = {entry.name: 7 + number for number, entry in enumerate(SETS)}
    text = suite_of(tmp_path, counts)
    assert [int(number) for number in re.findall(r"# (\d+) rows", text)] == [*counts.values()]
    assert "in miniature" in text.splitlines()[0] and "evaluated as by its authors" not in text
    assert yaml.safe_load(text)["evaluation"]["source"] == str(tmp_path)
    assert re.findall(r"# (\d+) rows", PAPO.read_text())[0] == "601"


def test_quirks(miniature):
    [first, *_] = rows_of(miniature, "We_Math")
    assert first["images"] == ["./data/images/We-Math_We-Math/0.png"] and first["id"] == "0"
    assert zipfile.ZipFile(miniature / "We-Math_We-Math_images.zip").namelist()[0] == "images/We-Math_We-Math/0.png"
    assert first["messages"][0]["content"].startswith("<image>")
    five, three = (rows_of(miniature, f"AI4Math_MathVerse{end}") for end in ("", "_vision_dependent"))
    assert (len(five), len(three)) == (10, 6)
    assert [row["messages"] for row in five[2:5] + five[7:]] == [row["messages"] for row in three]
    assert len({row["messages"][0]["content"] for row in five}) == 5 and len(VISION_VERSIONS) == 3


def test_the_same_seed_gives_the_same_bytes(miniature, tmp_path):
    for seed, name in ((1, "again"), (2, "other")):
        (tmp_path / name).mkdir()
        write_miniature(tmp_path / name, SyntheticTaskConfig(), seed, problems=2)
    files = [path.relative_to(miniature) for path in miniature.rglob("*") if path.is_file()]

    def alike(name):
        return [(tmp_path / name / file).read_bytes() == (miniature / file).read_bytes() for file in files]

    assert all(alike("again")) and not any(alike("other")[1:3])


def prompts_of(directory, tmp_path, instruction=None):
    """{set: its prompts}, as stage 1 makes them with the demo's configuration and the suite."""
    make_tiny_tokenizer(tmp_path, vocab_size=448)
    (tmp_path / "out").mkdir()
    made = {}
    suite = resolve_config(PAPO, [f"evaluation.source={directory}"], below=DEMO_CONFIG).config
    for name in suite.evaluation.benchmarks:
        source, data = suite.evaluation_sets[name], suite.data
        (tmp_path / "out" / name).mkdir()
        maker = PromptMaker(
            data,
            ChatFormat(tmp_path, RenderSettings.of_set(data, source)),
            ImageStore(tmp_path / "out" / name),
            PictureSettings.of_evaluation(data, suite.evaluation, source),
            problems_of=source.problems_of or name,
        )
        made[name] = list(maker.prompts(read_rows(source, data, with_target=False)))
        assert maker.report.bad == []
        assert maker.report.overlong == (maker.report.rows if instruction else 0)
    return made


def test_stage_1_takes_all_of_it_within_the_demos_limits(miniature, tmp_path):
    made = prompts_of(miniature, tmp_path)
    assert {name: len(prompts) for name, prompts in made.items()} == {
        entry.name: 2 * len(entry.versions) for entry in SETS
    }
    assert [prompt.problem_id for prompt in made["mathverse"]] == ["mathverse/1"] * 5 + ["mathverse/2"] * 5
    assert [prompt.problem_id for prompt in made["mathverse_v"]] == ["mathverse/1"] * 3 + ["mathverse/2"] * 3
    assert made["mathverse"][0].answer == made["mathverse_v"][0].answer
    assert len({prompt.problem_id for prompt in made["mmk12"]}) == 2
    assert max(prompt.num_tokens for prompts in made.values() for prompt in prompts) <= 64


def test_with_the_whole_instruction_prompts_are_longer_than_the_demo_takes(tmp_path):
    """The control of the limit above, and the reason why the miniature has only the first words."""
    (tmp_path / "mini").mkdir()
    whole = DataConfig.model_fields["prompt_template"].default.removeprefix("{problem}").format()
    write_miniature(tmp_path / "mini", SyntheticTaskConfig(), 1, 1, whole + " " + whole)
    assert load_config(DEMO_CONFIG).data.max_prompt_tokens == 64
    prompts_of(tmp_path / "mini", tmp_path, instruction=whole)

"""A data set is told apart by what it contains, not by where it lies, and costs no second reading of its pictures."""

import io
import json
import shutil

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from megatron_papo.config import DataConfig, PromptSource
from megatron_papo.data.chat import ChatFormat, RenderSettings
from megatron_papo.data.fingerprint import SourceHash, source_fingerprint
from megatron_papo.data.prompts import PromptMaker
from megatron_papo.data.rows import read_rows
from megatron_papo.errors import UserError
from megatron_papo.pictures.preprocess import PictureSettings
from megatron_papo.pictures.store import ImageStore
from megatron_papo.synthetic.tiny_tokenizer import make_tiny_tokenizer

NAMES = ("red.png", "deep/blue.png", "map.png")


def png(seed: int, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    shape = (56, 84, 3) if mode == "RGB" else (56, 84)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


ROWS = [
    {"problem": "Same?", "answer": "no", "images": ["red.png", "deep/blue.png"], "saliency": ["map.png", "map.png"]},
    {"problem": "No picture", "answer": "1"},
    {"problem": "Again", "answer": "2", "images": "red.png"},
    {"problem": "Last", "answer": "3", "images": [], "saliency": None},
]


@pytest.fixture
def data_set(tmp_path):
    directory = tmp_path / "set"
    (directory / "deep").mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        (directory / name).write_bytes(png(seed, "L" if name == "map.png" else "RGB"))
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(directory, vocab_size=448)
    return directory


def config(**changes) -> DataConfig:
    source = PromptSource(source="synthetic")
    limits = dict(min_pixels=3136, max_pixels=1003520, max_prompt_tokens=512)
    return DataConfig(train=source, sft=None, evaluation=source, **limits, **changes)


def fingerprint(directory, **changes) -> str:
    return source_fingerprint(PromptSource(source=str(directory)), config(**changes))


def test_a_moved_set_is_the_same(data_set, tmp_path):
    before = fingerprint(data_set)
    moved = data_set.rename(tmp_path / "elsewhere")
    assert fingerprint(moved) == before
    copied = shutil.copytree(moved, tmp_path / "deep" / "copy", copy_function=shutil.copyfile)  # other time stamps
    assert fingerprint(copied) == before
    assert fingerprint(copied / "rows.jsonl") == before
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("deep", "red.png", "map.png"):
        (copied / name).rename(pictures / name)
    assert fingerprint(copied, image_root=str(pictures)) == before


def test_files_that_no_row_names_do_not_count(data_set):
    before = fingerprint(data_set)
    (data_set / "README.md").write_text("about it")
    (data_set / "other.png").write_bytes(png(9))
    (data_set / ".git").mkdir()
    assert fingerprint(data_set) == before


@pytest.mark.parametrize("name", [*NAMES, "rows.jsonl"])
def test_a_changed_byte_is_another_set(data_set, name):
    before = fingerprint(data_set)
    content = (data_set / name).read_bytes()
    changed = content.replace(b"Same?", b"same?") if name == "rows.jsonl" else content[:-20] + b"x" + content[-19:]
    assert changed != content and len(changed) == len(content)
    (data_set / name).write_bytes(changed)
    assert fingerprint(data_set) != before
    (data_set / name).write_bytes(content)
    assert fingerprint(data_set) == before


def test_two_pictures_exchanged_is_another_set(data_set):
    """The same contents under other names."""
    before = fingerprint(data_set)
    first, second = ((data_set / name).read_bytes() for name in NAMES[:2])
    (data_set / NAMES[0]).write_bytes(second)
    (data_set / NAMES[1]).write_bytes(first)
    assert fingerprint(data_set) != before


def test_another_file_of_rows_or_another_name_is_another_set(data_set):
    """Rows without an id are named by their file."""
    seen = {fingerprint(data_set)}
    (data_set / "rows.jsonl").rename(data_set / "renamed.jsonl")
    seen.add(fingerprint(data_set))
    (data_set / "more.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    seen.add(fingerprint(data_set))
    assert len(seen) == 3


def test_columns_and_count_decide_which_pictures_count(data_set):
    before = fingerprint(data_set)
    (data_set / "map.png").write_bytes(png(9, "L"))
    without_maps = fingerprint(data_set, saliency_key="other")
    (data_set / "map.png").write_bytes(png(2, "L"))
    assert fingerprint(data_set, saliency_key="other") == without_maps and fingerprint(data_set) == before
    rows = [ROWS[1], *ROWS]
    (data_set / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = PromptSource(source=str(data_set), count=1)
    before = source_fingerprint(first, config())
    (data_set / "red.png").unlink()  # a later row's
    assert source_fingerprint(first, config()) == before
    assert fingerprint(data_set) not in (before, fingerprint(data_set, saliency_key="other"))  # it is another set


def test_pictures_inside_parquet_count_with_the_file(tmp_path):
    def write(name: str, seed: int):
        table = [{"problem": "?", "answer": "1", "images": [{"bytes": png(seed), "path": "not/there.png"}]}]
        parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / name / "rows.parquet")

    for name, seed in (("first", 1), ("same", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        write(name, seed)
    assert fingerprint(tmp_path / "first") == fingerprint(tmp_path / "same") != fingerprint(tmp_path / "other")


def test_paths_inside_parquet(data_set):
    (data_set / "rows.jsonl").unlink()
    parquet.write_table(
        pyarrow.Table.from_pylist([{"problem": "?", "answer": "1", "images": ["red.png"]}]), data_set / "rows.parquet"
    )
    before = fingerprint(data_set)
    (data_set / "red.png").write_bytes(png(9))
    assert fingerprint(data_set) != before


@pytest.mark.parametrize("max_prompt_tokens", [512, 20])
def test_stage_1_adds_it_up_while_it_reads(data_set, tmp_path, tokenizer, max_prompt_tokens):
    """Also where rows are left out for their length, or cannot be used."""
    bad = [{"problem": "?", "answer": "1", "images": ["none.png", "red.png"]}, {"problem": "?"}]
    with open(data_set / "rows.jsonl", "a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in bad)
    source = PromptSource(source=str(data_set))
    settings = config().model_copy(update={"max_prompt_tokens": max_prompt_tokens})
    total = SourceHash(source)
    (tmp_path / "out").mkdir()
    chat = ChatFormat(tokenizer, RenderSettings("{problem}"))
    maker = PromptMaker(settings, chat, ImageStore(tmp_path / "out"), PictureSettings.of(settings), source_hash=total)
    assert len(list(maker.prompts(read_rows(source, settings, False)))) == (4 if max_prompt_tokens == 512 else 3)
    assert len(maker.report.bad) == 2 and total.hexdigest() == fingerprint(data_set)
    assert SourceHash(source).hexdigest() != total.hexdigest()  # control: pictures do count


def test_a_data_set_of_the_hub(monkeypatch):
    """By name, split, and the library's own fingerprint; the library's download is replaced."""
    import datasets

    tables = {}

    def load_dataset(name, split):
        if (name, split) not in tables:
            raise FileNotFoundError(name)
        return tables[name, split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tables["somebody/set", "train"] = datasets.Dataset.from_dict({"problem": ["?"]}, split="train")
    tables["somebody/set", "test"] = tables["somebody/set", "train"]
    values = [
        source_fingerprint(PromptSource(source="somebody/set", split=split), config()) for split in ("train", "test")
    ]
    assert values[0] != values[1]
    assert source_fingerprint(PromptSource(source="somebody/set"), config()) == values[0]
    tables["somebody/set", "train"] = datasets.Dataset.from_dict({"problem": ["!"]})
    assert source_fingerprint(PromptSource(source="somebody/set"), config()) != values[0]
    with pytest.raises(UserError, match="somebody/none: no such file, and the Hugging Face data set"):
        source_fingerprint(PromptSource(source="somebody/none"), config())

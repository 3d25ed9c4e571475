"""What a source is read as: nothing of it is left out in silence, nothing is read that could mean two things."""

import gzip
import json
import os
from decimal import Decimal

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from megatron_papo.config import DataConfig, PromptSource
from megatron_papo.data.rows import BadRow, read_rows
from megatron_papo.data.sources import data_files
from megatron_papo.errors import UserError

LINE = b'{"problem": "caf\xc3\xa9?", "answer": "1"}\n'


def read(path, **keys):
    source = PromptSource(source=str(path))
    limits = dict(min_pixels=3136, max_pixels=1003520, max_prompt_tokens=512)
    config = DataConfig(train=source, sft=None, evaluation=source, **limits, **keys)
    return list(read_rows(source, config, with_target=False))


NUMBERS = {
    "float16": ([0.1, 2.0, 2048.0], pyarrow.float16(), ["0.1", "2.0", "2048.0"]),
    "float32": ([0.1, -1e-7, 16777216.0, 1e10], pyarrow.float32(), ["0.1", "-1e-07", "16777216.0", "10000000000.0"]),
    "float64": ([0.1, 0.10000000149011612, 3.0], pyarrow.float64(), ["0.1", "0.10000000149011612", "3.0"]),
    "int64": ([3], pyarrow.int64(), ["3"]),
    "decimal": ([Decimal("0.10"), Decimal("-12.00")], pyarrow.decimal128(30, 2), ["0.10", "-12.00"]),
}


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize("way", ["parquet", "datasets"])
def test_numbers_have_the_digits_of_their_type(case, way, tmp_path, monkeypatch):
    values, kind, expected = NUMBERS[case]
    values = [np.float16(value) for value in values] if case == "float16" else values
    table = pyarrow.table({"problem": ["?"] * len(values), "answer": pyarrow.array(values, kind)})
    source = tmp_path / "set.parquet"
    if way == "parquet":
        parquet.write_table(table, source)
    else:
        import datasets

        monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset(table))
        source = "somebody/set"
    assert [row.answer for row in read(source)] == expected


def test_a_number_that_is_missing_or_none(tmp_path):
    answers = pyarrow.array([None, float("nan"), float("inf")], pyarrow.float32())
    parquet.write_table(pyarrow.table({"problem": ["?"] * 3, "answer": answers}), tmp_path / "set.parquet")
    rows = read(tmp_path / "set.parquet")
    assert [row.problem.split(",")[0] for row in rows] == ["answer is None", "answer is nan", "answer is inf"]


def test_links_are_followed(tmp_path):
    """Those to folders too; a folder without data files may have two names."""
    folder, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    for name in ("a.jsonl", "deep/b.jsonl"):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_bytes(LINE)
    (tmp_path / "pictures").mkdir()
    folder.mkdir()
    for name, target in {
        "linked": "elsewhere",
        "images": "pictures",
        "same": "pictures",
        "c.jsonl": "elsewhere/a.jsonl",
    }.items():
        (folder / name).symlink_to(tmp_path / target)
    (folder / "old.png").symlink_to("nothing")
    found = [str(file.relative_to(folder)) for file in data_files(PromptSource(source=str(folder)))]
    assert found == ["c.jsonl", "linked/a.jsonl", "linked/deep/b.jsonl"]


LINKS = {
    "a data file that is not there": ("b.jsonl", "nothing.jsonl", "b.jsonl: a link to nothing: copy the data again"),
    "a folder that is not there": ("deep/more", "/nothing/at/all", "deep/more: a link to nothing"),
    "the folder itself": ("deep/self", "..", "deep/self: its data files are read under another name too"),
    "another folder": ("second", "deep", "second: its data files are read under another name too"),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_that_leave_rows_out_or_double_them(case, tmp_path):
    name, target, message = LINKS[case]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl").write_bytes(LINE)
    assert len(data_files(PromptSource(source=str(tmp_path)))) == 1  # control
    (tmp_path / name).symlink_to(target)
    with pytest.raises(UserError) as error:
        data_files(PromptSource(source=str(tmp_path)))
    assert str(error.value).startswith(f"{tmp_path}/{message}")


def test_what_is_no_file_or_closed(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(LINE)
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patched, pytest.raises(UserError, match="closed: cannot be read .Permission denied"):
        patched.setattr(os, "scandir", refuse)
        data_files(PromptSource(source=str(tmp_path)))
    os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="b.jsonl: not a file"):
        data_files(PromptSource(source=str(tmp_path)))


SPLITS = {
    "val_from_train.jsonl": "val_from_train tells two splits, train and validation: rename it",
    "train_test.parquet": "train_test tells two splits, train and test: rename it",
    "dev-test/rows.jsonl": "dev-test tells two splits, validation and test: rename it",
    "unit-test-questions.jsonl": "only of test (as unit-test-questions.jsonl is called): set split to one of them, or",
}


@pytest.mark.parametrize("name", SPLITS)
def test_names_that_tell_no_training_data(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(LINE)
    with pytest.raises(UserError) as error:
        data_files(PromptSource(source=str(tmp_path)))
    assert SPLITS[name] in str(error.value) and name in str(error.value)
    assert data_files(PromptSource(source=str(file))) == [file]  # by its own name it is meant
    file.rename(file.with_name("latest_trainer" + file.suffix))  # control: parts of words tell nothing
    if file.parent == tmp_path:
        assert len(data_files(PromptSource(source=str(tmp_path)))) == 1


def test_names_that_are_there_twice(tmp_path):
    columns = [pyarrow.array([text]) for text in ("?", "1", "2")]
    table = pyarrow.Table.from_arrays(columns, names=["problem", "answer", "answer"])
    parquet.write_table(table, tmp_path / "set.parquet")
    with pytest.raises(UserError, match="set.parquet: two columns are called answer: rename or drop one"):
        read(tmp_path / "set.parquet")
    twice = (
        b'{"problem": "?", "answer": "1", "answer": "2"}\n',
        b'{"problem": "?", "answer": "1", "m": {"a": 1, "a": 2}}',
    )
    (tmp_path / "set.jsonl").write_bytes(LINE + b"".join(twice))
    good, *bad = read(tmp_path / "set.jsonl")
    assert good.answer == "1" and [row.place for row in bad] == [f"{tmp_path}/set.jsonl:{n}" for n in (2, 3)]
    assert [row.problem for row in bad] == [f"{key} is there twice: correct or drop the row" for key in ("answer", "a")]


FILES = {
    "gzip": (gzip.compress(LINE * 9), "packed by gzip"),
    "parquet": (b"PAR1" + LINE, "a parquet file, not of JSON objects: rename it to .parquet"),
    "zip": (b"PK\x03\x04" + LINE, "a zip archive"),
    "UTF-16": ((LINE * 9).decode().encode("utf-16"), "text of UTF-16"),
    "UTF-16 without a mark": ((LINE * 9).decode().encode("utf-16-le"), "not text of UTF-8"),
    "Latin-1": ((LINE * 9).decode().encode("latin-1"), "not text of UTF-8: convert it"),
    "anything": (bytes(range(128, 256)) * 999, "not text of UTF-8"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_text_is_one_line(case, tmp_path):
    content, message = FILES[case]
    (tmp_path / "set.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / "set.jsonl")
    assert str(error.value).startswith(f"{tmp_path}/set.jsonl: {message}")


def test_a_bad_line_is_not_a_bad_file(tmp_path):
    """At the start or later, with a mark, and where what is looked at ends inside a letter."""
    long = b'{"problem": "%s?", "answer": "1"}\n' % ("\u00e9".encode() * 40_000)
    bad = LINE.decode().encode("latin-1")
    (tmp_path / "set.jsonl").write_bytes(bad + LINE + bad)
    assert [isinstance(row, BadRow) for row in read(tmp_path / "set.jsonl")] == [True, False, True]
    for shift in (b"", b" ", b"\xef\xbb\xbf"):
        (tmp_path / "set.jsonl").write_bytes(shift + long)
        assert [isinstance(row, BadRow) for row in read(tmp_path / "set.jsonl")] == [False]


@pytest.mark.parametrize("key", ["answer_key", "images_key", "saliency_key"])
def test_columns_inside_columns(key, tmp_path):
    row = {"problem": "?", "answer": "1", "reward_model": {"ground_truth": "2"}}
    (tmp_path / "set.jsonl").write_text(json.dumps(row))
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "set.parquet")
    for name in ("set.jsonl", "set.parquet"):
        (bad,) = read(tmp_path / name, **{key: "reward_model.ground_truth"})
        assert bad.problem == (
            "no column reward_model.ground_truth: columns inside columns are not read: make ground_truth of"
            " reward_model a column of its own"
        )
    (tmp_path / "set.jsonl").write_text(json.dumps(row | {"a.b": "3", "a": 4}))
    assert read(tmp_path / "set.jsonl", answer_key="a.b")[0].answer == "3"

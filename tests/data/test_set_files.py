"""A set's files are found under the names that their publishers gave them, and what is not there is one line."""

import json
import shutil
import zipfile

import pytest

from megatron_papo.config import BenchmarkConfig, DataConfig, PromptSource
from megatron_papo.data.fingerprint import SourceHash, source_fingerprint
from megatron_papo.data.rows import read_rows
from megatron_papo.data.set_files import files_of, set_files, tables_of
from megatron_papo.errors import UserError
from megatron_papo.pictures.store import read_named

VERSE = {
    "split": "AI4Math_MathVerse_vision_dependent",
    "image_archive": "AI4Math_MathVerse_vision_dependent_images.zip",
}
WE_MATH = {"split": "We_Math", "image_archive": "We-Math_We-Math_images.zip"}


def of(source="x", **keys) -> BenchmarkConfig:
    return BenchmarkConfig(source=str(source), **({"form": "messages", "split": "S"} | keys))


FOUND = {
    "as released": (VERSE, ["data/AI4Math_MathVerse_vision_dependent-00000-of-00001.parquet"], None),
    "by its list of files": (VERSE, ["AI4Math_MathVerse-vision-dependent.json"], None),
    "by its downloader": (VERSE, ["AI4Math_MathVerse_vision_dependent.json"], None),
    "called like its archive": (WE_MATH, ["We-Math_We-Math.json"], None),
    "parquet before JSON": (WE_MATH, ["data/We_Math-00000-of-00001.parquet", "We_Math.json"], 1),
    "several shards": ({}, ["data/S-00000-of-00002.parquet", "data/S-00001-of-00002.parquet"], None),
    "with a hash": ({"split": "testmini"}, ["data/testmini-00000-of-00001-725687bf7a18d64b.parquet"], None),
    "no other that begins so": ({"split": "testmini"}, ["testmini.parquet", "testmini_text_only.parquet"], 1),
    "in one of several folders": ({"split": "vision/test"}, ["vision/test-00000-of-00001.parquet",
                                                            "standard (10 options)/test-00000-of-00001.parquet"], 1),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_tables(case):
    keys, names, taken = FOUND[case]
    others = ["README.md", "dataset_info.json", "data/other-00000-of-00001.parquet", "AI4Math_MathVerse.json"]
    assert tables_of([*names, *others], of(**keys), "place") == (names[:taken], [])
    assert tables_of(others, of(**keys), "place")[0] == []  # control


MISSING = {
    "no split": ({}, ["T.json"], "place: no table of split S (S-00000-of-00001.parquet or S.json): download it"),
    "a shard": ({}, ["S-00000-of-00002.parquet"], "1 files like S-00000-of-00002.parquet where 2 belong together"),
    "shards of two downloads": ({}, ["S-00000-of-00001.parquet", "S-00000-of-00002.parquet",
                                     "S-00001-of-00002.parquet"], "3 files like S-00000-of-00001.parquet where 1"),
    "two folders": ({}, ["a/S.parquet", "b/S.parquet"], "split S is there as a/S and b/S: set split to FOLDER/S"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_or_could_be_two_things(case):
    keys, names, expected = MISSING[case]
    found, [line] = tables_of(names, of(**keys), "place")
    assert found == [] and expected in line


@pytest.fixture
def release(tmp_path):
    """A set of two rows with an archive, as the authors' release has it."""
    directory = tmp_path / "release"
    directory.mkdir()
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": str(number)}],
            "images": [f"./data/images/s/{number}.png"],
        }
        for number in range(2)
    ]
    (directory / "S.json").write_text(json.dumps(rows))
    with zipfile.ZipFile(directory / "S-S_images.zip", "w") as archive:
        for number in range(2):
            archive.writestr(f"images/s/{number}.png", f"picture {number}")
    return directory


def config() -> DataConfig:
    source = PromptSource(source="synthetic")
    return DataConfig(train=source, sft=None, min_pixels=3136, max_pixels=1003520, max_prompt_tokens=512)


def pictures(source) -> list[bytes]:
    rows = list(read_rows(source, config(), with_target=False))
    return [read_named(row.images[0], row.image_root) for row in rows]


WANTED = [b"picture 0", b"picture 1"]


@pytest.mark.parametrize("name", ["S-S_images.zip", "S_S_images.zip"])
def test_pictures_are_read_from_the_archive(release, name):
    assert pictures(of(release, image_archive=name)) == WANTED
    assert pictures(of(release / "S.json", image_archive=name)) == WANTED


@pytest.mark.parametrize("folder", [".", "data"])
def test_an_unpacked_archive_will_do(release, folder):
    with zipfile.ZipFile(release / "S-S_images.zip") as archive:
        archive.extractall(release / folder)
    (release / "S-S_images.zip").unlink()
    assert pictures(of(release, image_archive="S-S_images.zip")) == WANTED


def test_columns_may_have_an_archive_too(tmp_path, release):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test.jsonl").write_text('{"problem": "?", "answer": "1", "images": "images/s/1.png"}\n')
    shutil.copy(release / "S-S_images.zip", tmp_path / "mine" / "p.zip")
    assert pictures(of(tmp_path / "mine", form="columns", split="test", image_archive="p.zip")) == WANTED[1:]


def test_all_that_is_missing_is_said_at_once(release):
    (release / "S-S_images.zip").unlink()
    (release / "S.json").unlink()
    with pytest.raises(UserError) as error:
        files_of(of(release, image_archive="S-S_images.zip"))
    assert [line.split(":")[1] for line in error.value.lines] == [
        " no table of split S (S-00000-of-00001.parquet or S.json)",
        " no archive S-S_images.zip, and no folder images/ that it unpacks to",
    ]
    with pytest.raises(UserError, match="no such file or directory: correct the source"):
        files_of(of(release / "gone" / "deep"))


def test_a_picture_that_leads_out_of_an_unpacked_archive(release, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    (release / "S-S_images.zip").unlink()
    (release / "images").mkdir()
    (release / "images" / "x.png").symlink_to(tmp_path / "secret.png")
    rows = json.loads((release / "S.json").read_text())
    for name in ("./data/../secret.png", "./data/images/x.png", "../../secret.png"):
        rows[0]["images"] = [name]
        (release / "S.json").write_text(json.dumps(rows[:1]))
        with pytest.raises(UserError, match="outside the data root"):
            pictures(of(release, image_archive="S-S_images.zip"))


def test_the_fingerprint_covers_the_archive_but_not_where_it_lies(release, tmp_path):
    source = of(release, image_archive="S-S_images.zip")
    before = source_fingerprint(source, config())
    moved = shutil.copytree(release, tmp_path / "elsewhere")
    assert source_fingerprint(of(moved, image_archive="S-S_images.zip"), config()) == before
    unpacked = shutil.copytree(release, tmp_path / "unpacked")
    shutil.unpack_archive(unpacked / "S-S_images.zip", unpacked)
    (unpacked / "S-S_images.zip").unlink()
    assert source_fingerprint(of(unpacked, image_archive="S-S_images.zip"), config()) == before
    with zipfile.ZipFile(release / "S-S_images.zip", "w") as archive:
        archive.writestr("images/s/0.png", "picture 0")
        archive.writestr("images/s/1.png", "another")
    assert source_fingerprint(source, config()) != before
    assert SourceHash(source).hexdigest() != before  # control: pictures do count


def test_a_plain_source_is_found_as_before(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "?", "answer": "1"}\n')
    assert set_files(PromptSource(source=str(tmp_path))).tables == [tmp_path / "a.jsonl"]
    assert set_files(of(tmp_path, form="columns")).tables == [tmp_path / "a.jsonl"]

"""tools.suite on the miniature of the nine sets: what is there, what is missing, and what sets have in common."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_papo.config import SyntheticTaskConfig
from megatron_papo.errors import UserError
from megatron_papo.synthetic.miniature import write_miniature
from tests.helpers import DEMO_CONFIG, ROOT, run_module
from tests.hub import serving
from tools.suite import main

PAPO = str(ROOT / "configs" / "benchmarks" / "papo.yaml")
PROBLEMS = 3
RECORDS = {
    "geometry3k": 3, "mathvista": 3, "we_math": 3, "mmk12": 3, "mathverse": 15,
    "logicvista": 3, "clevr_count": 3, "mmmu_pro": 3, "mathverse_v": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("miniature")
    assert write_miniature(directory, SyntheticTaskConfig(), 1, PROBLEMS) == RECORDS
    return directory


@pytest.fixture
def copy(miniature, tmp_path) -> Path:
    return shutil.copytree(miniature, tmp_path / "copy")


@pytest.fixture
def suite(capsys):
    """Runs a command -> (exit status, its JSON or its lines)."""

    def command(*arguments, as_json=True):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments), *(["--json"] if as_json else [])])
        printed = capsys.readouterr().out
        return ended.value.code, json.loads(printed) if as_json else printed.splitlines()

    return command


@pytest.mark.parametrize("command", ["list", "check"])
def test_all_nine_sets_are_there(suite, miniature, command):
    status, found = suite(command, "--suite", PAPO, "--source", miniature)
    assert status == 0
    assert {name: entry["records"] for name, entry in found["sets"].items()} == RECORDS
    assert all(entry["pictures"] == RECORDS[name] for name, entry in found["sets"].items())
    assert all(entry["problems"] == PROBLEMS and entry["missing"] == [] for entry in found["sets"].values())


def test_a_person_reads_lines(suite, miniature):
    status, lines = suite("list", "--suite", PAPO, "--source", miniature, as_json=False)
    assert status == 0 and len(lines) == 9
    assert lines[4].startswith("mathverse (general): 15 records of 3 problems, 15 pictures, split AI4Math_MathVerse of")


def rewrite(copy: Path, split: str, change) -> None:
    """Change the rows of one set."""
    path = copy / "data" / f"{split}-00000-of-00001.parquet"
    rows = parquet.read_table(path).to_pylist()
    parquet.write_table(pyarrow.Table.from_pylist(change(rows)), path)


def without_a_picture(copy):
    rewrite(copy, "PAPO_MMK12", lambda rows: [rows[0] | {"images": ["./data/images/gone.png"]}, *rows[1:]])


def with_a_damaged_picture(copy):
    path = copy / "PAPO_MMK12_test_images.zip"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, content) in enumerate(members.items()):
            archive.writestr(name, content[:100] if number == 1 else content)


def with_another_answer(copy):
    """One version of a problem, in one set."""
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "99"}]
    rewrite(copy, "AI4Math_MathVerse", lambda rows: [*rows[:6], rows[6] | {"messages": turns}, *rows[7:]])


def in_another_order(copy):
    """Of the problems of MathVerse_V, whose answers differ."""
    rewrite(copy, "AI4Math_MathVerse_vision_dependent", lambda rows: rows[6:] + rows[:6])


CHANGES = {
    "a split": (
        lambda copy: (copy / "data" / "PAPO_MMK12-00000-of-00001.parquet").unlink(),
        "mmk12", "list", 0, "no table of split PAPO_MMK12",
    ),
    "an archive": (
        lambda copy: (copy / "PAPO_MMK12_test_images.zip").unlink(),
        "mmk12", "list", 0, "no archive PAPO_MMK12_test_images.zip, and no folder images/",
    ),
    "a damaged archive": (
        lambda copy: (copy / "PAPO_MMK12_test_images.zip").write_bytes(b"PK\x03\x04 cut off"),
        "mmk12", "list", 3, "PAPO_MMK12_test_images.zip: damaged (BadZipFile",
    ),
    "a damaged table": (
        lambda copy: (copy / "data" / "PAPO_MMK12-00000-of-00001.parquet").write_bytes(b"PAR1"),
        "mmk12", "list", 0, "cannot be read as parquet",
    ),
    "all rows": (
        lambda copy: rewrite(copy, "PAPO_MMK12", lambda rows: []),
        "mmk12", "list", 0, "no row in it",
    ),
    "a picture": (without_a_picture, "mmk12", "list", 3, "image images/gone.png: not in this archive"),
    "a whole picture": (with_a_damaged_picture, "mmk12", "check", 3, "images/PAPO_MMK12_test/1.png"),
    "an answer": (with_another_answer, "mathverse", "list", 10, "block 2 of 5 rows, to be versions of one problem"),
    "the same order": (in_another_order, "mathverse_v", "list", 9, "that of the same problem in mathverse"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_missing(suite, copy, case):
    change, name, command, records, expected = CHANGES[case]
    change(copy)
    status, found = suite(command, "--suite", PAPO, "--source", copy)
    assert status == 1
    assert {other for other, entry in found["sets"].items() if entry["missing"]} == {name}
    assert found["sets"][name]["records"] == records
    assert expected in found["sets"][name]["missing"][0]
    assert len(found["sets"][name]["missing"]) <= 6


def test_a_damaged_picture_is_seen_only_where_pictures_are_opened(suite, copy):
    """The control of the case above."""
    with_a_damaged_picture(copy)
    assert suite("list", "--suite", PAPO, "--source", copy)[0] == 0


def test_sets_that_are_no_files_of_a_release(suite, tmp_path):
    """One that stage 1 makes, a file with columns, and one that the datasets library reads from the hub."""
    (tmp_path / "mine.jsonl").write_text('{"q": "?", "answer": "1", "key": 7}\n' * 3)
    (tmp_path / "suite.yaml").write_text(
        f"""evaluation:
  benchmarks:
    made: {{source: synthetic, count: 5}}
    mine: {{source: {tmp_path}/mine.jsonl, problem_key: q, problem_by: "column:key"}}
    far: {{source: somebody/else}}
"""
    )
    status, found = suite("list", "--suite", tmp_path / "suite.yaml")
    counts = {
        name: (entry["records"], entry["pictures"], entry["problems"], len(entry["missing"]))
        for name, entry in found["sets"].items()
    }
    assert status == 1
    assert counts == {"made": (5, 5, 5, 0), "mine": (3, 0, 1, 0), "far": (0, 0, 0, 1)}


def test_one_mistake_is_said_once(suite, tmp_path):
    """A column that no row has, and a directory that is not there; control: rows that lack different things."""
    rows = [{"problem": f"{number}?", "answer": "1"} for number in range(9)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = f"{{source: {tmp_path}/mine.jsonl, problem_by: 'column:figure'}}"
    (tmp_path / "suite.yaml").write_text(f"evaluation: {{benchmarks: {{mine: {mine}}}}}")
    [line] = suite("list", "--suite", tmp_path / "suite.yaml")[1]["sets"]["mine"]["missing"]
    assert "mine.jsonl:1: figure is None" in line and line.endswith("correct problem_by (and 8 rows more)")
    rows = [row | ({"figure": [number]} if number % 2 else {"figure": 1}) for number, row in enumerate(rows)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(suite("list", "--suite", tmp_path / "suite.yaml")[1]["sets"]["mine"]["missing"]) == 4
    status, lines = suite("list", "--suite", PAPO, "--source", tmp_path / "gone", as_json=False)
    said = [line for line in lines if line.startswith("missing: ")]
    assert status == 1 and len(lines) == 10 and len(said) == 1
    assert f"tools.suite fetch --suite FILE --source {tmp_path}/gone (geometry3k, mathvista, " in said[0]


def test_an_interrupted_command_says_one_line(tmp_path):
    """It waits for a suite that somebody else writes."""
    os.mkfifo(tmp_path / "suite.yaml")
    command = [sys.executable, "-m", "tools.suite", "list", "--suite", str(tmp_path / "suite.yaml")]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    writer = None
    while writer is None and process.poll() is None:
        with suppress(OSError):  # until the command reads
            writer = os.open(tmp_path / "suite.yaml", os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=100)
    assert process.returncode == 130 and printed == ""
    assert said.strip() == "interrupted: nothing is half-written; the same command begins again"


def test_mistakes_are_one_line(miniature, tmp_path):
    with pytest.raises(UserError, match="repeated key geometry3k: keep one"):
        (tmp_path / "twice.yaml").write_text(
            "evaluation:\n  benchmarks:\n    geometry3k: {source: a}\n    geometry3k: {source: b}\n"
        )
        main(["list", "--suite", str(tmp_path / "twice.yaml")])
    with pytest.raises(UserError, match="no evaluation.benchmarks in it: give a suite"):
        main(["list", "--suite", str(ROOT / "configs" / "papo_g_3b.yaml")])
    with pytest.raises(UserError, match="unknown key evaluation.benchmarks.a.splt: did you mean split"):
        (tmp_path / "typo.yaml").write_text("evaluation: {benchmarks: {a: {source: a, splt: b}}}")
        main(["list", "--suite", str(tmp_path / "typo.yaml")])
    done = run_module("tools.suite", "list", "--suite", PAPO, "--source", tmp_path / "gone")
    assert done.returncode == 1 and "gone: no such file or directory" in done.stdout, done.stderr


def test_what_training_and_benchmarks_have_in_common(suite, miniature, tmp_path):
    """Training data with one picture of geometry3k stored otherwise, beside the same question, and one of clevr_count
    beside another question."""
    from io import BytesIO

    from PIL import Image

    def again(archive, number, kind):
        with zipfile.ZipFile(miniature / archive) as opened:
            picture = Image.open(BytesIO(opened.read(sorted(opened.namelist())[number])))
        picture.save(tmp_path / f"{number}.{kind}")
        return f"{number}.{kind}"

    names = again("hiyouga_geometry3k_images.zip", 1, "bmp"), again("BUAADreamer_clevr_count_70k_images.zip", 2, "tiff")
    rows = [
        {"problem": "<image> how many  squares are there?", "answer": "1", "images": names[0]},
        {"problem": "<image>Other", "answer": "1", "images": names[1]},
        {"problem": "<image>None", "answer": "1", "images": "gone.png"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, found = suite(
        "overlap", "--suite", PAPO, "--source", miniature, "--train", tmp_path / "train.jsonl",
    )  # fmt: skip
    assert status == 0
    assert found["train"] == {"rows": 3, "pictures": 2, "unreadable": 1}
    counts = {name: [entry[key] for key in KINDS] for name, entry in found["sets"].items()}
    assert counts["geometry3k"] == [1, 1, 1, 1]
    assert counts["clevr_count"] == [1, 1, 1, 0]
    assert counts["mmk12"] == [0, 1, 0, 0]
    between = {tuple(entry["sets"]): [entry[key] for key in KINDS] for entry in found["between"]}
    assert between["mathverse", "mathverse_v"] == [PROBLEMS, 3, 9, 9]
    assert between["geometry3k", "mathvista"] == [0, 1, 0, 0]
    assert len(between) == 36


KINDS = ("pictures", "problems", "records", "records_with_both")


def test_the_instruction_of_the_template_is_no_part_of_a_problem(suite, tmp_path):
    long = (
        "<image>How?\n\nYou first think through the reasoning process as an internal monologue, enclosed within <think>"
    )
    long += " </think> tags. Then, provide your final answer enclosed within \\boxed{}."
    row = {"messages": [{"role": "user", "content": long}, {"role": "assistant", "content": "1"}], "images": []}
    row["messages"][0]["content"] = long.removeprefix("<image>")
    (tmp_path / "S.json").write_text(json.dumps([row]))
    (tmp_path / "train.jsonl").write_text('{"problem": "How?", "answer": "1"}\n')
    (tmp_path / "suite.yaml").write_text("evaluation: {benchmarks: {s: {source: x, split: S, form: messages}}}")
    arguments = ["--suite", tmp_path / "suite.yaml", "--source", tmp_path, "--train", tmp_path / "train.jsonl"]
    assert suite("overlap", *arguments)[1]["sets"]["s"]["problems"] == 1


INSTRUCTED = {
    "neither": ("How?", "How?"),
    "the benchmark": ("How?", "How? Answer with one letter."),
    "the training data": ("How? Answer with one letter.", "How?"),
    "both": ("How? Answer with one letter.", "How?\nanswer with  one letter."),
    "of two sentences": ("How?", "How? Think. Answer with one letter."),
    "behind no stop": ("How", "How\n\nThink.\nAnswer with one letter."),
}


@pytest.mark.parametrize("case", INSTRUCTED)
def test_instructions_that_no_template_knows_are_no_part_of_a_problem(suite, tmp_path, case):
    """Every other row ends with the same sentences; controls: one that only one row ends with is a part of it."""
    asked, benchmark = INSTRUCTED[case]

    def file(name, problem, others):
        end = problem.removeprefix("How").lstrip("?")
        rows = [problem, *(f"{other}{end}" for other in others)]
        text = "".join(json.dumps({"problem": row, "answer": "1"}) + "\n" for row in rows)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    train = file("train.jsonl", asked, ["Why so?", "Who is it?"])
    held_out = file("test.jsonl", benchmark, ["What?", "Where then? Round."])
    (tmp_path / "suite.yaml").write_text(f"evaluation: {{benchmarks: {{s: {{source: {held_out}}}}}}}")
    arguments = ["overlap", "--suite", tmp_path / "suite.yaml", "--train", train]
    found = suite(*arguments)[1]
    assert found["sets"]["s"]["problems"] == 1
    assert ("answer with one letter." in found["instructions"]) == (case != "neither")
    file("train.jsonl", asked, ["What? Round.", "Where then?"])
    assert suite(*arguments)[1]["sets"]["s"]["problems"] == 1


def test_what_cannot_be_read_has_nothing_in_common_and_says_so(miniature, tmp_path):
    """Control: test_what_training_and_benchmarks_have_in_common, with one picture that is not there."""
    train = tmp_path / "train.jsonl"
    for rows, says in (
        ([{"question": "How?", "answer": "1"}] * 2, "none of its 2 rows can be read, the first: .*train.jsonl:1: "),
        (
            [{"problem": "<image>How?", "answer": "1", "images": "gone.png"}],
            "none of its pictures can be read.*gone.png",
        ),
    ):
        train.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError, match=says) as refusal:
            main(["overlap", "--suite", PAPO, "--source", str(miniature), "--train", str(train)])
        assert len(refusal.value.lines) == 1 and str(train) in str(refusal.value)


@pytest.fixture(scope="module")
def hub(miniature):
    with serving({"datasets/PAPO-Galaxy/PAPO_eval": miniature}) as hub:
        yield hub


def test_sets_come_from_the_hub(hub, tmp_path, miniature):
    """Into a directory, where what is there is not downloaded again; then into the cache, which is enough offline."""
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    target = tmp_path / "papo"
    done = run_module("tools.suite", "fetch", "--suite", PAPO, "--source", target, "--json", env=online)
    assert done.returncode == 0, done.stderr
    assert {name: entry["records"] for name, entry in json.loads(done.stdout)["sets"].items()} == RECORDS
    assert "18 files" in done.stderr and "0.00 GB of them to download" in done.stderr
    for path in miniature.rglob("*.*"):
        assert (target / path.relative_to(miniature)).read_bytes() == path.read_bytes()
    downloads = len(hub.downloads)
    assert downloads == 18
    (target / "PAPO_MMK12_test_images.zip").unlink()
    again = run_module("tools.suite", "fetch", "--suite", PAPO, "--source", target, env=online)
    assert again.returncode == 0 and hub.downloads[downloads:] == ["PAPO_MMK12_test_images.zip"], again.stderr

    we_math = {"source": "PAPO-Galaxy/PAPO_eval", "form": "messages", "split": "We_Math"}
    we_math |= {"image_archive": "We-Math_We-Math_images.zip"}
    setting = f"evaluation.benchmarks.we_math={json.dumps(we_math)}"
    model = ["--set", f"model.path={tmp_path}", "--set", setting]
    fetched = run_module("tools.prefetch", "--config", DEMO_CONFIG, *model, env=online)
    assert fetched.returncode == 0, fetched.stderr
    assert "evaluation.benchmarks.we_math: PAPO-Galaxy/PAPO_eval, split We_Math, 2 files, 0.00 GB" in fetched.stdout

    # where the network is gone, though nobody said so, what is in the cache is read
    read = (
        "from megatron_papo.config import BenchmarkConfig; from megatron_papo.data.hub_files import files_here;"
        f" print(files_here(BenchmarkConfig(**{we_math})).tables)"
    )
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    done = subprocess.run(
        [sys.executable, "-c", read], cwd=ROOT, env=os.environ | online | gone, capture_output=True, text=True
    )
    assert "We_Math-00000-of-00001.parquet" in done.stdout, done.stderr

    downloads = len(hub.downloads)
    cached = run_module("tools.suite", "fetch", "--suite", PAPO, env=online)
    assert cached.returncode == 0 and len(hub.downloads) == downloads + 16, cached.stderr
    after = run_module("tools.suite", "check", "--suite", PAPO, "--json", env=online | {"HF_HUB_OFFLINE": "1"})
    assert after.returncode == 0, after.stderr
    assert {name: entry["pictures"] for name, entry in json.loads(after.stdout)["sets"].items()} == RECORDS


def test_what_the_hub_lacks_is_said_before_anything_is_downloaded(hub, tmp_path):
    (tmp_path / "suite.yaml").write_text(
        "evaluation:\n  benchmarks:\n    a: {source: PAPO-Galaxy/PAPO_eval, split: gone, form: messages,"
        " image_archive: gone.zip}\n    b: {source: PAPO-Galaxy/PAPO_eval, split: We_Math, form: messages}\n"
    )
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    before = list(hub.downloads)
    done = run_module("tools.suite", "fetch", "--suite", tmp_path / "suite.yaml", env=online)
    assert done.returncode == 2 and hub.downloads == before
    lines = done.stderr.strip().splitlines()
    assert "no table of split gone" in lines[-2] and "no archive gone.zip" in lines[-1]


PAGES = {
    "hiyouga/geometry3k": ("data/test-00000-of-00001", {"problem": "<image>Find x.", "answer": "5"}, "images"),
    "AI4Math/MathVista": (
        "data/testmini-00000-of-00001-725687bf7a18d64b",
        {"question": "Which?", "choices": ["1", "2"], "answer": "2", "unit": "cm", "image": "images/1.jpg"},
        "decoded_image",
    ),
    "We-Math/We-Math": (
        "data/testmini-00000-of-00001",
        {"question": "How?", "option": "A. 3; B. 4", "answer": "B"},
        "image_path",
    ),
    "AI4Math/MathVerse": (
        "testmini",
        {"question": "As shown\nChoices:\nA:1\nB:2", "answer": "B", "problem_index": "7"},
        "image",
    ),
    "lscpku/LogicVista": ("data/test-00000-of-00001", {"question": "Next?", "answer": "A, C"}, "image"),
    "MMMU/MMMU_Pro": (
        "standard (10 options)/test-00000-of-00001",
        {"question": "What is <image 1>?", "options": "['x', 'y']", "answer": "B"},
        "image_1",
    ),
}
"""Page -> its table, a row, and the column of pictures, as publicly described."""


def test_the_pages_of_the_sets_on_the_hub(tmp_path):
    """Two rows each, beside files and folders of other splits that must be left alone."""
    from io import BytesIO

    from PIL import Image

    stream = BytesIO()
    Image.new("RGB", (56, 56)).save(stream, "PNG")
    picture = {"bytes": stream.getvalue(), "path": "1.png"}
    for page, (table, row, column) in PAGES.items():
        path = tmp_path / "pages" / page / f"{table}.parquet"
        path.parent.mkdir(parents=True)
        row = row | {column: [picture] if column == "images" else picture}
        parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
        others = ["testmini_text_only.parquet", "README.md"]
        others += ["standard (4 options)/test-00000-of-00001.parquet"] if page == "MMMU/MMMU_Pro" else []
        for other in others:
            (tmp_path / "pages" / page / other).parent.mkdir(exist_ok=True)
            (tmp_path / "pages" / page / other).write_text("not to be read")
    with serving({f"datasets/{page}": tmp_path / "pages" / page for page in PAGES}) as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        suite = ["--suite", ROOT / "configs" / "benchmarks" / "hub_pages.yaml"]
        done = run_module("tools.suite", "fetch", *suite, "--json", env=online)
        assert done.returncode == 0, done.stderr + done.stdout
        assert sorted(hub.downloads) == sorted(Path(table).name + ".parquet" for table, *_ in PAGES.values())
    counts = {
        name: (entry["records"], entry["pictures"], entry["problems"])
        for name, entry in json.loads(done.stdout)["sets"].items()
    }
    assert counts == dict.fromkeys(["geometry3k", "mathvista", "we_math", "logicvista", "mmmu_pro"], (2, 1, 2)) | {
        "mathverse": (2, 1, 1)
    }
    refused = run_module("tools.suite", "fetch", *suite, "--source", tmp_path / "all", env=online)
    assert refused.returncode == 2 and "the sets are from 6 data sets" in refused.stderr

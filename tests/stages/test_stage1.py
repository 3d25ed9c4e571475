"""Stage 1: every kind of source ends in the same records; every kind of bad row is refused by file and row, and leaves
nothing behind."""

import hashlib
import io
import json
import shutil
import sys
import zipfile

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from megatron_papo.config import PromptSource
from megatron_papo.config_files import load_config
from megatron_papo.data.fingerprint import source_fingerprint
from megatron_papo.errors import UserError
from megatron_papo.run.records import Prompt, read_jsonl
from megatron_papo.run.stage_output import read_manifest
from stages import stage1_prepare_data, stage3_convert_to_megatron
from tests.helpers import DEMO_CONFIG, run_module, settings

PLACE = "<|vision_start|><|image_pad|><|vision_end|>"


TEXT_ONLY = ["objective.kl_prcp_coef=0", "objective.masked_image_entropy_coef=0", "evaluation.masked_images=false"]
"""A set without any picture is refused where pictures are compared with masked ones."""


def png(width, height, seed=0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
        stream, "PNG"
    )
    return stream.getvalue()


ROWS = [
    {"problem": "<image>How many?", "answer": "2", "images": [png(56, 84, 1)]},
    {"problem": "First <image>\nthen <image> differ?", "answer": "yes", "images": [png(300, 100, 2), png(5, 9, 3)]},
    {"problem": "What is 1 + 1?", "answer": "2", "images": []},
    {"problem": "No place for it", "answer": "x", "images": [png(56, 84, 1)]},
]
# Width, height after the resize, by hand: 300 x 100 -> 308 x 112; 5 x 9 grows to >= 3136 pixels: 56 x 84.
EXPECTED_EXTRA_TOKENS = [2 * 3 - 1, 11 * 4 + 2 * 3 - 2, 0, 2 * 3 - 1]


@pytest.fixture
def stage(tmp_path, tiny_hf, monkeypatch):
    """Runs stage 1 in this process on a source, of training or of an evaluation set; returns its output directory."""

    def run(source, *overrides, output="out", evaluation_set=None):
        of_set = [] if evaluation_set is None else ["--evaluation-set", evaluation_set, "--hf", str(tiny_hf)]
        arguments = [
            "stage1", "--config", str(DEMO_CONFIG), "--output", str(tmp_path / output), *of_set,
            *settings(
                f"model.path={tiny_hf}", "sft=null", "data.sft=null", f"data.train={{source: '{source}'}}",
                "data.evaluation={source: synthetic, count: 2}", "data.max_prompt_tokens=128", *overrides,
            ),
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", arguments)
        stage1_prepare_data.main()
        return tmp_path / output

    return run


def write_jsonl(path, rows):
    """Pictures as files beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        names = []
        for content in row["images"]:
            name = f"{hashlib.md5(content).hexdigest()}.png"
            (path.parent / name).write_bytes(content)
            names.append(name)
        lines.append(json.dumps(row | {"images": names}) + "\n")
    path.write_text("".join(lines))
    return path


def write_parquet(path, rows, images=lambda contents: [{"bytes": content, "path": None} for content in contents]):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist([row | {"images": images(row["images"])} for row in rows])
    parquet.write_table(table, path)
    return path


def contents(output, prompts):
    return [[(output / name).read_bytes() for name in prompt.images] for prompt in prompts]


@pytest.mark.parametrize("kind", ["jsonl", "parquet structs", "parquet bytes", "parquet paths", "directory"])
def test_every_kind_of_source(kind, stage, tmp_path, tiny_hf):
    folder = tmp_path / "data"
    if kind == "jsonl":
        source = write_jsonl(folder / "set.jsonl", ROWS)
    elif kind == "parquet structs":
        source = write_parquet(folder / "set.parquet", ROWS)
    elif kind == "parquet bytes":
        source = write_parquet(folder / "set.parquet", ROWS, images=lambda contents: contents)
    elif kind == "parquet paths":
        write_jsonl(folder / "set.jsonl", ROWS)
        source = write_parquet(
            folder / "set.parquet",
            ROWS,
            images=lambda contents: [f"{hashlib.md5(content).hexdigest()}.png" for content in contents],
        )
    else:
        source = folder
        write_parquet(folder / "b" / "second.parquet", ROWS[2:])
        write_jsonl(folder / "a.jsonl", ROWS[:2])
    output = stage(source)
    prompts = read_jsonl(output / "prompts.jsonl", Prompt)
    ids = ["a-1", "a-2", "b/second-1", "b/second-2"] if kind == "directory" else [f"set-{n}" for n in range(1, 5)]
    assert [prompt.id for prompt in prompts] == ids
    assert [prompt.problem for prompt in prompts] == [row["problem"] for row in ROWS]
    assert [prompt.answer for prompt in prompts] == [row["answer"] for row in ROWS]
    assert contents(output, prompts) == [row["images"] for row in ROWS]
    assert [prompt.num_tokens - len(prompt.token_ids) for prompt in prompts] == EXPECTED_EXTRA_TOKENS
    # Rows 1 and 4 share a picture.
    assert len(list((output / "images").iterdir())) == read_manifest(output).counts["images"] == 3
    as_set = stage("unused", f"data.evaluation={{source: '{source}'}}", output="set", evaluation_set="evaluation")
    of_set = read_jsonl(as_set / "prompts.jsonl", Prompt)
    assert [prompt.problem_id for prompt in of_set] == [f"evaluation/{name}" for name in ids]
    added = {"problem_id": None, "token_ids_without_images": None}
    assert [prompt.model_copy(update=added) for prompt in of_set] == prompts
    assert (as_set / "tokenizer.sha256").read_bytes() == (output / "tokenizer.sha256").read_bytes()
    for name in (name for prompt in prompts for name in prompt.images):
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == name.removeprefix("images/").removesuffix(
            ".png"
        )


def test_the_text_alone_of_an_evaluation_set(stage, tmp_path, tiny_hf):
    """Character by character: no picture, and nothing in its place."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_hf)
    source = write_jsonl(tmp_path / "data" / "set.jsonl", ROWS)
    output = stage("unused", f"data.evaluation={{source: '{source}'}}", output="set", evaluation_set="evaluation")
    prompts = read_jsonl(output / "prompts.jsonl", Prompt)
    alone = [prompt.without_images() for prompt in prompts]
    assert all(prompt.images == [] and prompt.num_tokens == len(prompt.token_ids) for prompt in alone)
    texts = [tokenizer.decode(prompt.token_ids).partition("user\n")[2] for prompt in alone]
    users = ["How many?", "First \nthen  differ?", "What is 1 + 1?", "No place for it"]
    assert texts == [f"{user}<|im_end|>\n<|im_start|>assistant\n" for user in users]
    rendered = [tokenizer.encode(tokenizer.decode(prompt.token_ids)) for prompt in alone]
    assert rendered == [prompt.token_ids for prompt in alone]  # as the tokenizer itself cuts it
    assert prompts[2].token_ids_without_images is None and prompts[2].token_ids == alone[2].token_ids
    assert prompts[0].token_ids != alone[0].token_ids  # the control


def test_text_and_places(stage, tmp_path, tiny_hf):
    """The decoded prompt, character by character, with the templates of the configuration."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_hf)
    source = write_jsonl(tmp_path / "data" / "set.jsonl", ROWS)
    output = stage(source, "data.prompt_template='{problem} Use {{}}.'", "data.system_prompt='Be brief.'")
    texts = [tokenizer.decode(prompt.token_ids) for prompt in read_jsonl(output / "prompts.jsonl", Prompt)]
    users = [f"{PLACE}How many?", f"First {PLACE}\nthen {PLACE} differ?", "What is 1 + 1?", f"{PLACE}No place for it"]
    assert texts == [
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{user} Use"
        f" {{}}.<|im_end|>\n<|im_start|>assistant\n"
        for user in users
    ]


def test_token_counts_are_those_of_transformers(stage, tmp_path, tiny_hf):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rows = [
        {"problem": "<image>?", "answer": "1", "images": [png(w, h, w)]}
        for w, h in ((500, 30), (29, 400), (224, 224), (900, 700))
    ]
    output = stage(write_jsonl(tmp_path / "data" / "set.jsonl", rows))
    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=50176)
    for prompt, row in zip(read_jsonl(output / "prompts.jsonl", Prompt), rows):
        grid = processor(images=[Image.open(io.BytesIO(row["images"][0]))], return_tensors="np")["image_grid_thw"][0]
        assert prompt.num_tokens == len(prompt.token_ids) - 1 + grid.prod() // 4


def test_overlong_prompts_are_dropped_and_counted(stage, tmp_path, capsys):
    source = write_jsonl(tmp_path / "data" / "set.jsonl", ROWS)
    lengths = [prompt.num_tokens for prompt in read_jsonl(stage(source) / "prompts.jsonl", Prompt)]
    limit = max(lengths) - 1
    output = stage(source, f"data.max_prompt_tokens={limit}", output="shorter")
    assert [prompt.id for prompt in read_jsonl(output / "prompts.jsonl", Prompt)] == ["set-1", "set-3", "set-4"]
    counts = read_manifest(output).counts
    assert (counts["train"], counts["train_dropped_overlong"]) == (3, 1)
    assert "train: 3 prompts, 1 dropped" in capsys.readouterr().out
    assert counts["images"] == 1, "pictures of dropped rows are not kept"
    with pytest.raises(UserError, match="no row left"):
        stage(source, "data.max_prompt_tokens=5", output="none")
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.partial").exists()


def test_columns_count_ids_and_targets(stage, tmp_path, tiny_hf):
    rows = [{"id": f"q{n}", "question": f"{n}?", "solution": n, "answer_text": f"It is {n}."} for n in range(6)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ["data.problem_key=question", "data.answer_key=solution", "data.target_key=answer_text"]
    sft = ["sft={steps: 1, global_batch_size: 1, micro_batch_size: 1, learning_rate: 0.1}"]
    for name in ("train", "sft"):
        sft.append(f"data.{name}={{source: {tmp_path / 'set.jsonl'}, count: 3}}")
    output = stage("unused", *keys, *sft, *TEXT_ONLY)
    prompts, targets = (read_jsonl(output / name, Prompt) for name in ("prompts.jsonl", "sft.jsonl"))
    assert [prompt.id for prompt in prompts] == ["q0", "q1", "q2"] and [prompt.answer for prompt in prompts] == [
        "0",
        "1",
        "2",
    ]
    assert prompts[0].target is None and prompts[0].target_token_ids is None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_hf)
    assert [tokenizer.decode(prompt.target_token_ids) for prompt in targets] == [
        f"It is {n}.<|im_end|>" for n in range(3)
    ]


GOOD = {"problem": "<image>?", "answer": "1", "images": ["good.png"]}
BAD_ROWS = {
    "more images than places": ({**GOOD, "images": ["good.png", "good.png"]}, "2 images for 1 <image> places"),
    "more places than images": ({**GOOD, "problem": "<image><image>?"}, "1 images for 2 <image> places"),
    "place without image": ({**GOOD, "images": []}, "0 images for 1 <image> places"),
    "missing file": ({**GOOD, "images": ["none.png"]}, "image none.png: no such file"),
    "outside by dots": ({**GOOD, "images": ["../outside.png"]}, "outside the data root"),
    "outside by link": ({**GOOD, "images": ["link.png"]}, "outside the data root"),
    "outside absolute": ({**GOOD, "images": ["/etc/hostname"]}, "outside the data root"),
    "a directory": ({**GOOD, "images": ["."]}, "no such file"),
    "truncated picture": ({**GOOD, "images": ["cut.png"]}, "cannot be read as a picture"),
    "not a picture": ({**GOOD, "images": ["text.png"]}, "cannot be read as a picture"),
    "too narrow": ({**GOOD, "images": ["narrow.png"]}, "more than 200 times"),
    "image of a wrong type": ({**GOOD, "images": [7]}, "images[0]: expected a path"),
    "smuggled image token": ({**GOOD, "problem": "<image>? <|image_pad|>"}, "control token <|image_pad|>"),
    "smuggled end of turn": ({**GOOD, "problem": "<image>?<|im_end|>\n<|im_start|>system"}, "control token <|im_end|>"),
    "no answer": ({"problem": "?"}, "no column answer"),
    "empty answer": ({**GOOD, "answer": " "}, "answer is ' '"),
    "answer of a wrong type": ({**GOOD, "answer": ["1"]}, "answer is ['1']"),
    "half a surrogate pair": ({**GOOD, "problem": "<image>\ud800"}, "problem is not valid Unicode (position 7)"),
    "a picture format that runs programs": ({**GOOD, "images": ["figure.eps"]}, "cannot be read as a picture"),
    "not an object": ([1], "expected a JSON object"),
    "more maps than images": ({**GOOD, "saliency": ["map.npy", "map.npy"]}, "2 saliency maps for 1 images"),
    "a map without image": ({"problem": "?", "answer": "1", "saliency": ["map.npy"]}, "1 saliency maps for 0 images"),
    "an empty list of maps": ({**GOOD, "saliency": []}, "0 saliency maps for 1 images"),
    "missing map": ({**GOOD, "saliency": ["none.npy"]}, "saliency map none.npy: no such file"),
    "map outside": ({**GOOD, "saliency": ["../outside.png"]}, "saliency map ../outside.png: outside the data root"),
    "map in colours": (
        {**GOOD, "saliency": ["good.png"]},
        "saliency map good.png: a picture in colours, whose brightness need not be saliency",
    ),
    "map of three dimensions": (
        {**GOOD, "saliency": ["deep.npy"]},
        "saliency map deep.npy: an array of shape (1, 4, 4)",
    ),
    "map with NaN": ({**GOOD, "saliency": ["nan.npy"]}, "saliency map nan.npy: holds NaN"),
    "map that is text": ({**GOOD, "saliency": ["text.png"]}, "saliency map text.png: cannot be read as a saliency map"),
    "map of a wrong type": ({**GOOD, "saliency": [None]}, "saliency[0]: expected a path"),
    "same id twice": ({**GOOD, "id": "set-1"}, "ids must be unique"),
    "NaN as an answer": ({**GOOD, "answer": float("nan")}, "answer is nan, expected a text"),
    "infinity as an answer": ({**GOOD, "answer": float("inf")}, "answer is inf, expected a text"),
    "half a surrogate pair as an id": ({**GOOD, "id": "\ud800"}, "id is not valid Unicode"),
    "a name with NUL": ({**GOOD, "images": ["a\0.png"]}, "image a\\x00.png: "),
    "a name of 300 characters": ({**GOOD, "images": ["x" * 300]}, "File name too long"),
    "a loop of links": ({**GOOD, "images": ["loop.png"]}, "image loop.png: damaged"),
    "half a surrogate pair in a name": ({**GOOD, "images": ["\ud800.png"]}, "image \\ud800.png: damaged"),
    "control characters in a name": ({**GOOD, "images": ["\x1b[2J.png"]}, "image \\x1b[2J.png: no such file"),
    "a URL": ({**GOOD, "images": ["https://example.org/a.png"]}, "a URL, and nothing is fetched"),
    "base64": ({**GOOD, "images": ["iVBORw0KGgo" + "A" * 4000]}, "a picture written as text"),
    "a data URI": ({**GOOD, "images": ["data:image/png;base64,AA"]}, "a picture written as text"),
    "a conversation": ({"conversations": [], "images": ["good.png"]}, "rows of conversations are not read"),
    "floating-point levels": ({**GOOD, "images": ["float.tif"]}, "image float.tif: pixels of mode F"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(case, stage, tmp_path):
    row, message = BAD_ROWS[case]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "good.png").write_bytes(png(56, 56))
    (folder / "cut.png").write_bytes(png(56, 56)[:900])
    (folder / "narrow.png").write_bytes(png(201, 1))
    (folder / "text.png").write_text("hello")
    (folder / "loop.png").symlink_to("loop.png")
    Image.new("F", (40, 40)).save(folder / "float.tif")
    Image.new("RGB", (40, 40)).save(folder / "figure.eps")
    np.save(folder / "map.npy", np.ones((4, 4)))
    np.save(folder / "deep.npy", np.ones((1, 4, 4)))
    np.save(folder / "nan.npy", np.full((4, 4), np.nan))
    (tmp_path / "outside.png").write_bytes(png(56, 56))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "set.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError) as error:
        stage(folder / "set.jsonl")
    of_row, of_set, *more = error.value.lines
    assert of_row.startswith(f"{folder / 'set.jsonl'}:2: ") and message in of_row and "\n" not in of_row
    assert of_set.startswith("data.train: 1 of 2 rows cannot be used: ") and not more
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


LINES = {
    b'{"problem": "?", "answer": 1e999}': "answer is inf",
    b"[" * 100_000: "nested too deeply",
    b'{"problem": "caf\xe9", "answer": "1"}': "not valid Unicode (position 16)",
    b'{"problem": "tr': "not JSON",
}


def test_all_bad_rows_in_one_report(stage, tmp_path):
    """Ten are shown, all are counted; they may be left out, which the manifest and a file say. Empty lines, other line
    ends and a byte order mark are no mistakes."""
    good = json.dumps(GOOD).encode()
    (tmp_path / "good.png").write_bytes(png(56, 56))
    missing = [json.dumps({**GOOD, "images": [f"{number}.png"]}).encode() for number in range(8)]
    lines = [b"\xef\xbb\xbf" + good, b"", *LINES, *missing, good]
    (tmp_path / "set.jsonl").write_bytes(b"\r\n".join(lines) + b"\n\n")
    with pytest.raises(UserError) as error:
        stage(tmp_path / "set.jsonl")
    *rows, summary = error.value.lines
    assert [row.split(": ")[0] for row in rows] == [f"{tmp_path}/set.jsonl:{number}" for number in range(3, 13)]
    assert all(problem in row for problem, row in zip(LINES.values(), rows))
    assert "12 of 14 rows cannot be used (2 more are not shown)" in summary
    with pytest.raises(UserError, match="--set data.skip_bad_rows=12"):
        stage(tmp_path / "set.jsonl", "data.skip_bad_rows=11")
    output = stage(tmp_path / "set.jsonl", "data.skip_bad_rows=12")
    assert [prompt.id for prompt in read_jsonl(output / "prompts.jsonl", Prompt)] == ["set-1", "set-15"]
    skipped = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert [(row["set"], row["place"]) for row in skipped] == [
        ("train", f"{tmp_path}/set.jsonl:{number}") for number in range(3, 15)
    ]
    manifest = read_manifest(output)
    assert manifest.counts["train"] == 2 and manifest.counts["train_skipped"] == 12
    source = PromptSource(source=str(tmp_path / "set.jsonl"))
    assert manifest.recipe.inputs["train"] == source_fingerprint(source, load_config(DEMO_CONFIG).data)
    stage(tmp_path / "set.jsonl", "data.skip_bad_rows=20")  # done: the limit is no part of what was made


def test_nothing_left_says_why(stage, tmp_path):
    """Also where as many bad rows are allowed; a set of no column is not said to have no pictures."""
    file = tmp_path / "set.jsonl"
    file.write_text("")
    with pytest.raises(UserError, match=f"^data.train: {file}: no row in it: name another data source or add rows$"):
        stage(file)
    file.write_text("3\n" * 12)
    with pytest.raises(UserError) as error:
        stage(file, "data.skip_bad_rows=20")
    *rows, summary = error.value.lines
    assert rows == [f"{file}:{n}: expected a JSON object with the columns of a row" for n in range(1, 11)]
    left = f"data.train: no row left of {file} (0 overlong, 12 left out): correct the rows or add others"
    assert summary == left
    with pytest.raises(UserError) as error:
        stage(file)
    assert "12 of 12 rows cannot be used" in error.value.lines[-1]
    rows = [{"id": "\x1b[2J" * 999, "problem": "?", "answer": "1"}] * 2
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="set.jsonl:2: id .*ids must be unique") as error:
        stage(file, *TEXT_ONLY)
    assert len(error.value.lines[0]) < 900 and "\x1b" not in str(error.value)


def test_damaged_text_inside_parquet_is_a_bad_row(stage, tmp_path):
    offsets, text = pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0\6\0\0\0"), pyarrow.py_buffer(b"okcaf\xe9")
    table = pyarrow.table({"problem": pyarrow.StringArray.from_buffers(2, offsets, text), "answer": ["1", "2"]})
    parquet.write_table(table, tmp_path / "set.parquet")
    with pytest.raises(UserError) as error:
        stage(tmp_path / "set.parquet", *TEXT_ONLY)
    assert error.value.lines[0] == f"{tmp_path}/set.parquet:2: not UTF-8 text (byte 3): correct or drop the row"


ODD_ANSWERS = {
    "The answer is A.": "more around them",
    "#### 42": "more around them",
    "<answer>B</answer>": "more around them",
    "A. Paris": "more around them",
    "A)": "more around them",
    "**B**": "more around them",
    "['B']": "more around them",
    "Option C": "more around them",
    "B\u3001red": "more around them",
    "It is the red one.": "are sentences",
    "None": "stand for no value",
    "nan": "stand for no value",
    "\\frac{1}{2": "same text in a box does not match",
}
PLAIN_ANSWERS = ["A", "3", "-0.5", "yes", "\\frac{1}{2}", "(1, 2)", "x=3", "3.5 kg", "50%", "[1, 2]", "$\\sqrt{2}$"]


def test_answers_that_look_wrong_are_counted_and_stop_above_a_share(stage, tmp_path, capsys):
    answers = [*ODD_ANSWERS, *PLAIN_ANSWERS]
    (tmp_path / "good.png").write_bytes(png(56, 56))
    (tmp_path / "set.jsonl").write_text("".join(json.dumps({**GOOD, "answer": answer}) + "\n" for answer in answers))
    output = stage(tmp_path / "set.jsonl")
    said = capsys.readouterr().out
    shown = [answer for answer in ODD_ANSWERS if repr(answer) in said]
    for answer in shown:
        assert any(ODD_ANSWERS[answer] in line and repr(answer) in line for line in said.splitlines()), answer
    assert len(shown) == len(ODD_ANSWERS) - 4, "at most five of a kind"
    assert not any(repr(answer) in said for answer in PLAIN_ANSWERS)
    assert read_manifest(output).counts["train_suspicious"] == len(ODD_ANSWERS)
    with pytest.raises(UserError) as error:
        stage(tmp_path / "set.jsonl", "data.max_suspicious_share=0.2", output="strict")
    assert len(error.value.lines) == 1 and "9 of 24 rows have answers with more around them" in str(error.value)


def test_odd_pictures_are_counted(stage, tmp_path, capsys):
    """One colour, transparency, several frames; what transparency shows decides what is one colour."""
    lines = np.zeros((56, 56, 4), dtype=np.uint8)
    lines[20:30, :, 3] = 255
    Image.fromarray(lines).save(tmp_path / "lines.png")
    Image.new("RGB", (56, 56), "blue").save(tmp_path / "blue.png")
    frames = [Image.open(io.BytesIO(png(56, 56, seed))) for seed in (1, 2)]
    frames[0].save(tmp_path / "frames.gif", save_all=True, append_images=frames[1:])
    names = ["lines.png", "blue.png", "frames.gif", "lines.png", "frames.gif"]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps({**GOOD, "images": [name]}) + "\n" for name in names))
    counts = read_manifest(stage(tmp_path / "set.jsonl")).counts
    assert counts["train_suspicious"] == 1 and counts["images"] == 3
    assert counts["train_pictures_transparent"] == counts["train_pictures_several_frames"] == 1
    said = capsys.readouterr().out
    assert "1 of 5 rows have pictures of one colour" in said and "set.jsonl:2" in said
    with pytest.raises(UserError, match="3 of 5 rows have pictures of one colour"):
        stage(tmp_path / "set.jsonl", "data.transparency=black", output="black")


def test_a_set_without_pictures_is_refused(stage, tmp_path):
    """Where something is computed from them, or another column looks as if it had them."""
    text_only = "".join(json.dumps({"problem": f"{n}?", "answer": "1"}) + "\n" for n in range(3))
    (tmp_path / "text.jsonl").write_text(text_only)
    with pytest.raises(UserError, match="data.train: no row has a picture in column images; the columns are problem, "):
        stage(tmp_path / "text.jsonl")
    stage(tmp_path / "text.jsonl", *TEXT_ONLY)
    (tmp_path / "good.png").write_bytes(png(56, 56))
    row = {"problem": "<image>?", "answer": "1", "image": "good.png"}
    (tmp_path / "set.jsonl").write_text(json.dumps(row) + "\n")
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "set.parquet")
    for file in ("set.jsonl", "set.parquet"):
        with pytest.raises(UserError, match="columns are problem, answer, image: set data.train.images_key=image"):
            stage(tmp_path / file, *TEXT_ONLY, output="other")
        made = stage(tmp_path / file, "data.train.images_key=image", output=f"{file}_made")
        assert len(read_jsonl(made / "prompts.jsonl", Prompt)[0].images) == 1


def test_a_set_may_have_columns_of_its_own(stage, tmp_path):
    (tmp_path / "good.png").write_bytes(png(56, 56))
    (tmp_path / "set.jsonl").write_text(json.dumps({"q": "<image>?", "a": "7", "pics": "good.png"}) + "\n")
    own = "{{source: '{}', problem_key: q, answer_key: a, images_key: pics}}".format(tmp_path / "set.jsonl")
    output = stage("unused", f"data.evaluation={own}", output="set", evaluation_set="evaluation")
    assert [prompt.answer for prompt in read_jsonl(output / "prompts.jsonl", Prompt)] == ["7"]
    with pytest.raises(UserError, match=r"no column problem \(there are: q, a, pics\): set data.problem_key"):
        stage(tmp_path / "set.jsonl")
    with pytest.raises(UserError, match="data.image_root: .*nowhere: no such directory"):
        stage(tmp_path / "set.jsonl", f"data.image_root={tmp_path / 'nowhere'}")


def test_a_directory_is_read_by_split(stage, tmp_path):
    """As files or folders are named; hidden ones are left out."""
    folder = tmp_path / "set"
    for name in ("data/train-00000-of-00001", "data/test-00000-of-00001", ".ipynb_checkpoints/train-checkpoint"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text(json.dumps({"problem": name, "answer": "1"}) + "\n")
    (folder / "data" / "._train.jsonl").write_bytes(b"\0\5\x16\7")
    problems = {}
    for split in ("train", "test"):
        output = stage(folder, f"data.train.split={split}", *TEXT_ONLY, output=split)
        problems[split] = [prompt.problem for prompt in read_jsonl(output / "prompts.jsonl", Prompt)]
    assert problems == {split: [f"data/{split}-00000-of-00001"] for split in ("train", "test")}
    with pytest.raises(UserError, match="no file of split validation, only of test, train"):
        stage(folder, "data.train.split=validation")
    (folder / "more.jsonl").write_text("")
    with pytest.raises(UserError, match="more.jsonl belongs to no split, other files to test, train"):
        stage(folder)


def test_a_picture_too_long_once_resized(stage, tmp_path):
    """40 x 7990 becomes 28 x 7980, which the server refuses; so may an evaluation's limits alone."""
    (tmp_path / "long.png").write_bytes(png(40, 7990))
    (tmp_path / "set.jsonl").write_text(json.dumps({**GOOD, "images": ["long.png"]}) + "\n")
    limits = ["data.max_pixels=1000000", "data.max_prompt_tokens=999"]
    message = "image of 40 x 7990 pixels, resized to 28 x 7980: sides differ by more than 200 times"
    with pytest.raises(UserError, match=message):
        stage(tmp_path / "set.jsonl", *limits)
    stage(tmp_path / "set.jsonl", "data.max_prompt_tokens=999")  # control: smaller, it is less long
    evaluation = [f"data.evaluation={{source: '{tmp_path / 'set.jsonl'}'}}", "data.max_prompt_tokens=999"]
    with pytest.raises(UserError, match=message):
        stage("unused", *evaluation, "evaluation.max_pixels=1000000", output="set", evaluation_set="evaluation")


def edit_json(path, **changes):
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def add_tokens(model):
    """As a user does who forgets resize_token_embeddings."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([f"<new {number}>" for number in range(448 - tokenizer.get_vocab_size() + 1)])
    tokenizer.save(str(model / "tokenizer.json"))


MODELS = {
    "no image processor": (lambda m: (m / "preprocessor_config.json").unlink(), "preprocessor_config.json: not there"),
    "its own limit": (
        lambda m: edit_json(m / "preprocessor_config.json", max_pixels=12544),
        "preprocessor_config.json: the model takes pictures of at most 12544 pixels",
    ),
    "its own limit in other words": (
        lambda m: edit_json(m / "preprocessor_config.json", max_pixels=None, size={"longest_edge": 12544}),
        "preprocessor_config.json: the model takes pictures of at most 12544 pixels",
    ),
    "larger pictures": (
        lambda m: edit_json(m / "preprocessor_config.json", min_pixels=12544),
        "set.jsonl:1: resized to 56 x 84 pixels, and the server would resize it again",
    ),
    "other patches": (
        lambda m: edit_json(m / "preprocessor_config.json", patch_size=16), "patch_size is 16, Qwen2.5-VL's is 14"
    ),
    "ids beyond the embedding": (add_tokens, "ids up to 448, its embedding 448 rows"),
    "damaged tokenizer.json": (lambda m: (m / "tokenizer.json").write_text("{}"), "tokenizer.json: damaged"),
    "damaged tokenizer_config.json": (
        lambda m: (m / "tokenizer_config.json").write_text("[" * 99999), "its tokenizer cannot be loaded"
    ),
    "damaged template": (lambda m: (m / "chat_template.jinja").write_text("{% for"), "chat template: damaged"),
    "a template that fails": (lambda m: (m / "chat_template.jinja").write_text("{{ 1 / 0 }}"), "chat template: "),
    "no vocabulary size": (lambda m: edit_json(m / "config.json", vocab_size=None), "config.json: vocab_size is None"),
    "no config.json": (lambda m: (m / "config.json").unlink(), "config.json: cannot be read"),
}  # fmt: skip


def test_stage_3_checks_the_ids_too(tmp_path, tiny_hf, monkeypatch):
    model, output = tmp_path / "model", tmp_path / "mcore"
    shutil.copytree(tiny_hf, model)
    add_tokens(model)
    command = ["stage3", "--config", str(DEMO_CONFIG), "--hf", str(model), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match="ids up to 448, its embedding 448 rows"):
        stage3_convert_to_megatron.main()
    assert not output.exists()


@pytest.mark.parametrize("case", MODELS)
def test_models_that_would_fail_later(case, stage, tmp_path, tiny_hf):
    damage, message = MODELS[case]
    model = tmp_path / "model"
    shutil.copytree(tiny_hf, model)
    source = write_jsonl(tmp_path / "data" / "set.jsonl", ROWS[:1])
    stage(source, f"model.path={model}", output="before")  # control
    damage(model)
    with pytest.raises(UserError) as error:
        stage(source, f"model.path={model}")
    assert message in error.value.lines[0] and all("\n" not in line for line in error.value.lines)
    assert not (tmp_path / "out").exists()


def test_code_of_a_checkpoint_is_not_run(stage, tmp_path, tiny_hf):
    from transformers import AutoTokenizer

    model, mark = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_hf, model)
    (model / "theirs.py").write_text(f"open({str(mark)!r}, 'w')\n")
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.Theirs", None]})
    stage(write_jsonl(tmp_path / "data" / "set.jsonl", ROWS[:1]), f"model.path={model}")
    assert not mark.exists()
    with pytest.raises(AttributeError):  # control
        AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    assert mark.exists()


def npy(seed) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.random.default_rng(seed).random((3, 4 + seed), dtype=np.float32))
    return stream.getvalue()


def grey_png(seed) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


MAPS = [[npy(1)], [grey_png(2), npy(3)], [], [npy(1)]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_saliency_maps_are_stored(kind, stage, tmp_path):
    """One map per image, by path or as bytes, each content once; only rows that have them get them."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [row | {"attention": maps} for row, maps in zip(ROWS, MAPS)]
    rows[3]["attention"] = None
    if kind == "jsonl":
        for row in rows:
            for column, suffix in (("images", "png"), ("attention", "map")):
                names = [f"{hashlib.md5(content).hexdigest()}.{suffix}" for content in row[column] or []]
                for name, content in zip(names, row[column] or []):
                    (folder / name).write_bytes(content)
                row |= {column: None if row[column] is None else names}
        source = folder / "set.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        source = folder / "set.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    output = stage(source, "data.saliency_key=attention")
    prompts = read_jsonl(output / "prompts.jsonl", Prompt)
    assert [[(output / name).read_bytes() for name in prompt.saliency] for prompt in prompts] == [*MAPS[:3], []]
    for name in (name for prompt in prompts for name in prompt.saliency):
        stem, suffix = name.removeprefix("saliency/").split(".")
        content = (output / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == stem and suffix == (
            "npy" if content.startswith(b"\x93NUMPY") else "png"
        )
    assert read_manifest(output).counts["saliency_maps"] == 3 == len(list((output / "saliency").iterdir()))
    assert read_manifest(output).counts["images"] == 3
    # Under another column name they are not seen.
    other = stage(source, output="other")
    assert not (other / "saliency").exists() and all(
        prompt.saliency == [] for prompt in read_jsonl(other / "prompts.jsonl", Prompt)
    )


SEMANTIC = ["masked_image.strategy=semantic", "evaluation.masked_images=false"]


def test_semantic_masking_asks_for_maps_here(stage, tmp_path):
    """Before a rollout is sampled: of the set that will be masked, and also when the data was made for another
    strategy."""
    rows = [{"problem": "?", "answer": "1"}, {**GOOD, "saliency": ["good.npy"]}, GOOD]
    (tmp_path / "good.png").write_bytes(png(56, 56))
    (tmp_path / "good.npy").write_bytes(npy(1))
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    needs = "no saliency map in column saliency, which masked_image.strategy semantic needs"
    with pytest.raises(UserError, match=f"set.jsonl:3: {needs}"):
        stage(tmp_path / "set.jsonl", *SEMANTIC)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    with pytest.raises(UserError, match=f"synthetic evaluation:1: {needs}"):
        stage("unused", "masked_image.strategy=semantic", output="set", evaluation_set="evaluation")
    stage("unused", *SEMANTIC, output="set", evaluation_set="evaluation")  # control: it is not masked
    with pytest.raises(UserError, match="prompts.jsonl:1: prompt .*no saliency map"):
        stage("unused", "masked_image.strategy=semantic", output="set", evaluation_set="evaluation")
    stage(tmp_path / "set.jsonl", "data.train.count=2", *SEMANTIC, output="two")  # nothing to be masked lacks a map
    output = stage(tmp_path / "set.jsonl")
    with pytest.raises(UserError, match="prompts.jsonl:3: prompt set-3: image images/.*png: no saliency map"):
        stage(tmp_path / "set.jsonl", *SEMANTIC)
    # Where nothing is masked, or the maps are there, the strategy is no part of what stage 1 makes.
    stage(tmp_path / "set.jsonl", *SEMANTIC, "objective.kl_prcp_coef=0", "objective.masked_image_entropy_coef=0")
    fingerprint = read_manifest(output).fingerprint
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    with_maps = [
        read_manifest(stage(tmp_path / "set.jsonl", *more, output="with_maps")).fingerprint for more in (SEMANTIC, [])
    ]
    assert with_maps[0] == with_maps[1] != fingerprint


CONVERTED = "convert it: .venv/bin/python -c \"import datasets; datasets.load_dataset\\('{}', data_files='"


def test_bad_files_are_named(stage, tmp_path):
    (tmp_path / "cut.jsonl").write_text(json.dumps({"problem": "?", "answer": "1"}) + '\n{"problem": "tr')
    whole = write_parquet(tmp_path / "whole.parquet", ROWS)
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-40])
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "data.jsonl.gz").write_bytes(b"")
    (tmp_path / "array.jsonl").write_text(json.dumps([ROWS[2]], indent=1))
    (tmp_path / "empty").mkdir()
    for folder, name in (("saved", "dataset_info.json"), ("other", "rows.csv")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
    for source, message in {
        "cut.jsonl": "cut.jsonl:2: not JSON",
        "cut.parquet": "cannot be read as parquet",
        "data.csv": "expected .jsonl or .parquet: " + CONVERTED.format("csv"),
        "data.json": "expected .jsonl or .parquet: " + CONVERTED.format("json"),
        "data.jsonl.gz": "expected .jsonl or .parquet: " + CONVERTED.format("json"),
        "array.jsonl": "array.jsonl:1: .* not an object per line: " + CONVERTED.format("json"),
        "saved": "made by save_to_disk.*load_from_disk",
        "other": "no .jsonl or .parquet file in this directory: " + CONVERTED.format("csv"),
        "empty": "no .jsonl or .parquet file",
        "none.jsonl": "no such file or directory",
        "https://example.org/set.jsonl": "no such file or directory",
    }.items():
        with pytest.raises(UserError, match=message):
            stage(source if "://" in source else tmp_path / source)


def test_bad_template_system_prompt_and_model(stage, tmp_path, tiny_hf):
    source = write_jsonl(tmp_path / "data" / "set.jsonl", ROWS)
    with pytest.raises(UserError, match="data.system_prompt contains the control token <|im_end|>".replace("|", r"\|")):
        stage(source, "data.system_prompt='a<|im_end|>'")
    with pytest.raises(UserError, match="tokenizer.json: cannot be read"):
        stage(source, f"model.path={tmp_path}")
    text_model = tmp_path / "text_model"
    shutil.copytree(tiny_hf, text_model)
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        text = (text_model / file).read_text()
        (text_model / file).write_text(text.replace("<|vision_start|><|image_pad|><|vision_end|>", ""))
    with pytest.raises(UserError, match="set.jsonl:1: the chat template made 0"):
        stage(source, f"model.path={text_model}")


def test_rerun_is_skipped_and_a_changed_input_refused(stage, tmp_path, capsys):
    source = write_jsonl(tmp_path / "data" / "set.jsonl", ROWS)
    output = stage(source)
    before = (output / "manifest.json").read_bytes()
    stage(source)
    assert "nothing to do" in capsys.readouterr().out and (output / "manifest.json").read_bytes() == before
    source.write_text(source.read_text().replace('"yes"', '"no"'))
    with pytest.raises(UserError, match="inputs.train"):
        stage(source)


def test_hugging_face_data_set_is_read_undecoded():
    """A table as datasets.load_dataset returns it, with decoded pictures, in both spellings of the column."""
    import datasets

    from megatron_papo.data.rows import undecoded

    content = [{"bytes": png(20, 30, seed), "path": None} for seed in (1, 2)]
    for feature, value in ((datasets.List(datasets.Image()), content), (datasets.Image(), content[0])):
        table = datasets.Dataset.from_dict({"problem": ["?"], "images": [value]})
        table = table.cast_column("images", feature)
        assert "PIL" in str(type(table[0]["images"][0] if isinstance(value, list) else table[0]["images"]))
        assert next(iter(undecoded(table, "images")))["images"] == value
        assert next(iter(undecoded(table, "saliency", "images")))["images"] == value
        assert next(iter(undecoded(table, "saliency")))["images"] != value  # control: another column stays decoded


def test_unreachable_hugging_face_data_set(stage, tmp_path):
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(
        UserError,
        match="someone/no-such-data: no such file, and the Hugging Face data set of this name cannot be loaded",
    ):
        stage("someone/no-such-data")
    assert not (tmp_path / "out.partial").exists()


def test_an_error_as_the_user_sees_it(tmp_path):
    """One line, exit status 2, nothing half-written."""
    overrides = settings("sft=null", "data.sft=null", f"model.path={tmp_path / 'model'}")
    result = run_module("stages.stage1_prepare_data", "--config", DEMO_CONFIG, "--output", tmp_path / "out", *overrides)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {tmp_path / 'model'}: no such directory. Names of the Hugging Face hub are not taken:"
        " .venv/bin/python -m tools.prefetch --config FILE downloads the model and says what to set model.path to\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_set_is_one_of_the_configuration(stage, tmp_path):
    with pytest.raises(UserError, match="--evaluation-set mmk12: there is evaluation"):
        stage("unused", evaluation_set="mmk12")
    assert not (tmp_path / "out").exists()
    output = stage("unused", evaluation_set="evaluation")
    assert [len(read_jsonl(file, Prompt)) for file in output.glob("*.jsonl")] == [2]
    (tmp_path / "set.jsonl").write_text(json.dumps({"problem": "?", "answer": "1"}) + "\n")
    with pytest.raises(UserError, match="made from something else .*differs in"):
        stage(tmp_path / "set.jsonl")  # the training data are another output


def conversation(answer="1", problem="<image>How many?", images=("./data/images/s/1.png",)):
    turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": list(images)}


@pytest.fixture
def released(tmp_path):
    """Writes a set as the authors' release has it -> the setting that names it `verse`."""

    def write(rows, pictures=("1.png",), **keys):
        directory = tmp_path / "release"
        directory.mkdir(exist_ok=True)
        (directory / "S.json").write_text(json.dumps(rows))
        with zipfile.ZipFile(directory / "S_images.zip", "w") as archive:
            for number, name in enumerate(pictures):
                archive.writestr(f"images/s/{name}", png(56, 84, number))
        keys = {
            "form": "messages",
            "split": "S",
            "image_archive": "S_images.zip",
            "prompt_template": "{problem}",
        } | keys
        return "evaluation.benchmarks.verse=" + json.dumps({"source": str(directory), **keys})

    return write


def test_a_set_of_a_suite_becomes_prompts_of_problems(stage, released):
    rows = [conversation(str(number // 2), f"<image>Version {number % 2}") for number in range(4)]
    suite = released(rows, problem_by="block:2", problems_of=None)
    output = stage("unused", suite, output="set", evaluation_set="verse")
    prompts = read_jsonl(output / "prompts.jsonl", Prompt)
    assert [prompt.problem_id for prompt in prompts] == ["verse/1", "verse/1", "verse/2", "verse/2"]
    assert [prompt.id for prompt in prompts] == ["S-1", "S-2", "S-3", "S-4"]
    assert read_manifest(output).counts == {"verse": 4, "verse_dropped_overlong": 0, "images": 1}
    assert stage("unused", suite, output="set", evaluation_set="verse") == output  # done already: the same content
    released([*rows[:3], conversation("1", "<image>Other")])
    with pytest.raises(UserError, match="made from something else .*differs in"):
        stage("unused", suite, output="set", evaluation_set="verse")


def test_options_reach_the_prompts(stage, tmp_path):
    row = {
        "question": "How?",
        "option": "A. 3; B. 4",
        "answer": "B",
        "image_path": {"bytes": png(56, 84), "path": None},
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "testmini.parquet")
    suite = {"source": str(tmp_path / "testmini.parquet"), "form": "we_math", "grading": "choice"}
    output = stage("unused", f"evaluation.benchmarks.w={json.dumps(suite)}", output="set", evaluation_set="w")
    [prompt] = read_jsonl(output / "prompts.jsonl", Prompt)
    assert (prompt.options, prompt.answer) == (["3", "4"], "B")
    assert prompt.problem == "<image>How?\nChoices:\n(A) 3\n(B) 4"


def test_all_that_is_wrong_with_a_set_of_a_suite_is_said_at_once(stage, released, tmp_path):
    rows = [
        conversation(),
        conversation(answer=["1"]),
        conversation(answer=1),
        conversation(answer=""),
        conversation(images=()),
        conversation(images=("./data/images/s/gone.png",)),
        conversation(images=("./data/../../secret.png",)),
    ]
    with pytest.raises(UserError) as error:
        stage("unused", released(rows), output="set", evaluation_set="verse")
    lines = [line.replace(f"{tmp_path}/release/", "") for line in error.value.lines]
    assert [line[:9] for line in lines[:6]] == [f"S.json:{number}:" for number in range(2, 8)]
    for line, expected in zip(
        lines,
        [
            "expected a text", "expected a text", "expected a text", "0 images for 1 <image> places",
            "S_images.zip: image images/s/gone.png: not in this archive", "a name that leads out of the archive",
            "evaluation.benchmarks.verse: 6 of 7 rows cannot be used",
        ],
        strict=True,
    ):  # fmt: skip
        assert expected in line
    assert not (tmp_path / "set").exists()


def test_an_instruction_is_not_given_twice(stage, released):
    suite = released(
        [conversation(problem="<image>How many?\nThink first. \n")], prompt_template="{problem}\nThink first."
    )
    with pytest.raises(
        UserError, match="the problem ends with the instruction that prompt_template adds: set the set's"
    ):
        stage("unused", suite, output="set", evaluation_set="verse")
    verbatim = released([conversation(problem="<image>How many?\nThink first. \n")])
    stage("unused", verbatim, output="verbatim", evaluation_set="verse")
    stripped = released([conversation()], prompt_template="{problem}\nThink first.")
    stage("unused", stripped, output="added", evaluation_set="verse")


def test_what_a_suite_needs_is_not_there(stage, released, tmp_path):
    suite = released([conversation()], image_archive="gone.zip", split="T")
    with pytest.raises(UserError) as error:
        stage("unused", suite, output="set", evaluation_set="verse")
    assert "no table of split T" in error.value.lines[0] and "no archive gone.zip" in error.value.lines[1]
    suite = released([conversation()])
    (tmp_path / "release" / "S_images.zip").write_bytes(b"<html>")
    with pytest.raises(UserError, match="S_images.zip: damaged .BadZipFile"):
        stage("unused", suite, output="set", evaluation_set="verse")


def test_the_demo_through_the_command_line(demo_data, evaluation_data, tiny_hf):
    assert read_manifest(demo_data).counts == {
        "train": 64, "train_dropped_overlong": 0, "sft": 64, "sft_dropped_overlong": 0, "images": 128,
    }  # fmt: skip
    assert read_manifest(evaluation_data).counts == {
        "evaluation": 32, "evaluation_dropped_overlong": 0, "images": 32,
    }  # fmt: skip
    files = [demo_data / "prompts.jsonl", demo_data / "sft.jsonl", evaluation_data / "prompts.jsonl"]
    prompts = [read_jsonl(file, Prompt) for file in files]
    assert [len(each) for each in prompts] == [64, 64, 32]
    assert {prompt.num_tokens for each in prompts for prompt in each} == {20}
    assert not (evaluation_data / "model").exists() and not (evaluation_data / "sft.jsonl").exists()
    sha256 = hashlib.sha256((tiny_hf / "tokenizer.json").read_bytes()).hexdigest()
    assert [(output / "tokenizer.sha256").read_text().strip() for output in (demo_data, evaluation_data)] == [
        sha256
    ] * 2

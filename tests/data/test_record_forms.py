"""Rows of the authors' release and of the sets' own pages, as their public descriptions have them, and bad ones."""

import json

import hypothesis
import pyarrow
import pytest
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_papo.config import BenchmarkConfig, DataConfig, PromptSource
from megatron_papo.data.record_forms import FORMS, python_texts, read_item
from megatron_papo.data.rows import BadRow, read_rows
from megatron_papo.errors import UserError

PNG = b"a picture"
PICTURE = {"bytes": PNG, "path": None}
PROBLEM = "<image>Find x.\n\nYou first think through ... within \\boxed{}."


def messages(answer="5", problem=PROBLEM, images=("./data/images/a/1.png",), **more):
    turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": list(images), **more}


GOOD = {
    "messages": (messages(id="7"), (PROBLEM, "5", ["images/a/1.png"], [])),
    "messages, white space kept": (messages(problem="\n<image> \n"), ("\n<image> \n", "5", ["images/a/1.png"], [])),
    "geometry3k": (
        {"problem": "<image>Find x.", "answer": "5", "images": [PICTURE]},
        ("<image>Find x.", "5", [PNG], []),
    ),
    "mathvista, one of several": (
        {"question": "Which?", "choices": ["1/2", "2/3"], "answer": "2/3", "decoded_image": PICTURE, "unit": None},
        ("<image>Which?\nChoices:\n(A) 1/2\n(B) 2/3", "B", [PNG], ["1/2", "2/3"]),
    ),
    "mathvista, free": (
        {"question": "How long?", "choices": None, "answer": "1.2", "decoded_image": PICTURE, "unit": "cm"},
        ("<image>How long? (Unit: cm)", "1.2", [PNG], []),
    ),
    "mathverse": (
        {"question": "As shown\nChoices:\nA:10°\nB:20°", "answer": "B", "image": PICTURE, "question_for_eval": None},
        ("<image>As shown\nChoices:\nA:10°\nB:20°", "B", [PNG], ["10°", "20°"]),
    ),
    "mathverse, vision only": (
        {"question": "", "answer": "B", "image": PICTURE, "question_for_eval": "So\nChoices:\nA:10°\nB:20°"},
        ("<image>Answer the question in the picture.", "B", [PNG], ["10°", "20°"]),
    ),
    "mathverse, free": (
        {"question": "A: is a point. How far?", "answer": "10", "image": PICTURE},
        ("<image>A: is a point. How far?", "10", [PNG], []),
    ),
    "logicvista": ({"question": "Next?", "answer": "A, C", "image": PICTURE}, ("<image>Next?", "A, C", [PNG], [])),
    "we_math": (
        {"question": "How?", "option": "A. 3; B. 4; 5; C. none; ", "answer": "C", "image_path": PICTURE},
        ("<image>How?\nChoices:\n(A) 3\n(B) 4; 5\n(C) none", "C", [PNG], ["3", "4; 5", "none"]),
    ),
    "mmmu_pro": (
        {"question": "<image 2> or <image 1>?", "options": "['<image 3>', \"it's\"]", "answer": "B",
         "image_1": {"bytes": b"1"}, "image_2": {"bytes": b"2"}, "image_3": {"bytes": b"3"}},
        ("<image> or <image>?\nChoices:\n(A) <image>\n(B) it's", "B", [b"2", b"1", b"3"], ["<image 3>", "it's"]),
    ),
    "mmmu_pro, without a place": (
        {"question": "What?", "options": ["x", "y"], "answer": "A", "image_1": PICTURE, "image_2": None},
        ("<image>What?\nChoices:\n(A) x\n(B) y", "A", [PNG], ["x", "y"]),
    ),
    "mmmu_pro, vision": (
        {"image": PICTURE, "options": "['x', 'y']", "answer": "B"},
        ("<image>Answer the question in the picture.", "B", [PNG], ["x", "y"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_each_form(case):
    row, (problem, answer, images, options) = GOOD[case]
    item = read_item(case.partition(",")[0], row)
    assert (item.problem, item.answer, list(item.images), list(item.options)) == (problem, answer, images, options)


def test_every_form_has_a_case_and_its_name_is_one_of_the_schema():
    assert {case.partition(",")[0] for case in GOOD} == FORMS.keys()
    for form in FORMS:
        BenchmarkConfig(source="x", form=form)
    with pytest.raises(ValueError, match="form"):
        BenchmarkConfig(source="x", form="mathvisto")


BAD = {
    "a list": (messages(answer=["5"]), "the answer (the assistant's content) is \"['5']\""),
    "a number": (messages(answer=5), "the answer (the assistant's content) is '5'"),
    "nothing": (messages(answer=None), "the answer (the assistant's content) is 'None'"),
    "empty": (messages(answer=" \n"), "the answer (the assistant's content) is"),
    "half a character": (messages(answer="\ud800"), "not valid Unicode"),
    "no question": (messages(problem=""), "the user's content is"),
    "no image": (messages(images=()), "0 images for 1 <image> places"),
    "two images": (messages(images=("a", "b")), "2 images for 1 <image> places"),
    "images of None": (messages(images=(None,)), "images[0]: expected a path"),
    "no column": ({"problem": "x", "answer": "y"}, "messages is 'None', expected the turns"),
    "a text": ({"messages": "x"}, "messages is \"'x'\", expected the turns"),
    "turns of texts": ({"messages": ["x", "y"]}, "expected the turns"),
    "three turns": ({"messages": [*messages()["messages"], {"role": "user", "content": "x"}]}, "expected user and"),
    "the wrong way round": ({"messages": messages()["messages"][::-1]}, "expected user and assistant"),
    "a system's turn alone": ({"messages": [{"role": "system", "content": "x"}]}, "expected user and assistant"),
    "we_math: no letter": (
        {"question": "x", "option": "3; 4", "answer": "A", "image_path": PICTURE}, "option is \"'3; 4'\""),
    "we_math: one without a letter": (
        {"question": "x", "option": "3; A. 4", "answer": "A", "image_path": PICTURE}, "expected A. ...; B. ..."),
    "we_math: letters that skip": (
        {"question": "x", "option": "A. 3; C. 4", "answer": "A", "image_path": PICTURE}, "expected A. ...; B. ..."),
    "we_math: a letter without an option": (
        {"question": "x", "option": "A. 3; B. 4", "answer": "C", "image_path": PICTURE},
        "the answer is \"'C'\", the options go from A to B"),
    "we_math: two letters": (
        {"question": "x", "option": "A. 3; B. 4", "answer": "AB", "image_path": PICTURE}, "go from A to B"),
    "mathvista: an answer that is no choice": (
        {"question": "x", "choices": ["1", "2"], "answer": "3", "decoded_image": PICTURE}, "is none of the choices"),
    "mathvista: choices of numbers": (
        {"question": "x", "choices": [1, 2], "answer": "1", "decoded_image": PICTURE}, "choices is '[1, 2]'"),
    "mathvista: no picture": (
        {"question": "x", "choices": None, "answer": "1", "decoded_image": None}, "0 pictures, expected one"),
    "mathverse: a letter without an option": (
        {"question": "x\nA: 1\nB: 2", "answer": "D", "image": PICTURE}, "go from A to B"),
    "logicvista: a number": ({"question": "x", "answer": 3, "image": PICTURE}, "answer is '3', expected a text"),
    "mmmu_pro: code": (
        {"question": "x", "options": "__import__('os')", "answer": "A", "image_1": PICTURE}, "a list of texts"),
    "mmmu_pro: half a surrogate pair in an option": (
        {"question": "x", "options": ["a\ud83d", "b"], "answer": "A", "image_1": PICTURE},
        "an option is not valid Unicode",
    ),
    "mmmu_pro: no options": ({"question": "x", "options": "[]", "answer": "A", "image_1": PICTURE}, "options is empty"),
    "mmmu_pro: more than letters": (
        {"question": "x", "options": ["y"] * 27, "answer": "A", "image_1": PICTURE}, "27 texts, more than"),
    "mmmu_pro: a picture that is not there": (
        {"question": "<image 2>", "options": ["y"], "answer": "A", "image_1": PICTURE}, "no image_2 for its <image 2>"),
    "geometry3k: no answer": ({"problem": "x", "images": [PICTURE]}, "no answer (there are: problem, images)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_one_line(case):
    row, expected = BAD[case]
    with pytest.raises(UserError) as error:
        read_item(case.partition(":")[0] if ":" in case else "messages", row)
    [line] = error.value.lines
    assert without_quotes(expected) in without_quotes(line)


def without_quotes(text: str) -> str:
    return text.replace("'", "").replace('"', "")


TEXTS = ["", "it's", 'a "quoted" one', "\\frac{1}{2}", "tab\tnewline\n", "é \u2264", "both ' and \"", "[x, y]", "a,"]


def test_lists_of_python_are_read_as_python_writes_them():
    assert python_texts(repr(TEXTS)) == TEXTS
    assert python_texts(repr([])) == []
    assert python_texts(" ['a' , 'b',] ") == ["a", "b"]
    assert python_texts("['\\x41\\u00e9']") == ["Aé"]


@pytest.mark.parametrize(
    "text", ["['a' 'b']", "[1]", "['a', None]", "('a',)", "['a'", "['a',,'b']", "[open('x')]", "['a'].x", "", None, 3]
)
def test_what_is_no_list_of_texts_is_refused(text):
    with pytest.raises(UserError, match="expected a list of texts"):
        python_texts(text)


def config() -> DataConfig:
    source = PromptSource(source="synthetic")
    return DataConfig(train=source, sft=None, min_pixels=3136, max_pixels=1003520, max_prompt_tokens=512)


def read(path, **keys):
    keys = {"form": "messages", "split": "S"} | keys
    return list(read_rows(BenchmarkConfig(source=str(path), **keys), config(), with_target=False))


def test_all_bad_rows_of_a_set_come_out_and_the_good_ones_between(tmp_path):
    rows = [messages(), messages(answer=["5"]), messages(answer="6"), {"messages": None, "images": None}]
    (tmp_path / "S.json").write_text(json.dumps(rows))
    found = read(tmp_path)
    assert [type(row).__name__ for row in found] == ["SourceRow", "BadRow", "SourceRow", "BadRow"]
    assert found[1].place == f"{tmp_path}/S.json:2" and "expected a text" in found[1].problem
    assert (found[0].id, found[2].id, found[2].answer) == ("S-1", "S-3", "6")


def test_parquet_and_json_of_a_set_are_the_same_rows(tmp_path):
    rows = [messages(id=str(number), answer=str(number)) for number in range(40)]
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "S.json").write_text("\ufeff" + json.dumps(rows))
    (tmp_path / "table" / "data").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table" / "data" / "S-00000-of-00001.parquet")

    def content(row):
        return row.id, row.problem, row.answer, row.images, row.options

    as_json, as_table = read(tmp_path / "json"), read(tmp_path / "table")
    assert list(map(content, as_json)) == list(map(content, as_table)) and len(as_json) == 40
    assert len(read(tmp_path / "json", count=7)) == 7


JSON = {
    "[{}": "S.json: not JSON",
    "{": "S.json:1: an array or JSON of several lines, not an object per line",
    '{"messages": []}': "S.json:1: messages has the turns [], expected user and assistant",
    " \n [1]": "S.json:1: expected a JSON object with the columns of a row",
    '[{"a": 1, "a": 2}]': "S.json: an object has a key twice among a, a",
    "[" * 100_000: "S.json: nested too deeply",
    "\x1f\x8b": "S.json:1: not JSON",
}


@pytest.mark.parametrize("text", JSON)
def test_json_that_is_no_rows(tmp_path, text):
    (tmp_path / "S.json").write_text(text)
    try:
        [row] = read(tmp_path)
        assert isinstance(row, BadRow)
        line = f"{row.place}: {row.problem}"
    except UserError as error:
        [line] = error.lines
    assert line.startswith(f"{tmp_path}/{JSON[text]}")


def test_json_may_be_an_array_or_lines(tmp_path):
    rows = [messages(answer=str(number)) for number in range(3)]
    for text in (json.dumps(rows), "\ufeff \n" + json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))):
        (tmp_path / "S.json").write_text(text)
        assert [row.answer for row in read(tmp_path)] == ["0", "1", "2"]
    (tmp_path / "S.json").write_text("")
    assert read(tmp_path) == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.binary(max_size=4)
    | st.sampled_from(["A", "['x', 'y']", "A. 1; B. 2", "<image>", "<image 1>", "<image 9>", "user", "\ud800", "(A)"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "bytes", "path", "x"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=25)
def test_whatever_a_row_holds_it_is_an_item_or_one_line(form, data):
    columns = st.sampled_from([*FORMS[form].columns, "other"])
    row = data.draw(st.dictionaries(columns, VALUES, max_size=8))
    good = {name: value for case, (row, _) in GOOD.items() if case.startswith(form) for name, value in row.items()}
    if data.draw(st.booleans()):
        row = good | row
    try:
        item = read_item(form, row)
    except UserError as error:
        assert len(error.lines) == 1 and len(str(error)) < 1000
    else:
        assert item.problem.strip() and item.answer.strip()
        assert item.problem.count("<image>") in (0, len(item.images))
        assert all(isinstance(image, (str, bytes)) for image in item.images)

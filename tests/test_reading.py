"""Whatever a reader of outside input raises is one line; what it quotes is shown, not obeyed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_papo.errors import UserError
from megatron_papo.reading import read_json, reading, shown


class PanicException(BaseException):
    """As tokenizers and safetensors raise it."""


def deep() -> None:
    deep()


def test_whatever_a_reader_raises_is_one_line_with_file_and_cure(tmp_path):
    def raises(error):
        raise error

    faults = [
        lambda: (tmp_path / "missing").read_bytes(),
        lambda: (tmp_path).read_bytes(),
        lambda: b"\xff".decode(),
        lambda: json.loads("["),
        deep,
        lambda: raises(PanicException("called `Result::unwrap()` on an `Err` value")),
        lambda: raises(KeyError("weight_map")),
        lambda: raises(ValueError("first\nerror: second \x1b[2J")),
        lambda: raises(MemoryError()),
    ]
    for fault in faults:
        with pytest.raises(UserError) as caught, reading("FILE", "copy it again"):
            fault()
        (line,) = caught.value.lines
        assert line.startswith("FILE: ") and line.endswith(": copy it again") and line.isprintable()


@pytest.mark.parametrize("mine", [UserError("a", "b"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_fault_of_the_input_passes(mine):
    with pytest.raises(type(mine)) as caught, reading("FILE", "copy it again"):
        raise mine
    assert caught.value is mine


@given(st.text(alphabet=st.characters(), max_size=400))
def test_shown_text_is_printable_short_and_one_line(text):
    line = shown(text)
    assert line.isprintable() and "\n" not in line
    if text.isprintable() and len(text) <= 160:
        assert line == text


def test_a_lone_surrogate_is_shown():
    shown("na\udce9").encode("utf-8")


@pytest.mark.parametrize(
    "content", ["[]", "1", "null", "{", '{"a": NaN}', '{"a": -Infinity}', "[" * 100_000, "\xff", "\xef\xbb\xbf{}"]
)
def test_json_that_is_no_object_of_numbers_is_refused(tmp_path, content):
    file = tmp_path / "x.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="x.json: .*: make it again"):
        read_json(file, "make it again")

"""Nothing that a response or an answer holds is executed; what is arithmetic is read as sympy reads it."""

import random
import string
import tempfile
from pathlib import Path

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_papo.config import RewardConfig
from megatron_papo.rollout import grading
from megatron_papo.rollout.grader_process import GraderProcess
from megatron_papo.rollout.grading import RIGHT, WRONG
from megatron_papo.rollout.rewards import Grader
from megatron_papo.rollout.safe_parser import parse_expression, surely_not_zero

ROMAN_C, ROMAN_D, ROMAN_I = "\u217d", "\u217e", "\u2170"
"""No letters for isalpha(), so that mathruler's guard does not count them; Python reads them as c, d and i."""
OUTSIDE = ("\\frac{1}{2}", "0.5", "A", "x/2", "\\pi")


def spelled(text: str, name: str) -> str:
    """An expression without quotes whose value, under eval, is `text`: its characters are picked from a docstring."""
    doc = sympy.sqrt.__doc__
    return "+".join(
        f"{name}.__{'do' if name != 'sqrt' else ROMAN_D + 'o'}{ROMAN_C}__[{doc.find(letter)}]" for letter in text
    )


def attacks(mark) -> list[str]:
    """Texts that create the file `mark` if anything evaluates them."""
    code = f"open({str(mark)!r},'w')"
    return [
        f"frac({spelled(code, 'sqrt')})",
        f"sqrt({spelled(code, 'sqrt')})",
        f"frac(open({str(mark)!r}, 'w'))",
        f"open({str(mark)!r}, 'w')",
        f"exe{ROMAN_C}({code!r})",
        f"Symbol({code!r})",
        f"sqrt({code!r})",
        f"Number({code!r})",
        f"Float({code!r})",
        f"[x for x in [open({str(mark)!r},'w')]]",
        f"(lambda: open({str(mark)!r},'w'))()",
        f"__{ROMAN_I}mport__('os').system('touch {mark}')",
        f"x.__class__.__base__.__subclasses__()[0]({str(mark)!r})",
        f"f'{{open({str(mark)!r}, \"w\")}}'",
        f"(x:=open({str(mark)!r},'w'))",
        f"'{{0.__class__}}'.format(open({str(mark)!r},'w'))",
        f"\uff4fpen({str(mark)!r},'w')",
        f"{{open({str(mark)!r},'w') for x in (1,)}}",
        f"x if open({str(mark)!r},'w') else y",
        f"sqrt(x, evaluate=open({str(mark)!r},'w'))",
        f"sqrt(*[open({str(mark)!r},'w')])",
        f"(yield open({str(mark)!r},'w'))",
        f"\\sqrt{{open({str(mark)!r},'w')}}",
        f"\\text{{open({str(mark)!r},'w')}}/2",
        f"\\input{{{mark}}}",
    ]


@pytest.fixture
def mark():
    """A path all of whose characters stand in sympy.sqrt's docstring."""
    place = Path(tempfile.mkdtemp(prefix="graded-", dir="/tmp"))
    path = Path("/tmp") / "".join(letter for letter in place.name if letter in sympy.sqrt.__doc__ and letter.isalnum())
    path.unlink(missing_ok=True)
    yield path
    path.unlink(missing_ok=True)
    place.rmdir()


def test_a_text_that_would_run_under_eval_does_not_run_here(mark):
    code = f"open({str(mark)!r},'w')"
    evaluated = eval(f"eval({spelled(code, 'sqrt')})", {"sqrt": sympy.sqrt})  # the control: this text does what it says
    evaluated.close()
    assert mark.exists()
    mark.unlink()
    for text in attacks(mark):
        try:
            parse_expression(text)
        except Exception:  # sympy's tokeniser, the syntax or the walk refuses it: all the same
            pass
        assert not mark.exists(), text


def test_nothing_runs_as_a_response_or_as_an_answer(mark):
    pairs = [(f"\\boxed{{{text}}}", answer) for text in attacks(mark) for answer in OUTSIDE]
    pairs += [(f"\\boxed{{{answer}}}", text) for text in attacks(mark) for answer in OUTSIDE]
    with Grader(RewardConfig(time_limit_seconds=20.0)) as grader:
        rewards = [grader.result(one) for one in [grader.submit(response, answer, False) for response, answer in pairs]]
        later = grader.result(grader.submit("\\boxed{x/3}", "x/2", False))
    assert not mark.exists()
    assert not any(reward.accuracy for reward in rewards)
    assert later.accuracy == 0  # and the grader was not replaced by one that says yes


PIECES = [
    *"xy()[]{}'\"`_^+-*/!%=<>,.;:@#\\&$| \n\t\0",
    "sqrt",
    "frac",
    "\\frac{",
    "\\sqrt{",
    "\\text{",
    "\\pi",
    "\\left(",
]
PIECES += [
    "**",
    "//",
    ":=",
    "lambda",
    " for x in ",
    " if ",
    " else ",
    "f'{",
    "__class__",
    "open('/')",
    "exec",
    "import os",
]
PIECES += [
    ROMAN_C,
    ROMAN_D,
    ROMAN_I,
    "\uff45\uff56\uff41\uff4c",
    "\u0663",
    "\u00b2",
    "\u00bd",
    "\u202e",
    "\ud800",
    "\ufb01",
]
PIECES += [
    "0x1f",
    "1e9",
    "1e999999999",
    "1j",
    "1_0",
    "9" * 50,
    "9**9",
    "0.1[3]",
    "Symbol",
    "Function",
    "Float",
    "N",
    "S",
]
PIECES += [
    "None",
    "nan",
    "oo",
    "zoo",
    " or ",
    "million",
    "degree",
    "(" * 60,
    ")" * 60,
    "\\begin{array}",
    "\\end{array}",
]
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@pytest.fixture(scope="module")
def process():
    process = GraderProcess(time_limit_seconds=20.0)
    yield process
    process.stop()


@settings(max_examples=400, deadline=None)
@given(content=texts, answer=texts | st.sampled_from(OUTSIDE))
def test_any_text_is_right_or_wrong(process, content, answer):
    """As a response or as an answer: nothing raises, nothing takes long."""
    assert process.ask(content, answer) in (RIGHT, WRONG)


def test_a_value_far_from_zero_is_not_simplified_and_zero_is():
    """What saves the search for a proof must never change a grade: each of these is 0, or is not, by hand."""
    zero = [
        "x-x",
        "(x+1)**2-x**2-2*x-1",
        "sqrt(8)-2*sqrt(2)",
        "sqrt(x**2)-x",
        "0.5-1/2",
        "0.1+0.2-0.3",
        "ln(x*y)-ln(x)-ln(y)",
    ]
    zero += ["(x**2-1)/(x-1)-x-1", "5!-120", "oo-oo", "f(x)-f(x)", "x*10**30-x*10**30", "pi-3.14159265358979"]
    assert [text for text in zero if surely_not_zero(parse_expression(text))] == []
    other = ["x-y", "x/2-x/3", "sqrt(2)-1.41", "pi-22/7", "(x+1)**2-x**2-1", "10**30-10**30-1"]
    assert [text for text in other if not surely_not_zero(parse_expression(text))] == []


def test_mathruler_by_itself_would_run_it(mark):
    """The control: with sympy's own parser the same grading executes the response."""
    import mathruler.grader

    original = sympy.parsing.sympy_parser.parse_expr
    text = attacks(mark)[0]
    grading.is_correct(f"\\boxed{{{text}}}", "0.5")
    assert not mark.exists()
    ours = mathruler.grader._sympy_parse
    mathruler.grader._sympy_parse = lambda expr: original(expr.replace("^", "**"))
    try:
        mathruler.grader.grade_answer(text, "0.5")
        assert mark.exists()
    finally:
        mathruler.grader._sympy_parse = ours


def test_arithmetic_is_read_as_sympy_reads_it():
    from sympy.parsing import sympy_parser

    rules = sympy_parser.standard_transformations + (sympy_parser.implicit_multiplication_application,)
    atoms = [
        "x",
        "y",
        "2",
        "0.5",
        "pi",
        "sqrt(2)",
        "sqrt(x)",
        "e",
        "ln(x)",
        "oo",
        "(x+1)",
        "f(x)",
        "5!",
        "1/3",
        "2x",
        "x(2)",
        "3(4)",
        "re(x)",
        "zoo",
        "0.1[3]",
        "xy",
        "sqrt2",
        "2sqrt3",
        "4pi",
        "frac(1/2)",
    ]
    draw = random.Random(1)
    texts = {
        "".join(draw.choice(atoms) + draw.choice(["+", "-", "*", "/", "", " "]) for _ in range(2)) + draw.choice(atoms)
        for _ in range(150)
    }
    expected, found = [], []
    for text in sorted(texts):
        try:
            expected.append(sympy.srepr(sympy_parser.parse_expr(text, transformations=rules)))
        except (TypeError, SyntaxError, AttributeError):
            continue
        found.append(sympy.srepr(parse_expression(text)))
    assert found == expected and len(found) > 100


def test_letters_alone_are_symbols():
    assert {str(symbol) for symbol in parse_expression("*".join(string.ascii_lowercase[:4])).free_symbols} == set(
        "abcd"
    )

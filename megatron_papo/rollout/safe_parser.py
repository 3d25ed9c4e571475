"""sympy's parser without its eval: the text of a response or an answer becomes an expression, and never runs.

sympy.parse_expr tokenises its input, rewrites the tokens (implicit multiplication, numbers, symbols) and hands the
result to Python's eval with every built-in function in reach. Here the rewritten text is parsed into a syntax tree and
walked: arithmetic, numbers, symbols and sympy's own functions and constants. Everything else (attributes, subscripts,
strings, lambdas, comparisons, any other name) is refused. So is what no answer needs and what takes a computer long:
before sympy sees it where the text shows it, else before the operation that would.
"""

import ast
import operator
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from math import isfinite

OPERATORS: dict[type[ast.operator | ast.unaryop], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
CONSTRUCTORS = ("Symbol", "Function", "Float", "Number")
"""What sympy's rewriting puts around names and numerals: the only calls that are given a string."""
LONGEST_TEXT = 400
"""Characters; of both answers, as mathruler parses their difference."""
DEEPEST_NESTING = 12
"""Of brackets."""
LARGEST_BITS = 1 << 17
"""Of a whole number, of numerator and denominator, of a float's exponent: 5000! has 54,000."""
LARGEST_DIGITS = 5000
"""Before or behind the point of a decimal number."""
LARGEST_ARGUMENT = 5000
"""Of a function that computes with whole numbers, factorials above all."""
LARGEST_EXPONENT = 20
"""Of what is no number: sympy may multiply it out."""
DIGITS = 30
"""That an expression is evaluated with."""
NEAR, NEAR_WITH_DECIMALS = 1e-18, 1e-6
"""Relative to the largest term: far above what rounding makes of 0."""
HELPERS = ("Integer", "Rational", "sqrt", "cbrt", "root")
"""Other names of sympy's that compute an expression from expressions."""


class Refused(ValueError):
    """The text holds something that is no arithmetic."""


def parse_expression(text: str):
    """Return the sympy expression that `text` denotes, as sympy's parser with implicit multiplication reads it.

    `^` is a power. Raises Refused, or whatever sympy raises, for text that is not an expression.
    """
    from sympy.parsing import sympy_parser as parser

    if len(text) > LONGEST_TEXT or _nesting(text) > DEEPEST_NESTING:
        raise Refused("too long or nested too deeply for an answer")
    transformations = parser.standard_transformations + (parser.implicit_multiplication_application,)
    names = dict(_names())
    code = parser.stringify_expr(text.replace("^", "**"), {}, names, transformations)
    return _value(ast.parse(code.strip(), mode="eval").body, names)


def surely_not_zero(expression) -> bool:
    """Return whether a sympy expression is not 0 where its symbols are some positive numbers, and f(x) some function.

    Then no rule of sympy's makes it 0, which saves the search for one: milliseconds instead of seconds, or hours. False
    where that cannot be told: near 0, or at a pole.
    """
    from sympy import Float, Rational
    from sympy.core.function import AppliedUndef

    expression = expression.replace(AppliedUndef, lambda *arguments: Rational(1, 3) + Rational(2, 7) * sum(arguments))
    symbols = sorted(expression.free_symbols, key=str)
    point = {symbol: Rational(61 + 37 * number, 97) for number, symbol in enumerate(symbols)}
    terms = expression.args if expression.is_Add else (expression,)
    sizes = [abs(complex(term.evalf(subs=point))) for term in terms]
    value = abs(complex(expression.evalf(DIGITS, subs=point, maxn=2 * DIGITS)))
    near = NEAR_WITH_DECIMALS if expression.has(Float) else NEAR
    return isfinite(value) and value > near * max(1.0, *sizes)


@lru_cache(maxsize=1)
def _names() -> dict:
    """Return the names that an expression may use: sympy's functions, constants and what the rewriting inserts."""
    import sympy
    from sympy.core.function import FunctionClass

    everything = {name: getattr(sympy, name) for name in sympy.__all__ if hasattr(sympy, name)}
    functions = {name: value for name, value in everything.items() if isinstance(value, FunctionClass)}
    constants = {name: value for name, value in everything.items() if isinstance(value, sympy.Expr) and value.is_number}
    needed = {name: everything[name] for name in CONSTRUCTORS + HELPERS}
    return functions | constants | needed | {"max": sympy.Max, "min": sympy.Min, "abs": sympy.Abs}


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _value(node: ast.expr, names: dict):
    match node:
        case ast.Constant(value=int() | float() | complex() as number) if not isinstance(number, bool):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            operands = _value(left, names), _value(right, names)
            if isinstance(op, ast.Pow):
                _check_power(*operands)
            return _checked(OPERATORS[type(op)](*operands))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand, names))
        case ast.Name(id=name) if name in names and name not in CONSTRUCTORS:
            return names[name]
        case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str() as text)], keywords=[]) if (
            name in CONSTRUCTORS
        ):
            return _constructed(name, text, names)
        case ast.Call(func=function, args=arguments, keywords=[]):
            called = _value(function, names)
            values = [_value(argument, names) for argument in arguments]
            _check_call(called, values)
            return _checked(called(*values))
    raise Refused(f"{type(node).__name__} is no arithmetic")


def _constructed(name: str, text: str, names: dict):
    """Return what the rewriting puts around a name or a numeral. Number would parse its text again."""
    if name == "Float" and abs(Decimal(text).adjusted()) > LARGEST_DIGITS:
        raise Refused("a number too large for an answer")
    return names["Integer"](int(text)) if name == "Number" else names[name](text)


def _check_power(base, exponent) -> None:
    """Refuse a power whose result would be enormous."""
    from sympy import sympify

    base, exponent = sympify(base), sympify(exponent)
    if not exponent.is_Number:
        return
    allowed = LARGEST_BITS / max(_bits(base), 1) if base.is_Number else LARGEST_EXPONENT
    if abs(exponent) > allowed:
        raise Refused("a power too large for an answer")


def _check_call(function: Callable, arguments: list) -> None:
    """Refuse large arguments of functions that count: factorials, binomials and their kind."""
    from sympy import sympify

    if str(function.__module__).startswith(("sympy.functions.elementary", "sympy.core")):
        return
    values = [sympify(argument) for argument in arguments]
    limit = LARGEST_ARGUMENT if all(value.is_Number for value in values) else LARGEST_EXPONENT
    if any(value.is_Number and abs(value) > limit for value in values):
        raise Refused("an argument too large for an answer")


def _checked(value):
    """Return a value. Raises Refused if it is too large to go on with."""
    if _is_large(value):
        raise Refused("a value too large for an answer")
    return value


def _is_large(value) -> bool:
    from sympy import Expr, Mul, Pow, sympify

    value = sympify(value) if isinstance(value, (int, float, complex)) else value
    if not isinstance(value, Expr):
        return False  # a function, say
    if value.is_Number:
        return _bits(value) > LARGEST_BITS
    if isinstance(value, Mul):
        return any(_is_large(factor) for factor in value.args)
    return isinstance(value, Pow) and bool(value.exp.is_Number) and abs(value.exp) > LARGEST_EXPONENT


def _bits(number) -> int:
    """Return the size of a sympy number: bits of numerator and denominator, or of a float's exponent."""
    if number.is_Rational:
        return int(number.p).bit_length() + int(number.q).bit_length()
    if number.is_Float:
        _, _, exponent, bits = number._mpf_
        return abs(exponent) + bits
    return 0

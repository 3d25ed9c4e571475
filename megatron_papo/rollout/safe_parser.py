"""sympy's parser without its eval: the text of a response or an answer becomes an expression, and never runs.

sympy.parse_expr tokenises its input, rewrites the tokens (implicit multiplication, numbers, symbols) and hands the
result to Python's eval with every built-in function in reach. Here the rewritten text is parsed into a syntax tree and
walked: arithmetic, numbers, symbols and sympy's own functions and constants. Everything else (attributes, subscripts,
strings, lambdas, comparisons, any other name) is refused.
"""

import ast
import operator
from collections.abc import Callable
from functools import lru_cache

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
HELPERS = ("Integer", "Rational", "sqrt", "cbrt", "root")
"""Other names of sympy's that compute an expression from expressions."""


class Refused(ValueError):
    """The text holds something that is no arithmetic."""


def parse_expression(text: str):
    """Return the sympy expression that `text` denotes, as sympy's parser with implicit multiplication reads it.

    `^` is a power. Raises Refused, or whatever sympy raises, for text that is not an expression.
    """
    from sympy.parsing import sympy_parser as parser

    transformations = parser.standard_transformations + (parser.implicit_multiplication_application,)
    names = dict(_names())
    code = parser.stringify_expr(text.replace("^", "**"), {}, names, transformations)
    return _value(ast.parse(code.strip(), mode="eval").body, names)


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


def _value(node: ast.expr, names: dict):
    match node:
        case ast.Constant(value=int() | float() | complex() as number) if not isinstance(number, bool):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand, names))
        case ast.Name(id=name) if name in names and name not in CONSTRUCTORS:
            return names[name]
        case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str() as text)], keywords=[]) if (
            name in CONSTRUCTORS
        ):
            # Number would parse its text again
            return names["Integer"](int(text)) if name == "Number" else names[name](text)
        case ast.Call(func=function, args=arguments, keywords=[]):
            return _value(function, names)(*(_value(argument, names) for argument in arguments))
    raise Refused(f"{type(node).__name__} is no arithmetic")

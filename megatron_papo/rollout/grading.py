"""What runs in a grading process: mathruler on one answer.

It imports nothing else, so that a replaced process is back within a second.
"""

from types import ModuleType

MEMORY_LIMIT_BYTES = 4 << 30
"""Address space of a grading process: sympy asked for 9**9**9 takes all the memory it can get."""


def prepare() -> None:
    """Prepare a new process, before any answer's time limit runs: no secrets, little memory, mathruler imported."""
    import os
    import resource

    os.environ.clear()  # keys and tokens are no business of what parses model text
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    _grader()


def is_correct(response: str, answer: str) -> bool:
    """Return mathruler's grade of the last boxed content. Model text that makes its parser raise is a wrong answer."""
    grader = _grader()
    try:
        return bool(grader.grade_answer(grader.extract_boxed_content(response), answer))
    except Exception:
        return False


def _grader() -> ModuleType:
    """Return mathruler's grader with a parser that does not run what it parses.

    Differs: mathruler hands the response, and the answer of the data, to sympy's parse_expr, which is Python's eval.
    Its guard, at most two different letters beside sqrt and frac, lets Roman numeral letters through, which Python
    reads as c, d, i, l, m, v and x.
    """
    import mathruler.grader as grader

    from megatron_papo.rollout.safe_parser import parse_expression

    if not hasattr(grader, "_sympy_parse"):
        raise RuntimeError("mathruler.grader has no _sympy_parse to replace: this version would run model text")
    grader._sympy_parse = parse_expression
    return grader

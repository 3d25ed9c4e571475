"""What runs in a grading process: mathruler on one answer after another, in a child that can do nothing else.

    python -c "... grading.serve(2.0)"

reads a JSON line [content of the box, answer] on standard input and writes one of the words below for each. The process
imports mathruler once and forks the child that reads; a child that dies of an answer, or has computed too long, is
replaced in a few milliseconds. The parent's side is grader_process.py. Nothing of what a child says is unpickled.
"""

import json
import os
import signal
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

READY, RIGHT, WRONG, LATE, DIED = "ready", "right", "wrong", "late", "died"
"""The words: before the first answer, followed by the layers of the sandbox that are lacking; the grade; the child used
up its time; the child ended in another way, which need not be the answer's fault."""
ANSWERS_PER_CHILD = 200
"""Then a fresh child follows, so that no answer meets what many others have left in caches."""
END_OF_INPUT, USED_UP, TOO_LARGE = 0, 3, 4
"""Exit statuses of a child."""
BOX = "\\boxed{"
MISSING = "None"
"""What mathruler takes for the content of a box that is not there."""
KNOWN = (("x/3", "\\frac{x}{2}", False), ("\\sqrt{8}+\\frac{x}{2}", "x/2+2\\sqrt{2}", True), ("2\\pi", "2*pi", True))
"""Content, answer, whether it is right: graded before anything else, which imports what mathruler imports late."""


def boxed(response: str) -> str | None:
    """Return the content of the last \\boxed{} whose braces close, as mathruler finds it; None where there is none."""
    start = response.rfind(BOX)
    if start < 0:
        return None
    depth = 1
    for position in range(start + len(BOX), len(response)):
        depth += {"{": 1, "}": -1}.get(response[position], 0)
        if not depth:
            return response[start + len(BOX) : position].strip()
    return None


def is_correct(response: str, answer: str) -> bool:
    """Return mathruler's grade of the last boxed content. A response without one is wrong.

    Differs: mathruler takes the word None for a missing box, so that an empty response is right where the answer of the
    data is "None".
    """
    content = boxed(response)
    return content is not None and is_equal(content, answer)


def is_equal(content: str, answer: str) -> bool:
    """Return whether mathruler calls both equal. Text that makes its parser raise is a wrong answer."""
    try:
        return bool(_grader().grade_answer(content, answer))
    except MemoryError:
        raise
    except Exception:
        return False


def serve(time_limit_seconds: float) -> None:
    """Grade what comes on standard input until it ends.

    Args:
        time_limit_seconds: Of computing for one answer; a busy machine takes nothing from it.
    """
    from megatron_papo.rollout.sandbox import end_with_parent

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    end_with_parent()
    os.environ.clear()
    for content, answer, right in KNOWN:
        if is_equal(content, answer) is not right:
            raise RuntimeError(f"mathruler does not grade {content} against {answer} as it should")
    first = True
    while (child := os.fork()) > 0:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == END_OF_INPUT:
            return
        if status != USED_UP:
            _say(LATE if status in (-signal.SIGPROF, TOO_LARGE) else DIED)
        first = False
    _answer(time_limit_seconds, first)


def _answer(time_limit_seconds: float, first: bool) -> None:
    """Be a child: give up everything, then grade. Never returns."""
    from megatron_papo.rollout.sandbox import confine, end_with_parent

    end_with_parent()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    os.closerange(sys.stderr.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    lacking = confine(_libraries())
    if first:
        _say(" ".join([READY, *lacking]))
    status = USED_UP
    for _ in range(ANSWERS_PER_CHILD):
        line = sys.stdin.buffer.readline()
        if not line:
            status = END_OF_INPUT
            break
        try:
            signal.setitimer(signal.ITIMER_PROF, time_limit_seconds)  # it ends the process
            content, answer = json.loads(line)
            word = RIGHT if is_equal(content, answer) else WRONG
            signal.setitimer(signal.ITIMER_PROF, 0)
        except MemoryError:
            status = TOO_LARGE
            break
        _say(word)
    os._exit(status)


def _say(word: str) -> None:
    os.write(sys.stdout.fileno(), word.encode() + b"\n")


def _libraries() -> list[Path]:
    """Return the directories that late imports read."""
    import mathruler
    import mpmath
    import pylatexenc
    import sympy

    packages = [Path(module.__path__[0]) for module in (mathruler, mpmath, pylatexenc, sympy)]
    return [*packages, *{Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}]


def _grader() -> ModuleType:
    """Return mathruler's grader with a parser that does not run what it parses.

    Differs: mathruler hands the response, and the answer of the data, to sympy's parse_expr, which is Python's eval.
    Its guard, at most two different letters beside sqrt and frac, lets Roman numeral letters through, which Python
    reads as c, d, i, l, m, v and x.
    """
    import mathruler.grader as grader

    if not hasattr(grader, "_sympy_parse"):
        raise RuntimeError("mathruler.grader has no _sympy_parse to replace: this version would run model text")
    grader._sympy_parse = _difference
    return grader


def _difference(text: str):
    """Return what mathruler is to simplify and compare with 0: the parsed text, or 1 where it surely is not 0."""
    from megatron_papo.rollout.safe_parser import parse_expression, surely_not_zero

    expression = parse_expression(text)
    try:
        return 1 if surely_not_zero(expression) else expression
    except Exception:  # it has no number there; simplify has the last word
        return expression

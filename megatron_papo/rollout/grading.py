"""What runs in a grading process: mathruler on one answer. Imports nothing else, so that a replaced process is back within a second."""

MEMORY_LIMIT_BYTES = 4 << 30
"""Address space of a grading process: sympy asked for 9**9**9 takes all the memory it can get."""


def prepare() -> None:
    """First thing in a new process, before any answer's time limit runs."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    import mathruler.grader  # noqa: F401


def is_correct(response: str, answer: str) -> bool:
    """mathruler's grade of the last boxed content. Model text that makes its parser raise is a wrong answer."""
    from mathruler.grader import extract_boxed_content, grade_answer

    try:
        return bool(grade_answer(extract_boxed_content(response), answer))
    except Exception:
        return False

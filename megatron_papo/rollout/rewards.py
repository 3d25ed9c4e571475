"""The published reward (PAPO section 4): 0.9 accuracy + 0.1 format. Model text is parsed in worker processes with a time limit."""

import multiprocessing
import re
from concurrent.futures import Future

from pebble import ProcessExpired, ProcessPool

from megatron_papo.config import RewardConfig
from megatron_papo.records import Rewards
from megatron_papo.rollout import grading


def strip_tag_spaces(text: str) -> str:
    """Removes white space around < > /, as the authors do (`< think >` counts as `<think>`).

    The same as re.sub(r"\\s*(<|>|/)\\s*", r"\\1", text), which takes quadratic time on long runs of spaces.
    """
    pieces = re.split("([<>/])", text)
    if len(pieces) == 1:
        return text
    return "".join([pieces[0].rstrip(), *(piece.strip() for piece in pieces[1:-1]), pieces[-1].lstrip()])


def format_reward(text: str) -> float:
    """1 if the whole text matches <think>.*</think>.*\\boxed{.*}.* (dot matches newline), else 0. In linear time."""
    if not text.startswith("<think>"):
        return 0.0
    position = len("<think>")
    for part in ("</think>", "\\boxed{", "}"):
        found = text.find(part, position)
        if found < 0:
            return 0.0
        position = found + len(part)
    return 1.0


class Grader:
    """Grades responses in `config.workers` processes; submit as they come, collect at the end.

        with Grader(config.reward) as grader:
            pending = [grader.submit(text, answer, cut_off) for ...]
            rewards = [grader.result(one) for one in pending]

    A process that exceeds config.time_limit_seconds on one response, or dies of it, is replaced; that response counts as wrong
    and timed_out, and no other is lost.
    """

    def __init__(self, config: RewardConfig):
        self.config = config

    def __enter__(self):
        # spawn: a fork of a process with running threads may deadlock
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(self.config.workers, initializer=grading.prepare, context=context)
        return self

    def __exit__(self, kind, error, trace):
        self._pool.stop() if kind else self._pool.close()
        self._pool.join()

    def submit(self, text: str, answer: str, cut_off: bool) -> tuple[float, bool, Future]:
        """Starts grading one decoded response; `cut_off` says that it ended for lack of tokens."""
        text = strip_tag_spaces(text)
        future = self._pool.schedule(grading.is_correct, args=[text, answer], timeout=self.config.time_limit_seconds)
        return format_reward(text), cut_off, future

    def result(self, submitted: tuple[float, bool, Future]) -> Rewards:
        """Waits for one."""
        format_score, cut_off, future = submitted
        timed_out = False
        try:
            accuracy = float(future.result())
        except (TimeoutError, ProcessExpired):
            accuracy, timed_out = 0.0, True
        overall = self.config.accuracy_weight * accuracy + self.config.format_weight * format_score
        if cut_off and self.config.zero_if_cut_off:
            overall = 0.0
        return Rewards(overall=overall, accuracy=accuracy, format=format_score, timed_out=timed_out)

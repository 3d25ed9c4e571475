"""The published reward: 0.9 accuracy + 0.1 format, and DAPO's soft overlong punishment, which PAPO's authors lack.

Model text is parsed in worker processes with a time limit.
"""

import multiprocessing
import re
from concurrent.futures import Future

from pebble import ProcessExpired, ProcessPool

from megatron_papo.config import RewardConfig
from megatron_papo.rollout import grading
from megatron_papo.run.records import Rewards


def strip_tag_spaces(text: str) -> str:
    """Return the text without white space around < > /, as the authors do (`< think >` counts as `<think>`).

    The same as re.sub(r"\\s*(<|>|/)\\s*", r"\\1", text), which takes quadratic time on long runs of spaces.
    """
    pieces = re.split("([<>/])", text)
    if len(pieces) == 1:
        return text
    return "".join([pieces[0].rstrip(), *(piece.strip() for piece in pieces[1:-1]), pieces[-1].lstrip()])


def format_reward(text: str) -> float:
    """Return 1 if the text as a whole matches <think>.*</think>.*\\boxed{.*}.* (dot matches newline), else 0.

    It takes linear time.
    """
    if not text.startswith("<think>"):
        return 0.0
    position = len("<think>")
    for part in ("</think>", "\\boxed{", "}"):
        start = text.find(part, position)
        if start < 0:
            return 0.0
        position = start + len(part)
    return 1.0


def soft_overlong_penalty(num_tokens: int, max_tokens: int, buffer_tokens: int, penalty: float) -> float:
    """Return what is added to a response's reward for its length: a number between -penalty and 0.

        0                                            num_tokens <= max_tokens - buffer_tokens
        -penalty * (num_tokens - start) / buffer     start = max_tokens - buffer_tokens < num_tokens <= max_tokens
        -penalty                                     max_tokens < num_tokens

    DAPO, arXiv 2503.14476, equation 13, where penalty is 1.

    Args:
        num_tokens: of the response, the end-of-turn token included.
        max_tokens: that a response may have.
        buffer_tokens: the last so many of them are punished.
        penalty: of a response that uses all of them.
    """
    over = num_tokens - (max_tokens - buffer_tokens)
    return -penalty * min(over / buffer_tokens, 1.0) if over > 0 else 0.0


def with_overlong_penalty(rewards: Rewards, num_tokens: int, max_tokens: int, config: RewardConfig) -> Rewards:
    """Return the rewards of training: `overall` is lowered for a long response as config says. Not for evaluation.

    Args:
        rewards: as graded.
        num_tokens: of the response, the end-of-turn token included.
        max_tokens: that a response may have.
        config: the punishment, if any.
    """
    if config.soft_overlong_buffer_tokens is None:
        return rewards
    penalty = soft_overlong_penalty(
        num_tokens, max_tokens, config.soft_overlong_buffer_tokens, config.soft_overlong_penalty
    )
    return rewards.model_copy(update={"overall": rewards.overall + penalty, "overlong_penalty": penalty})


Submitted = tuple[float, bool, Future]
"""A response under way: its format score, whether it was cut off, and its grade when it comes."""


class Grader:
    """Processes that grade responses, config.workers of them; submit as they come, collect at the end.

        with Grader(config.reward) as grader:
            pending = [grader.submit(text, answer, cut_off) for ...]
            rewards = [grader.result(submitted) for submitted in pending]

    A process that exceeds config.time_limit_seconds on one response, or dies of it, is replaced; that response counts
    as wrong and timed_out, and no other is lost.
    """

    def __init__(self, config: RewardConfig):
        self.config = config

    def __enter__(self) -> "Grader":
        # spawn: a fork of a process with running threads may deadlock
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(self.config.workers, initializer=grading.prepare, context=context)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self._pool.close()
        else:
            self._pool.stop()
        self._pool.join()

    def submit(self, text: str, answer: str, cut_off: bool) -> Submitted:
        """Start grading a decoded response; `cut_off` says that it ended for lack of tokens."""
        text = strip_tag_spaces(text)
        future = self._pool.schedule(grading.is_correct, args=[text, answer], timeout=self.config.time_limit_seconds)
        return format_reward(text), cut_off, future

    def result(self, submitted: Submitted) -> Rewards:
        """Wait for the rewards of a response."""
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

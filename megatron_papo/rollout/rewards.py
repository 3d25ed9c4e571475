"""The published reward: 0.9 accuracy + 0.1 format, and DAPO's soft overlong punishment, which PAPO's authors lack.

Model text is parsed in processes of their own that can do nothing else (grading.py, sandbox.py).
"""

import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import LifoQueue

from megatron_papo.config import Grading, RewardConfig
from megatron_papo.rollout.choices import letters_named, right_letters, right_texts
from megatron_papo.rollout.grader_process import GraderDied, GraderProcess
from megatron_papo.rollout.grading import LATE, MISSING, RIGHT, WRONG, boxed
from megatron_papo.rollout.sandbox import MEMORY_LIMIT_BYTES
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


def boxed_answer(text: str) -> str | None:
    """Return what is graded of a response, the content of its last box that closes; None where it has none."""
    return boxed(strip_tag_spaces(text))


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


def reward_of(training: RewardConfig, grading: Grading) -> RewardConfig:
    """Return how an evaluation set is graded: as in training, but whether a missing box counts as the answer "None" is
    part of the set's grading: it does in the authors' evaluation, `published`."""
    return training.model_copy(update={"missing_box_is_none": grading == "published"})


LATE_SHARE = 0.01
"""Of different answers without a grade, beyond which a line says so."""
Question = tuple[str, tuple[str, ...]]
"""The content of a box, and the answers that would be right."""
Submitted = tuple[float, bool, Question | str]
"""A response under way: its format score, whether it was cut off, and the question whose grade is its own, or that
grade where it is known."""


class Grader:
    """Processes that grade responses, config.workers of them; submit as they come, collect at the end.

        with Grader(config.reward) as grader:
            pending = [grader.submit(text, answer, cut_off) for ...]
            rewards = [grader.result(submitted) for submitted in pending]

    A response whose grading computes for more than config.time_limit_seconds, or takes too much memory, counts as wrong
    and timed_out; no other is lost. So does one whose grading process died twice; one that died once may have been
    somebody else's victim, and its response is graded again. The same content and answers are graded once.
    """

    def __init__(self, config: RewardConfig):
        self.config = config

    def __enter__(self) -> "Grader":
        self._threads = ThreadPoolExecutor(self.config.workers, "grader")
        self._idle: LifoQueue[GraderProcess | None] = LifoQueue()
        for _ in range(self.config.workers):
            self._idle.put(None)
        self._grades: dict[Question, Future[str] | str] = {}
        """The grade, in place of its future once it is known: a future is larger than most responses."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._threads.shutdown(cancel_futures=kind is not None)
        processes = [process for process in self._idle.queue if process is not None]
        for process in processes:
            process.stop()
        if kind is None:
            self._warn({layer for process in processes for layer in process.lacking})

    def _warn(self, lacking: set[str]) -> None:
        """Say what nobody would look for: graders that are not shut in, and many answers without a grade."""
        if lacking:
            print(
                f"warning: this machine has no {' and no '.join(sorted(lacking))}: what still holds for the processes"
                " that grade is in docs/reliability.md",
                flush=True,
            )
        late = sum(self._word(question) == LATE for question in self._grades)
        if late > LATE_SHARE * len(self._grades):
            print(
                f"warning: {late} of {len(self._grades)} different answers count as wrong because grading one took more"
                f" than reward.time_limit_seconds ({self.config.time_limit_seconds:g} s) or {MEMORY_LIMIT_BYTES >> 20}"
                " MiB",
                flush=True,
            )

    def submit(
        self, text: str, answer: str, cut_off: bool, grading: Grading = "mathruler", options: Sequence[str] = ()
    ) -> Submitted:
        """Start grading a decoded response. Raises UserError for an answer that `grading` cannot use.

        Args:
            text: the response.
            answer: of the data.
            cut_off: it ended for lack of tokens.
            grading: mathruler: right if the content of the last box equals the answer. published: the same, but the
                answer ends with a newline, as in the authors' evaluation: what equals it only without capitals, or as
                mathematics, is wrong. choice: right if the content names the right option, or equals its text.
            options: for choice, their texts, that of A first; none: not known.
        """
        text = strip_tag_spaces(text)
        content = boxed(text)
        if content is None and self.config.missing_box_is_none:
            content = MISSING
        named: frozenset[str] = frozenset()
        if grading == "choice":
            right = right_letters(answer, options)
            named, answers = letters_named(content or "", options), right_texts(right, options)
        else:
            answers = [answer if grading == "mathruler" else with_newline(answer)]
        if named:
            return format_reward(text), cut_off, RIGHT if named & right else WRONG
        return format_reward(text), cut_off, self._grade(content, answers)

    def result(self, submitted: Submitted) -> Rewards:
        """Wait for the rewards of a response. Raises UserError where no grading process starts."""
        format_score, cut_off, grade = submitted
        word = grade if isinstance(grade, str) else self._word(grade)
        accuracy, timed_out = float(word == RIGHT), word == LATE
        overall = self.config.accuracy_weight * accuracy + self.config.format_weight * format_score
        if cut_off and self.config.zero_if_cut_off:
            overall = 0.0
        return Rewards(overall=overall, accuracy=accuracy, format=format_score, timed_out=timed_out)

    def _grade(self, content: str | None, answers: Sequence[str]) -> Question | str:
        if content is None or not answers:
            return WRONG
        question = content, tuple(answers)
        if question not in self._grades:
            future = self._grades[question] = self._threads.submit(self._ask_all, *question)
            future.add_done_callback(partial(self._keep, question))
        return question

    def _keep(self, question: Question, future: Future[str]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._grades[question] = future.result()

    def _word(self, question: Question) -> str:
        """Wait for the grade of a question."""
        grade = self._grades[question]
        return grade if isinstance(grade, str) else grade.result()

    def _ask_all(self, content: str, answers: Sequence[str]) -> str:
        """Return RIGHT where the content equals one of the answers, else LATE where that took too long."""
        words = set()
        for answer in answers:
            words.add(self._ask(content, answer))
            if RIGHT in words:
                break
        return next(word for word in (RIGHT, LATE, WRONG) if word in words)

    def _ask(self, content: str, answer: str) -> str:
        process = self._idle.get()
        try:
            for _ in range(2):
                process = process or GraderProcess(self.config.time_limit_seconds)
                try:
                    return process.ask(content, answer)
                except GraderDied:
                    process.stop()
                    process = None
            return LATE
        finally:
            self._idle.put(process)


def with_newline(answer: str) -> str:
    """Return an answer as the authors' evaluation has it: decoded from tokens, the last of which is a newline."""
    return answer if answer.endswith("\n") else answer + "\n"

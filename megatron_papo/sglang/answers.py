"""What SGLang answers, and what can be believed of it.

Each answer is read through a typed model: JSON of the right shape and types, numbers finite. A sample is then compared
with what was asked for; one that SGLang cannot have made from that request raises http.Fault, so that the request is
sent again. Token ids and log-probs are the server's; nothing is ever tokenised again.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_papo.reading import in_short, shown
from megatron_papo.sglang.http import Fault
from megatron_papo.sglang.requests import Request, Sampling

ROUNDING = 1e-4
"""How far above 0 the rounding of a softmax may put the log-prob of a certain token; it is taken for 0."""
LEAST_LOG_PROB = -200.0
"""A token of less probability is not drawn: the smallest positive float32 is e^-103."""


class Answer(BaseModel):
    """Fields that are not listed are SGLang's own affair."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class ModelInfo(Answer):
    """/model_info."""

    model_path: str
    weight_version: str


class ServerInfo(Answer):
    """/server_info: the settings that rollouts depend on."""

    dtype: str
    enable_deterministic_inference: bool


class Loaded(Answer):
    """/update_weights_from_disk."""

    success: bool
    message: str


class Acknowledged(Answer):
    """/pause_generation, /continue_generation."""

    status: Literal["ok"]


TokenLogProb = tuple[float | None, int, str | None]
"""Log-prob, token id, text. None: there is none, or it was not finite."""


class FinishReason(Answer):
    type: str
    message: str | None = None


class SampleInfo(Answer):
    id: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    weight_version: str
    output_token_logprobs: list[TokenLogProb]


class Generated(Answer):
    """/generate, with log-probs of the tokens that it made."""

    output_ids: list[int]
    meta_info: SampleInfo


class Named(Answer):
    id: str


class Ahead(Answer):
    """/generate, of a prompt that is computed ahead of its samples."""

    meta_info: Named


class ProbeInfo(Answer):
    id: str
    input_token_logprobs: list[TokenLogProb]


class Probed(Answer):
    """/generate, with log-probs of the prompt's tokens."""

    meta_info: ProbeInfo


AnswerType = TypeVar("AnswerType", bound=Answer)


def reader(model: type[AnswerType]) -> Callable[[bytes], AnswerType]:
    """Return a function that reads an answer of this kind, and raises Fault for anything else."""

    def read(content: bytes) -> AnswerType:
        try:
            return model.model_validate_json(content)
        except ValidationError as error:
            raise Fault(f"no answer of SGLang: {in_short(error)}")

    return read


_read_generated, _read_probed, _read_ahead = reader(Generated), reader(Probed), reader(Ahead)


def read_generated(content: bytes, rid: str) -> Generated:
    """Return an answer to the request `rid`. Raises Fault for one that belongs to another request."""
    answer = _read_generated(content)
    _require_id(answer.meta_info.id, rid)
    return answer


def read_prefix(content: bytes, rid: str) -> None:
    """Raise Fault for what is no answer to a prompt computed ahead."""
    _require_id(_read_ahead(content).meta_info.id, rid)


def read_probe(content: bytes, rid: str) -> list[float]:
    """Return the log-probs of the prompt's tokens but the first, which has none. Raises Fault as read_generated."""
    info = _read_probed(content).meta_info
    _require_id(info.id, rid)
    log_probs = [entry[0] for entry in info.input_token_logprobs[1:]]
    if not log_probs or None in log_probs:
        raise Fault("a token of the prompt has no log-prob")
    return [value for value in log_probs if value is not None]


def _require_id(found: str, rid: str) -> None:
    if found != rid:
        raise Fault(f"the answer to another request ({shown(found)} where {rid} was asked)")


@dataclass(frozen=True)
class Sample:
    """One response, as the server sampled it. It takes 12 bytes a token, where lists of numbers take 72: an evaluation
    holds all of its responses."""

    packed_ids: "array[int]"
    packed_log_probs: "array[float]"
    finish_reason: Literal["stop", "length"]
    weight_version: str

    @classmethod
    def of(
        cls,
        token_ids: Sequence[int],
        log_probs: Sequence[float],
        finish_reason: Literal["stop", "length"],
        weight_version: str,
    ) -> "Sample":
        """Return the sample with these tokens. Raises OverflowError for a number that no token has.

        Args:
            token_ids: as sampled.
            log_probs: of each token, at the temperature, before top_p and top_k.
            finish_reason: length: it ended for lack of tokens.
            weight_version: what the server said its weights were.
        """
        return cls(array("i", token_ids), array("d", log_probs), finish_reason, weight_version)

    @property
    def token_ids(self) -> list[int]:
        """The response, the end-of-turn token included when it came."""
        return self.packed_ids.tolist()

    @property
    def log_probs(self) -> list[float]:
        """Of each token, at the temperature, before top_p and top_k."""
        return self.packed_log_probs.tolist()

    @property
    def num_tokens(self) -> int:
        return len(self.packed_ids)


def sample_of(answer: Generated, request: Request, sampling: Sampling, weight_version: str) -> Sample:
    """Return the sample of an answer. Raises Fault if SGLang cannot have made it from this request.

    Args:
        answer: of the server.
        request: what was asked.
        sampling: how.
        weight_version: that the answer must name.
    """
    info, expected = answer.meta_info, request.prompt.num_tokens
    reason: Literal["stop", "length"]
    if info.finish_reason.type == "stop":
        reason = "stop"
    elif info.finish_reason.type == "length":
        reason = "length"
    else:
        why = f"{shown(info.finish_reason.type)}: {shown(info.finish_reason.message or 'it does not say why')}"
        raise Fault(f"the server gave up on it ({why})")
    if info.prompt_tokens != expected:
        raise Fault(
            f"the server counted {info.prompt_tokens} prompt tokens, we count {expected}: the server's checkpoint or"
            " image size limits are not those that the prompts were made with (data.min_pixels, data.max_pixels)"
        )
    token_ids = [entry[1] for entry in info.output_token_logprobs]
    if token_ids != answer.output_ids or len(token_ids) != info.completion_tokens:
        raise Fault(
            f"{len(answer.output_ids)} tokens, but log-probs for {len(token_ids)} of them: is the server really SGLang"
            " 0.5.21?"
        )
    if not 0 <= info.cached_tokens <= expected:
        raise Fault(f"{info.cached_tokens} of {expected} prompt tokens from a cache")
    log_probs = [entry[0] for entry in info.output_token_logprobs if entry[0] is not None]
    log_probs = [min(value, 0.0) if value <= ROUNDING else value for value in log_probs]
    try:
        sample = Sample.of(token_ids, log_probs, reason, info.weight_version)
    except OverflowError:
        raise Fault(f"a token id outside the vocabulary of {sampling.tokens.vocabulary_size}")
    problem = problem_of_sample(sample, sampling, weight_version)
    if problem is not None:
        raise Fault(problem)
    return sample


def problem_of_sample(sample: Sample, sampling: Sampling, weight_version: str) -> str | None:
    """Return why a sample cannot have been drawn under these settings; None if it can."""
    ids, tokens = sample.token_ids, sampling.tokens
    log_probs = sample.log_probs
    if not ids or len(log_probs) != len(ids):
        return f"{len(ids)} tokens, {len(log_probs)} log-probs: a token without a finite log-prob"
    if not all(LEAST_LOG_PROB <= value <= 0 for value in log_probs):
        return f"log-probs from {min(log_probs):.3g} to {max(log_probs):.3g}, which no sampled token has"
    if len(ids) > sampling.max_response_tokens:
        return f"{len(ids)} tokens where {sampling.max_response_tokens} were the limit"
    if not all(0 <= token < tokens.vocabulary_size for token in ids):
        return f"a token id outside the vocabulary of {tokens.vocabulary_size}"
    if not tokens.forbidden_set.isdisjoint(ids):
        return "the server sampled a forbidden token: it ignores logit_bias, so it is not SGLang 0.5.21"
    if not tokens.ends.isdisjoint(ids[:-1]):
        return "tokens after the end of the turn"
    if (sample.finish_reason == "stop") != (ids[-1] in tokens.ends):
        return f"finished by {sample.finish_reason}, with {ids[-1]} as the last token: the ends of a turn are " + str(
            sorted(tokens.ends)
        )
    if sample.finish_reason == "length" and len(ids) != sampling.max_response_tokens:
        return (
            f"cut off after {len(ids)} tokens, before the limit of {sampling.max_response_tokens}: the server has less"
            " room: raise server.max_total_tokens, or lower the limit (rollout.max_response_tokens,"
            " evaluation.max_response_tokens)"
        )
    if sample.weight_version != weight_version:
        return (
            f"answered with weights {shown(sample.weight_version)}, expected {weight_version}: someone else loads"
            " weights into this server, or it was started again: run the stage again"
        )
    return None

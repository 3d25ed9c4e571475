"""Which tokens a response may consist of, and which end it, by a checkpoint's own files."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_papo.data.chat import forbidden_tokens, vocabulary_size
from megatron_papo.reading import read_json, reading

CURE = "copy the model again"


@dataclass(frozen=True)
class ResponseTokens:
    """The vocabulary of a response."""

    vocabulary_size: int
    """Rows of the embedding: ids are below it."""
    forbidden: tuple[int, ...]
    """Ids that are never sampled."""
    ends: frozenset[int]
    """Ids that end a response, and are its last token."""

    @cached_property
    def forbidden_set(self) -> frozenset[int]:
        return frozenset(self.forbidden)


def response_tokens(hf_dir: Path, vocabulary: dict[str, int]) -> ResponseTokens:
    """Return what SGLang samples from with a checkpoint, and at which tokens it stops. Raises UserError.

    Args:
        hf_dir: checkpoint directory: config.json, and where they are there generation_config.json and
            tokenizer_config.json, each of which may name end-of-turn tokens.
        vocabulary: of the tokenizer, special tokens included.
    """
    forbidden = forbidden_tokens(hf_dir, vocabulary)
    config = read_json(hf_dir / "config.json", CURE)
    size = vocabulary_size(hf_dir)
    with reading(hf_dir / "config.json", CURE):
        ends = set(_ids(config)) | set(_ids(config.get("text_config", {})))
    generation, tokenizer = hf_dir / "generation_config.json", hf_dir / "tokenizer_config.json"
    if generation.exists():
        with reading(generation, CURE):
            ends |= set(_ids(read_json(generation, CURE)))
    if tokenizer.exists():
        with reading(tokenizer, CURE):
            token = read_json(tokenizer, CURE).get("eos_token")
            text = token.get("content") if isinstance(token, dict) else token
            ends |= {vocabulary[text]} if text in vocabulary else set()
    return ResponseTokens(size, forbidden, frozenset(ends))


def _ids(config: dict[str, Any]) -> Iterator[int]:
    value = config.get("eos_token_id")
    yield from map(int, value if isinstance(value, list) else [] if value is None else [value])

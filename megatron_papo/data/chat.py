"""From a problem's text to the token ids of a chat prompt, with one image-pad token per picture."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from megatron_papo.config import BenchmarkConfig, DataConfig
from megatron_papo.errors import UserError
from megatron_papo.pictures.preprocess import num_image_tokens
from megatron_papo.reading import read_json, reading, shown

IMAGE_PLACE = "<image>"
IMAGE_PAD = "<|image_pad|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
END_OF_TURN = "<|im_end|>"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)
"""The small files of a checkpoint directory that decide what a prompt looks like."""


def tokenizer_hash(directory: Path) -> str:
    """Return the sha256 of tokenizer.json, in hex: two checkpoints with the same one give the same token ids. Raises
    UserError."""
    with reading(Path(directory) / "tokenizer.json", "give a complete Qwen2.5-VL checkpoint directory"):
        return hashlib.sha256((Path(directory) / "tokenizer.json").read_bytes()).hexdigest()


def require_checkpoint(directory: Path, prefetch: str = "tools.prefetch --config FILE") -> None:
    """Raise UserError where no checkpoint directory is, as where a name of the Hugging Face hub was given.

    prefetch: Module and arguments that download it.
    """
    with reading(directory, "set model.path to a Qwen2.5-VL checkpoint directory"):
        if Path(directory).is_dir():
            return
    raise UserError(
        f"{shown(directory)}: no such directory. Names of the Hugging Face hub are not taken: .venv/bin/python -m"
        f" {prefetch} downloads the model and says what to set model.path to"
    )


def vocabulary_size(directory: Path) -> int:
    """Return the number of rows of a checkpoint's embedding, as its config.json says. Raises UserError."""
    path = Path(directory) / "config.json"
    config = read_json(path, "give a complete Qwen2.5-VL checkpoint directory")
    text = config.get("text_config")
    size = (text.get("vocab_size") if isinstance(text, dict) else None) or config.get("vocab_size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 2**31:
        raise UserError(f"{path}: vocab_size is {shown(repr(size))}: give a complete Qwen2.5-VL checkpoint directory")
    return size


def largest_token_id(directory: Path) -> int:
    """Return the largest id that a checkpoint's tokenizer.json can give, added tokens included. Raises UserError."""
    path = Path(directory) / "tokenizer.json"
    with reading(path, "give a complete Qwen2.5-VL checkpoint directory"):
        return max(Tokenizer.from_str(path.read_text("utf-8")).get_vocab(with_added_tokens=True).values())


def require_ids_in_vocabulary(directory: Path) -> None:
    """Raise UserError where a checkpoint's tokenizer has ids that its embedding has no row for."""
    largest, size = largest_token_id(directory), vocabulary_size(directory)
    if largest >= size:
        raise UserError(
            f"{directory}: its tokenizer has ids up to {largest}, its embedding {size} rows (vocab_size in"
            " config.json): tokens were added: resize the embedding (resize_token_embeddings) or give this model's own"
        )


@dataclass(frozen=True)
class RenderSettings:
    """What stands around a problem: keys of the configuration."""

    prompt_template: str
    """Format string around the problem."""
    system_prompt: str | None = None
    """None: whatever the chat template does by itself."""
    strip_problem: bool = True
    """Leave out white space before and after the problem."""

    @classmethod
    def of(cls, data: DataConfig) -> Self:
        """Return those of training prompts."""
        return cls(data.prompt_template, data.system_prompt, data.strip_problem)

    @classmethod
    def of_set(cls, data: DataConfig, of_set: BenchmarkConfig) -> Self:
        """Return those of an evaluation set: its own, else those of training."""
        return cls(
            of_set.prompt_template or data.prompt_template,
            data.system_prompt if of_set.system_prompt is None else of_set.system_prompt,
            data.strip_problem if of_set.strip_problem is None else of_set.strip_problem,
        )


class ChatFormat:
    """The tokenizer and chat template of a checkpoint, with the prompt template and system message of the
    configuration."""

    def __init__(self, directory: Path, settings: RenderSettings):
        """Load the tokenizer; no code that a checkpoint brings is run. Raises UserError where it cannot be used.

        Args:
            directory: of the checkpoint.
            settings: what stands around a problem.
        """
        tokenizer_hash(directory)
        self.directory = directory
        with reading(directory, "its tokenizer cannot be loaded: give a complete Qwen2.5-VL checkpoint directory"):
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        self.settings, system = settings, settings.system_prompt
        self._instruction = settings.prompt_template.format(problem="\0").rpartition("\0")[2].strip()
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.image_pad = self._token_id(directory, IMAGE_PAD)
        self.end_of_turn = self._token_id(directory, END_OF_TURN)
        if not self.tokenizer.chat_template:
            raise UserError(f"{directory}: the tokenizer has no chat template: add chat_template.jinja")
        self.render("")
        added = self.tokenizer.added_tokens_decoder.values()
        self.control_tokens = sorted(
            token.content for token in added if token.special or token.content.startswith("<|")
        )
        self._refuse_control_tokens(settings.prompt_template, "data.prompt_template")
        self._refuse_control_tokens(system or "", "data.system_prompt")

    def encode_prompt(self, problem: str, num_images: int) -> list[int]:
        """Return the token ids up to the start of the response. Raises UserError if pictures do not fit the places.

        Pictures go where the `<image>` places are, in order. A problem without any place has its pictures in front of
        the text. Text around the places is kept as it is. A token such as <|image_pad|> in it is refused: the model
        would take it for a picture.
        """
        self._refuse_control_tokens(problem, "the problem")
        if self._instruction and problem.rstrip().endswith(self._instruction):
            raise UserError(
                "the problem ends with the instruction that prompt_template adds: set the set's prompt_template to"
                ' "{problem}", or leave the instruction out of the data'
            )
        text = self._around(problem)
        places = text.count(IMAGE_PLACE)
        if places == 0:
            text = IMAGE_PLACE * num_images + text
        elif places != num_images:
            raise UserError(f"{num_images} images for {places} {IMAGE_PLACE} places: correct or drop the row")
        token_ids = self._encode(self.render(text))
        pads = token_ids.count(self.image_pad)
        if pads != num_images:
            raise UserError(f"the chat template made {pads} {IMAGE_PAD} of {num_images} images: use Qwen2.5-VL's")
        return token_ids

    def encode_without_images(self, problem: str) -> list[int]:
        """Return the token ids of encode_prompt with no pictures, and no places for them."""
        self._refuse_control_tokens(problem, "the problem")
        return self._encode(self.render(self._around(problem).replace(IMAGE_PLACE, "")))

    def _around(self, problem: str) -> str:
        stripped = problem.strip() if self.settings.strip_problem else problem
        return self.settings.prompt_template.format(problem=stripped)

    def render(self, text: str) -> str:
        """Return the chat text of one user message whose `<image>` places are pictures."""
        first, *rest = text.split(IMAGE_PLACE)
        content: list[dict[str, str]] = [{"type": "text", "text": first}] if first else []
        for part in rest:
            content.append({"type": "image"})
            if part:
                content.append({"type": "text", "text": part})
        messages: list[dict] = [*self.system, {"role": "user", "content": content}]
        with reading(f"{self.directory}: chat template", "give Qwen2.5-VL's"):
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def encode_target(self, target: str) -> list[int]:
        """Return the token ids of a response, the end-of-turn token included."""
        self._refuse_control_tokens(target, "the target")
        return [*self._encode(target), self.end_of_turn]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _token_id(self, directory: Path, token: str) -> int:
        token_id = self.tokenizer.get_vocab().get(token)
        if token_id is None:
            raise UserError(f"{directory}: the tokenizer has no {token} token: give a Qwen2.5-VL checkpoint")
        return token_id

    def _refuse_control_tokens(self, text: str, what: str) -> None:
        for token in self.control_tokens:
            if token in text:
                raise UserError(f"{what} contains the control token {token}: remove it or drop the row")


def forbidden_tokens(hf_dir: Path, vocabulary: dict[str, int]) -> tuple[int, ...]:
    """Return the ids that a response must not hold.

    Those are vision tokens, which would claim a picture that is not there, and the padding of the embedding.

    Args:
        hf_dir: checkpoint directory, for the size of the embedding.
        vocabulary: of the tokenizer, special tokens included.
    """
    size = vocabulary_size(hf_dir)
    vision = {vocabulary[token] for token in VISION_TOKENS if token in vocabulary}
    return tuple(sorted(vision | (set(range(size)) - set(vocabulary.values()))))


def expand_image_pads(
    token_ids: Sequence[int], image_token_id: int, grids: Sequence[tuple[int, int, int]]
) -> list[int]:
    """Return token ids in which each image-pad token stands as often as its picture has tokens.

    Args:
        token_ids: with one image-pad token per picture.
        image_token_id: the image-pad token.
        grids: of the pictures, in order.
    """
    expanded, remaining = [], iter(grids)
    for token in token_ids:
        expanded += [token] * num_image_tokens(next(remaining)) if token == image_token_id else [token]
    return expanded

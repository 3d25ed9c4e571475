"""Which files of a Hugging Face model directory are read, and by whose content an outside model is identified.

Path, README, .git, .cache, .DS_Store and the time stamps of a download do not count: a model that was moved or
downloaded again is the same model.
"""

import hashlib
import json
from pathlib import Path

from megatron_papo.errors import UserError
from megatron_papo.run.stage_output import file_hash, require_weights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SMALL_FILES = (
    "*config.json",  # model, generation, tokenizer, (pre)processor, adapter, quantisation
    "config.*.json",  # transformers takes these instead of config.json, tokenizer.json, where their versions ask for it
    "tokenizer.*.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
)
"""What transformers 5 and SGLang 0.5 look for beside the weights of a Qwen2.5-VL, and this package with them."""


def model_fingerprint(directory: Path, known: dict[str, str] | None = None) -> str:
    """Return the sha256 over name and content of the files of a model directory that are read.

    Args:
        directory: of a Hugging Face checkpoint that no stage made.
        known: file name -> sha256, of files that were hashed already.

    Raises UserError where weights are missing or a file cannot be read.
    """
    known = known or {}
    try:
        hashes = [(name, known.get(name) or file_hash(directory / name)) for name in files_read(directory)]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}): copy the model again")
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def files_read(directory: Path) -> list[str]:
    """Return the names, relative to the directory and sorted, of the files that this package, transformers or SGLang
    read."""
    if not directory.is_dir():
        raise UserError(f"{directory}: not there, or not a directory: give the directory of a Hugging Face checkpoint")
    files = {path for pattern in _SMALL_FILES for path in directory.glob(pattern) if path.is_file()}
    names = {path.relative_to(directory).as_posix() for path in files} | set(weight_files(directory))
    if (directory / INDEX).is_file():
        # Transformers prefers a single file to the index.
        names |= {INDEX, SINGLE} if (directory / SINGLE).is_file() else {INDEX}
    else:
        # SGLang then loads whatever ends so.
        names |= {path.name for path in directory.glob("*.safetensors")}
    return sorted(names)


def weight_files(directory: Path) -> list[str]:
    """Return the names of the safetensors files that the index names, or of the single one.

    Raises UserError where there are none, or one is missing.
    """
    require_weights(directory)
    if (directory / INDEX).is_file():
        files = sorted(set(read_index(directory / INDEX).values()))
        missing = [file for file in files if Path(file).name != file or not (directory / file).is_file()]
        if missing:
            raise UserError(
                f"{directory}: {', '.join(missing)} named in {INDEX} is not there: copy the checkpoint again"
            )
        return files
    if (directory / SINGLE).is_file():
        return [SINGLE]
    pickled = sorted(file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise UserError(
            f"{directory}: only pickled weights ({pickled[0]}), which can run code: save the model as safetensors"
        )
    raise UserError(f"{directory}: no {SINGLE} and no {INDEX}: give the directory of a Hugging Face checkpoint")


def read_index(path: Path) -> dict[str, str]:
    """Return tensor name -> file name, as an index says. Raises UserError where it is damaged."""
    try:
        index = {str(name): str(file) for name, file in json.loads(path.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged index ({in_short(error)}): copy the checkpoint again")
    if not index:
        raise UserError(f"{path}: names no tensor: copy the checkpoint again")
    return index


def in_short(error: Exception) -> str:
    """Return what an exception says on one line, without the data that some quote."""
    return " ".join(str(error).split())[:120] or type(error).__name__

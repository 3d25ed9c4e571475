"""Which files of a Hugging Face model directory are read, and by whose content an outside model is identified.

transformers, SGLang and this package choose among files by rules of their own. Where they would not see the same model
the directory is refused, naming the files.

Path, README, .git, .cache, .DS_Store and the time stamps of a download do not count: a model that was moved or
downloaded again is the same model.
"""

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path

from pydantic import BaseModel, Field

from megatron_papo.errors import UserError
from megatron_papo.reading import read_record, reading, shown
from megatron_papo.run.manifest import FileName, require_weights
from megatron_papo.run.stage_output import file_hash

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SMALL_FILES = (
    "*config.json",  # model, generation, tokenizer, (pre)processor
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


_RIVALS = {
    "config.*.json": "transformers may take it instead of config.json",
    "tokenizer.*.json": "transformers may take it instead of tokenizer.json",
    "adapter_config.json": "transformers would add the adapter to the model, SGLang would not",
    "hf_quant_config.json": "SGLang would take the weights for quantised ones",
    "quant*_config.json": "SGLang would take the weights for quantised ones",
}
"""Files beside a model by which one reader would see another model than the others."""


class _Index(BaseModel):
    """model.safetensors.index.json."""

    weight_map: dict[str, FileName] = Field(min_length=1)


def model_fingerprint(directory: Path, known: dict[str, str] | None = None) -> str:
    """Return the sha256 over name and content of the files of a model directory that are read.

    Args:
        directory: of a Hugging Face checkpoint that no stage made.
        known: file name -> sha256, of files that were hashed already.

    Raises UserError where weights are missing, a file cannot be read, or two readers would see two models.
    """
    known, hashes = known or {}, []
    for name in files_read(directory):
        with reading(directory / name, "copy the model again"):
            hashes.append((name, known.get(name) or file_hash(directory / name)))
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def files_read(directory: Path) -> list[str]:
    """Return the names, relative to the directory and sorted, of the files that this package, transformers or SGLang
    read. Raises UserError where these would not be the same model."""
    weights = weight_files(directory)
    files = {path for pattern in _SMALL_FILES for path in directory.glob(pattern) if path.is_file()}
    names = {path.relative_to(directory).as_posix() for path in files} | set(weights)
    return sorted(names | ({INDEX} if (directory / INDEX).is_file() else set()))


def weight_files(directory: Path) -> list[str]:
    """Return the names of the safetensors files that the index names, or of the single one.

    Raises UserError where there are none, one is missing, or another reader would load something else.
    """
    directory = Path(directory)
    with reading(directory, "give the directory of a Hugging Face checkpoint"):
        if not directory.is_dir():
            raise UserError(
                f"{directory}: not there, or not a directory: give the directory of a Hugging Face checkpoint (the name"
                " of one on the Hub is not taken; hf download NAME --local-dir DIR makes one)"
            )
        require_weights(directory)
        _require_files(directory)
        files = _weight_files(directory)
        _require_one_model(directory, files)
    return files


def _require_files(directory: Path) -> None:
    """Raise UserError where a name under which something is read is a link to nothing, or a directory."""
    patterns = ("*.safetensors", INDEX, *_SMALL_FILES)
    names = {path for path in directory.iterdir() if any(fnmatch(path.name, pattern) for pattern in patterns)}
    lines = []
    for path in sorted(path for path in names if not path.is_file() and not path.name.startswith(".")):
        if path.is_dir():
            lines.append(f"{path}: a directory where a file is expected: copy the checkpoint again")
        elif path.is_symlink():
            lines.append(f"{path}: a link to nothing: copy the checkpoint again, links followed")
        else:
            lines.append(f"{path}: not a file: copy the checkpoint again")
    if lines:
        raise UserError(*lines)


def require_one_model(directory: Path) -> None:
    """Raise UserError, naming the files, where transformers, SGLang and this package would not see the same model."""
    weight_files(directory)


def _weight_files(directory: Path) -> list[str]:
    if (directory / INDEX).is_file():
        files = sorted(set(read_index(directory / INDEX).values()))
        missing = [file for file in files if Path(file).name != file or not (directory / file).is_file()]
        if missing:
            names = shown(", ".join(missing))
            raise UserError(f"{directory}: {names} named in {INDEX} is not there: copy the checkpoint again")
        return files
    if (directory / SINGLE).is_file():
        return [SINGLE]
    others = sorted(file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".safetensors"))
    if any(name.endswith(".safetensors") for name in others):
        raise UserError(
            f"{directory}: {shown(', '.join(others))} but no {INDEX} that says what is where: copy the checkpoint again"
        )
    if others:
        raise UserError(
            f"{directory}: only pickled weights ({shown(others[0])}), which can run code: save the model as safetensors"
        )
    raise UserError(f"{directory}: no {SINGLE} and no {INDEX}: give the directory of a Hugging Face checkpoint")


def _require_one_model(directory: Path, weights: list[str]) -> None:
    there = INDEX if (directory / INDEX).is_file() else SINGLE
    loaded = f"{there} and the files it names" if there == INDEX else there
    rivals = dict.fromkeys(_other_weights(directory, weights), "SGLang or transformers may load it, too")
    for pattern, why in _RIVALS.items():
        rivals |= {path.name: why for path in directory.glob(pattern) if path.is_file()}
    if rivals:
        raise UserError(
            *(
                f"{directory}: {shown(name)} lies beside {loaded}: {why}: remove one of the two"
                for name, why in sorted(rivals.items())
            )
        )


def _other_weights(directory: Path, weights: list[str]) -> list[str]:
    """Return the names of the other safetensors files, hidden ones of a file browser left out."""
    kinds = (".safetensors", ".safetensors.index.json")
    names = (path.name for path in directory.iterdir() if path.name.lower().endswith(kinds))
    return [name for name in names if name not in {*weights, INDEX} and not name.startswith(".")]


def read_index(path: Path) -> dict[str, str]:
    """Return tensor name -> file name, as an index says. Raises UserError where it is damaged."""
    return dict(read_record(path, _Index, "damaged index: copy the checkpoint again").weight_map)

"""README.md of an exported checkpoint: how it was trained, from the manifest of the Megatron checkpoint that it was
made from."""

from pathlib import Path

import yaml

from megatron_papo.checkpoint.convert import MegatronCheckpoint
from megatron_papo.run.describing import describes
from megatron_papo.run.manifest import Manifest

README = "README.md"
BASE_CARD = "README_base_model.md"
"""The card of the model that training started from, kept beside the new one."""
_CARRIED = ("license", "license_name", "license_link", "language", "base_model")
_LONGEST_FRONT = 1 << 16
"""Bytes of a card that are looked at."""
_SETTINGS = (
    "objective",
    "masked_image",
    "optimizer",
    "training.global_batch_size",
    "rollout.rollout_batch_size",
    "rollout.group_size",
    "rollout.temperature",
    "rollout.top_p",
    "rollout.max_response_tokens",
    "data.min_pixels",
    "data.max_pixels",
    "data.resize",
    "data.transparency",
    "model.dtype",
    "seed",
)


def write_model_card(directory: Path, manifest: Manifest | None, checkpoint: MegatronCheckpoint) -> None:
    """Write the card of a trained checkpoint into `directory`; one that was only converted keeps the card it came with.

    Args:
        directory: of the export.
        manifest: of the Megatron checkpoint; None where it has none.
        checkpoint: the Megatron checkpoint.

    The card describes, no more: one that cannot be made is left out, and the base model's stays.
    """
    with describes(f"{directory / README}: how the model was trained"):
        _write_model_card(directory, manifest, checkpoint)


def _write_model_card(directory: Path, manifest: Manifest | None, checkpoint: MegatronCheckpoint) -> None:
    step = checkpoint.stored.common.get("state", {}).get("step")
    if step is None:
        return
    path = directory / README
    front: dict[str, object] = {}
    if path.is_file():
        with describes(f"{path}: license and language of the base model"):
            front = _front_matter(path)
    text = model_card(checkpoint, step, manifest, front, path.is_file() or (directory / BASE_CARD).exists())
    if path.is_file():
        path.rename(directory / BASE_CARD)
    path.write_text(text, encoding="utf-8")


def model_card(
    checkpoint: MegatronCheckpoint, step: int, manifest: Manifest | None, front: dict[str, object], has_base_card: bool
) -> str:
    """Return the text of the card.

    Args:
        checkpoint: the Megatron checkpoint.
        step: how many optimizer steps it has behind it.
        manifest: of the Megatron checkpoint.
        front: what the base model's card says in its front matter and the new one repeats.
        has_base_card: whether the base model's card lies beside the new one.
    """
    parameters = sum(info.num_bytes // info.dtype.itemsize for info in checkpoint.tensors.values())
    front = {
        **front,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["papo", "qwen2_5_vl"],
    }
    rows = [] if manifest is None else _rows(manifest.recipe.config)
    iteration = None if manifest is None else manifest.recipe.arguments.get("iteration")
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# Qwen2.5-VL, {parameters / 1e9:.2f} billion parameters, trained with PAPO",
        "",
        "Trained with PAPO (Perception-Aware Policy Optimization, [arXiv"
        " 2507.06448](https://arxiv.org/abs/2507.06448)) by megatron_papo on",
        f"megatron-core: {step} optimizer steps" + (f", {iteration} iterations." if iteration else "."),
        "",
        "Load it with `transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained`, SGLang or vLLM: names,"
        " config.json, tokenizer and",
        "processor files are those of the checkpoint that training started from"
        + (f" (its own card is {BASE_CARD})." if has_base_card else "."),
        "proof.json says how it was verified against the training checkpoint.",
        "",
    ]
    if rows:
        lines += [
            "| setting of the last iteration | value |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in rows),
            "",
        ]
    if manifest:
        lines += [
            f"Training checkpoint: fingerprint `{manifest.fingerprint}`, code at git commit `{manifest.git_commit}`.",
            "",
        ]
    return "\n".join(lines)


def _rows(config: dict) -> list[tuple[str, str]]:
    """Return dotted name and value of the settings that say how it was trained; of a section, all that is in it."""
    rows: list[tuple[str, str]] = []
    for name in _SETTINGS:
        value = config.get(name)
        if value is None:
            section, _, key = name.partition(".")
            value = (config.get(section) or {}).get(key) if key else None
        if isinstance(value, dict):
            rows += [(f"{name}.{key}", _shown(item)) for key, item in value.items()]
        elif value is not None:
            rows.append((name, _shown(value)))
    return rows


def _shown(value: object) -> str:
    return str("null" if value is None else value).replace("|", "\\|").replace("\n", " ")


def _front_matter(path: Path) -> dict[str, object]:
    """Return what the new card repeats of the YAML block that a card on the Hub begins with, as the text that stands
    there: nothing is taken for a date, a number or `no`. {} where there is none. Raises what a damaged one raises."""
    with open(path, "rb") as stream:
        text = stream.read(_LONGEST_FRONT).decode("utf-8", "replace").replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return {}
    block = yaml.load(text[4 : text.index("\n---", 3)], yaml.BaseLoader)
    carried = {key: block[key] for key in _CARRIED if key in block}
    return {key: value for key, value in carried.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    """Say whether a value is text or a list of texts."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))

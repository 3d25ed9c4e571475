"""config.json in the flat spelling of the published checkpoints, which transformers 4.5x and 5, SGLang and vLLM read
alike.

transformers 4.5x writes the text model's fields into text_config, transformers 5 also renames them (rope_parameters,
dtype); neither reads all that the other wrote: 4.57 fails on a file of 5.x, 5.12 loses the tie flag of a file of 4.57
and loads a random output layer.
"""

import json
from pathlib import Path

_NESTED_ONLY = {"model_type", "architectures", "layer_types", "_name_or_path"}
"""Keys of text_config that have no place, or another meaning, at top level."""


def flatten(directory: Path, tied: bool) -> None:
    """Rewrite directory/config.json if it is nested; a flat one stays as it is, byte by byte."""
    path = directory / "config.json"
    tree = json.loads(path.read_text())
    if tree.get("text_config"):
        path.write_text(json.dumps(flat(tree, tied), indent=2) + "\n")


def flat(tree: dict, tied: bool) -> dict:
    """Return the flat spelling of a nested configuration; tied: its tie flag, which stands in different places."""
    top = {key: value for key, value in tree.items() if key not in ("text_config", "vision_config")}
    text = {key: value for key, value in tree["text_config"].items() if key not in _NESTED_ONLY}
    merged = {**text, **{key: value for key, value in top.items() if value is not None or key not in text}}
    rope = merged.pop("rope_parameters", None) or {
        **(merged.get("rope_scaling") or {}),
        "rope_theta": merged.get("rope_theta"),
    }
    merged["rope_theta"] = rope["rope_theta"]
    merged["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    if "dtype" in merged:
        merged["torch_dtype"] = merged.pop("dtype")
    merged["tie_word_embeddings"] = tied
    merged["architectures"] = [
        "Qwen2_5_VLForConditionalGeneration"
    ]  # 4.57 writes it into text_config; servers look for it at top level
    return {**merged, "vision_config": _vision(tree["vision_config"])}


def _vision(fields: dict) -> dict:
    """Return the vision section with both spellings of the number of channels; dtypes are those of the whole."""
    channels = fields.get("in_channels") or fields.get("in_chans") or 3
    kept = {key: value for key, value in fields.items() if key not in ("dtype", "torch_dtype", "model_type")}
    return {**kept, "in_channels": channels, "in_chans": channels}

"""Tensor names: those of Qwen2_5_VLForConditionalGeneration in memory, and the official ones of checkpoint files."""

_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."), ("lm_head.", "lm_head."))


def official_name(name: str) -> str:
    """`model.language_model.norm.weight` -> `model.norm.weight`, as transformers' save_pretrained does. Raises KeyError."""
    for in_memory, official in _PREFIXES:
        if name.startswith(in_memory):
            return official + name.removeprefix(in_memory)
    raise KeyError(name)

"""Which layouts a model can be cut into."""

import math
from collections.abc import Iterator

from megatron_papo.config import ParallelConfig
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig


def check_parallel_sizes(hf: HFConfig, parallel: ParallelConfig) -> None:
    """Raise UserError, a line for each size that cannot be cut so.

    Whatever passes here builds. A spread vision tower need not be cut.
    """
    lines = list(_problems(hf, parallel))
    if lines:
        raise UserError(*lines)


def _problems(hf: HFConfig, parallel: ParallelConfig) -> Iterator[str]:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    rows = [
        ("text attention heads", hf.text.num_heads),
        ("text MLP width", hf.text.intermediate_size),
        ("vocabulary", hf.text.vocab_size),
    ]
    vision_rows = [
        ("vision attention heads", hf.vision.num_heads),
        ("vision MLP width", hf.vision.intermediate_size),
        ("vision merger width", hf.vision.hidden_size * hf.vision.spatial_merge_size**2),
    ]
    groups = hf.text.num_kv_groups
    cut = rows + (vision_rows if parallel.vision_tower == "sharded" else [])
    divisor = math.gcd(tp, groups, *(size for _, size in cut))
    cure = f"choose a divisor of all such sizes: --set parallel.tensor_model_parallel_size={divisor}"
    for what, size in rows:
        if size % tp:
            yield f"parallel.tensor_model_parallel_size {tp} does not divide the {what} {size}: {cure}"
    if groups % tp and tp % groups:
        yield (
            f"parallel.tensor_model_parallel_size {tp} is neither a divisor nor a multiple of the {groups} key-value"
            f" groups: {cure}"
        )
    for what, size in vision_rows if parallel.vision_tower == "sharded" else ():
        if size % tp:
            yield (
                f"parallel.tensor_model_parallel_size {tp} does not divide the {what} {size}: {cure}, or"
                " --set parallel.vision_tower=spread, which keeps the tower whole"
            )
    if hf.text.num_layers % pp:
        yield (
            f"parallel.pipeline_model_parallel_size {pp} does not divide the {hf.text.num_layers} text layers: choose"
            f" a divisor: --set parallel.pipeline_model_parallel_size={math.gcd(pp, hf.text.num_layers)}"
        )

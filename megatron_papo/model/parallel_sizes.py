"""Which layouts a model can be cut into."""

from megatron_papo.config import ParallelConfig
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig


def check_parallel_sizes(hf: HFConfig, parallel: ParallelConfig) -> None:
    """Raise UserError, one line, if the model cannot be cut so.

    Whatever passes here builds. A spread vision tower need not be cut.
    """
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
    for what, size in rows:
        if size % tp:
            raise UserError(
                f"parallel.tensor_model_parallel_size {tp} does not divide the {what} {size}: choose a divisor"
            )
    groups = hf.text.num_kv_groups
    if groups % tp and tp % groups:
        raise UserError(
            f"parallel.tensor_model_parallel_size {tp} is neither a divisor nor a multiple of the {groups} key-value"
            " groups: choose one"
        )
    for what, size in vision_rows if parallel.vision_tower == "sharded" else ():
        if size % tp:
            raise UserError(
                f"parallel.tensor_model_parallel_size {tp} does not divide the {what} {size}: choose a divisor,"
                " or parallel.vision_tower spread, which keeps the tower whole"
            )
    if hf.text.num_layers % pp:
        raise UserError(
            f"parallel.pipeline_model_parallel_size {pp} does not divide the {hf.text.num_layers} text layers: choose"
            " a divisor"
        )

"""What a training step computes: tokens, model FLOPs, and, on GPUs, how much of the device that uses.

Model FLOPs are those of the matrix products that the layout needs, as in PaLM (arXiv 2204.02311, appendix B): a
multiplication with its addition is 2; the backward pass is twice the forward pass; what is computed again to save
memory (model.recompute, the output layer's chunks) does not count, nor do padding, norms, rotary angles, softmax and
the loss. Differs from PaLM's 6N + 12LHQT per token: each product is counted, attention by the (query, key) pairs that
are really wanted instead of T^2, and the output layer where it is applied.

For a decoder with L layers, width h, H heads and G key-value groups of d, MLP width f, vocabulary V, one forward pass
is

    L (tokens (2 h (H + 2 G) d  +  2 H d h  +  6 h f)  +  pairs 4 H d)  +  2 h V responses
                QKV                output      MLP              scores, values      output layer

and for a vision tower with D layers, width w, MLP width m, patches of c numbers, cells of k = 4 patches, decoder width
h

    patches (2 c w  +  D (8 w^2 + 6 w m))  +  4 w sum over layers of pairs  +  cells (2 (k w)^2 + 2 k w h)
             embedding    QKV, output, MLP        scores, values                merger

What model.freeze takes away does not count: the backward pass of a frozen tower, gradients of frozen weights. A frozen
tower's forward passes are those that were really made (training/encoded_pictures.py), each picture by itself.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain

import torch

from megatron_papo.config import Config, ObjectiveConfig, TrainingConfig
from megatron_papo.distributed import collectives
from megatron_papo.model.hf_config import HFConfig, TextConfig, VisionConfig
from megatron_papo.training.collator import Kind, Pictures, kinds_of
from megatron_papo.training.layouts import layout_of
from megatron_papo.training.rows import Grid, TrainingRollout
from megatron_papo.training.views import rows_as_seen

BACKWARD = 2
"""FLOPs of the backward pass over those of the forward pass."""
PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}
"""Dense bf16 FLOP/s by words of the device's name, the first that fit: NVIDIA's data sheets, half of what they give
with sparsity."""


def attention_pairs(prompt: int, responses: Iterable[int]) -> int:
    """Return the number of (query, key) pairs of a prompt and its responses, given by their lengths.

    Each token sees itself; the prompt is causal, a response sees all of the prompt and, causally, itself.
    """
    return prompt * (prompt + 1) // 2 + sum(length * prompt + length * (length + 1) // 2 for length in responses)


def decoder_flops(text: TextConfig, tokens: int, pairs: int, responses: int) -> int:
    """Return the FLOPs of one forward pass through the decoder.

    Args:
        text: its sizes.
        tokens: positions.
        pairs: of attention_pairs.
        responses: positions that reach the output layer.
    """
    queries, keys = text.num_heads * text.head_dim, text.num_kv_groups * text.head_dim
    per_token = (
        2 * text.hidden_size * (queries + 2 * keys)
        + 2 * queries * text.hidden_size
        + 6 * text.hidden_size * text.intermediate_size
    )
    return (
        text.num_layers * (tokens * per_token + pairs * 4 * queries)
        + responses * 2 * text.hidden_size * text.vocab_size
    )


def vision_flops(vision: VisionConfig, grid: Grid) -> int:
    """Return the FLOPs of one forward pass of one picture of (1, rows, columns) patches through the vision tower and
    the merger after it."""
    return tower_flops(vision, grid) + sum(merger_flops(vision, grid))


@lru_cache(maxsize=1 << 16)
def tower_flops(vision: VisionConfig, grid: Grid) -> int:
    """Return the FLOPs of one forward pass of one picture up to the merger."""
    width = vision.hidden_size
    patches = grid[0] * grid[1] * grid[2]
    full = sum(layer in vision.full_attention_layers for layer in range(vision.depth))
    pairs = full * patches**2 + (vision.depth - full) * window_pairs(vision, grid)
    per_patch = 2 * vision.patch_values * width + vision.depth * (8 * width**2 + 6 * width * vision.intermediate_size)
    return patches * per_patch + pairs * 4 * width


def merger_flops(vision: VisionConfig, grid: Grid) -> tuple[int, int]:
    """Return the FLOPs of one forward pass of one picture through the merger's two linear maps."""
    merge = vision.spatial_merge_size**2
    cell, cells = merge * vision.hidden_size, _patches([grid]) // merge
    return cells * 2 * cell**2, cells * 2 * cell * vision.out_hidden_size


def vision_backward_flops(vision: VisionConfig, grid: Grid, frozen: Sequence[str]) -> int:
    """Return the FLOPs of the backward pass of one picture through merger and tower: gradients of the weights, and of
    what goes in where that comes from something that is trained. frozen: model.freeze."""
    first, second = merger_flops(vision, grid)
    trains_tower, trains_merger = "vision_tower" not in frozen, "merger" not in frozen
    of_weights = trains_merger * (first + second)
    of_inputs = (trains_tower or trains_merger) * second + trains_tower * first
    return of_weights + of_inputs + trains_tower * BACKWARD * tower_flops(vision, grid)


def window_pairs(vision: VisionConfig, grid: Grid) -> int:
    """Return the number of (query, key) pairs of one picture's patches in their windows, which are smaller at the right
    and lower edge."""
    side = vision.window_size // vision.patch_size // vision.spatial_merge_size * vision.spatial_merge_size
    rows, columns = ([side] * (length // side) + [length % side] for length in grid[1:])
    return sum(height**2 for height in rows) * sum(width**2 for width in columns)


@dataclass(frozen=True)
class Pass:
    """One pass of the model over the rollouts of one or more optimizer steps."""

    pictures: Pictures
    """As Collator.plan and Collator.collate take it."""
    micro_batch_size: int
    with_gradient: tuple[Kind, ...] = ()
    """original, masked: the rows whose forward pass is followed by a backward pass that anybody wants."""
    steps: slice = field(default_factory=lambda: slice(None))
    """Of the optimizer steps that are accounted for together, those whose rollouts it goes over."""


def sweeps(pictures: Sequence[Pictures], training: TrainingConfig, steps: slice = slice(None)) -> list[Pass]:
    """Return the passes without gradient over rows with these pictures: ["original", "masked"] for old policy and
    masked branch."""
    return [Pass(kind, training.log_prob_micro_batch_size, steps=steps) for kind in pictures]


def update(objective: ObjectiveConfig, training: TrainingConfig) -> Pass:
    """Return the forward and backward pass of an optimizer step. Twins that ride for their logits alone count as a
    forward pass."""
    size = training.micro_batch_size
    if not objective.masked_rows_ride:
        return Pass("original", size, ("original",))
    if objective.uses_kept_image:
        return Pass("all", size, ("original", "masked", "kept"))
    if objective.masked_branch == "recompute_with_grad":
        return Pass("both", size, ("original", "masked"))
    return Pass("both", size, ("original",))


@dataclass
class Work:
    """Counts of some passes, over all ranks."""

    tokens: int = 0
    """Positions of the decoder that hold a token; a twin's are others."""
    padding: int = 0
    """Positions that hold none and are computed all the same."""
    patches: int = 0
    """That go through the vision tower."""
    model_flops: int = 0


def work_of(rows: Sequence[TrainingRollout], one_pass: Pass, config: Config, hf: HFConfig) -> Work:
    """Return the counts of one pass over the rollouts of one data-parallel rank, by the micro-batches that the layout
    makes of them; without a frozen tower's, which does not encode a picture once per pass."""
    parallel, layout, work = config.parallel, layout_of(config.training), Work()
    frozen = config.model.freeze
    multiple = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    kinds = kinds_of(one_pass.pictures)
    if len(kinds) == 1:
        rows = rows_as_seen(rows, kinds[0], config, hf)
    for part in layout.plan(rows, one_pass.micro_batch_size, len(kinds)):
        in_rows = layout.row_lengths(part)
        tokens = sum(in_rows)
        positions = len(in_rows) * -(-max(in_rows) // multiple) * multiple
        pairs = sum(attention_pairs(prompt, responses) for prompt, responses in layout.lengths(part))
        responses = sum(row.response_length for row in part)
        decoder = decoder_flops(hf.text, tokens, pairs, responses)
        backward = BACKWARD * decoder
        if hf.tie_word_embeddings and "embeddings" in frozen:  # the output layer's weights
            backward -= 2 * hf.text.hidden_size * hf.text.vocab_size * responses
        for kind in kinds:
            grids = _distinct_pictures(part, kind)
            work.tokens += tokens
            work.padding += positions - tokens
            work.model_flops += decoder + sum(sum(merger_flops(hf.vision, grid)) for grid in grids)
            if "vision_tower" not in frozen:
                work.patches += _patches(grids)
                work.model_flops += sum(tower_flops(hf.vision, grid) for grid in grids)
            if kind in one_pass.with_gradient:
                work.model_flops += backward
                work.model_flops += sum(vision_backward_flops(hf.vision, grid, frozen) for grid in grids)
    return work


def _distinct_pictures(part: Sequence[TrainingRollout], kind: Kind) -> list[Grid]:
    """Return the grids of what Collator sends through the vision tower for a micro-batch."""
    distinct = {
        (*row.rollout.images, None if kind == "original" else row.rollout.masked_image_seed): row.grids for row in part
    }
    return [grid for grids in distinct.values() for grid in grids]


def _patches(grids: Iterable[Grid]) -> int:
    return sum(time * rows * columns for time, rows, columns in grids)


def _tokens(rows: Iterable[TrainingRollout]) -> int:
    return sum(len(row.prompt_token_ids) + row.response_length for row in rows)


def step_accounting(
    steps: Sequence[Sequence[TrainingRollout]],
    config: Config,
    hf: HFConfig,
    passes: Sequence[Pass],
    seconds: float,
    device: str | None = None,
    encoded: Sequence[Grid] = (),
) -> dict[str, float]:
    """Return metrics of the passes that the rows of these optimizer steps went through together.

    Args:
        steps: the rows of each, those of all data-parallel ranks: one step for an update, all steps of an iteration for
            a sweep over it.
        config: layout, parallel sizes, dtype.
        hf: the model.
        passes: what the rows went through.
        seconds: how long that took.
        device: device_name().
        encoded: pictures that a frozen tower has encoded meanwhile, on all data-parallel ranks.

    Everything is over all ranks:

        tokens_computed    tokens through the decoder, all passes and twins; image tokens included, padding not
        padding_tokens     positions on top of them that hold no token
        tokens_naive       the same passes with a row per rollout, each twin a pass of its own
        patches_computed   patches through the vision tower, all passes
        patches_naive      with every picture once per rollout and pass
        model_flops        see the module; of the work in the layout used, a prompt that is repeated because its
                           group was cut included
        tokens_per_second  prompt and response tokens of the rollouts, each rollout once whatever the passes, per second
        mfu                model_flops / (seconds * ranks * peak of the device): only in bfloat16 on a device that
                           PEAK_FLOPS knows
    """
    rows, ranks = [row for step in steps for row in step], config.parallel.data_parallel_size
    layout = layout_of(config.training)
    by_step = [layout.split_over_ranks(step, ranks) for step in steps]
    shares = [  # of each rank: its rollouts of each step
        [[step[position] for position in split[rank]] for step, split in zip(steps, by_step, strict=True)]
        for rank in range(ranks)
    ]
    works = [
        work_of(list(chain.from_iterable(share[one_pass.steps])), one_pass, config, hf)
        for one_pass in passes
        for share in shares
    ]
    naive = [
        row
        for one_pass in passes
        for _ in kinds_of(one_pass.pictures)
        for row in chain.from_iterable(steps[one_pass.steps])
    ]
    flops = sum(work.model_flops for work in works) + sum(tower_flops(hf.vision, grid) for grid in encoded)
    metrics = {
        "tokens_computed": sum(work.tokens for work in works),
        "padding_tokens": sum(work.padding for work in works),
        "tokens_naive": _tokens(naive),
        "patches_computed": sum(work.patches for work in works) + _patches(encoded),
        "patches_naive": sum(_patches(row.grids) for row in naive),
        "model_flops": flops,
        "tokens_per_second": _tokens(rows) / seconds,
    }
    peak = peak_flops(device)
    if peak is not None and config.model.dtype == "bfloat16":
        metrics["mfu"] = flops / (seconds * config.parallel.world_size * peak)
    return {name: float(value) for name, value in metrics.items()}


def peak_flops(device: str | None) -> float | None:
    """Return the dense bf16 FLOP/s of a device by its name; None for one that is not known, and for a MIG slice, which
    is a part of one."""
    if device is None or "MIG" in device:
        return None
    return next((flops for words, flops in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", device)), None)


def device_name() -> str | None:
    """Return the name of this process's GPU; None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_memory() -> dict[str, float]:
    """Return peak_memory_bytes, the most that tensors held on any rank since the call before; {} without GPUs. All
    ranks call it together."""
    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"peak_memory_bytes": float(collectives.max_over_ranks(peak))}

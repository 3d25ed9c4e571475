"""One micro-batch through the pipeline: log-probs of the response tokens, without gradient or as part of the PAPO loss."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_papo.config import ObjectiveConfig
from megatron_papo.model.log_probs import vocab_parallel_log_probs
from megatron_papo.objective.papo_loss import papo_loss
from megatron_papo.training import parallel
from megatron_papo.training.batching import Collator, MicroBatch, Row, pad_responses


def response_log_probs(logits: Tensor, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """[b, s, V / tp] -> log-probs of the response tokens and entropy of their distributions, [b, T] each, zeros on padding."""
    predicting = logits.flatten(0, 1)[batch.response_positions].float() / temperature
    per_token = vocab_parallel_log_probs(predicting, batch.response_tokens, parallel.tp_group())
    return tuple(pad_responses([values], batch.response_mask) for values in per_token)


def _run(model, batches: Iterable[MicroBatch], num_micro_batches: int, on_output: Callable, forward_only: bool) -> list:
    def forward_step(iterator: Iterator[MicroBatch], model):
        batch = next(iterator)
        output = model(batch.input_ids, batch.position_ids, batch.pixel_values, batch.image_grids)
        return output, partial(on_output, batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=num_micro_batches,
        seq_length=0,  # shapes travel with each micro-batch (variable_seq_lengths)
        micro_batch_size=0,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def compute_log_probs(
    model, collator: Collator, rows: Sequence[Row], micro_batch_size: int, temperature: float, progress: Callable[[int], None], masked: bool = False
) -> list[Tensor]:
    """Log-probs of every row's response under the model, without gradient. -> one fp32 [response_length] per row on the last stage, else [].

    masked: given the masked images. Collective over the model-parallel group.
    """

    def collect(batch: MicroBatch, logits: Tensor, non_loss_data: bool):
        log_probs, _ = response_log_probs(logits, batch, temperature)
        progress(len(batch.rows))
        return [values[: row.response_length] for values, row in zip(log_probs, batch.rows)]

    if not rows:
        return []
    with torch.no_grad():
        batches = collator.batches(rows, micro_batch_size, masked=masked)
        collected = _run(model, batches, -(-len(rows) // micro_batch_size), collect, forward_only=True)
    return [values for batch in collected for values in batch]


def papo_step(
    model,
    collator: Collator,
    rows: Sequence[Row],
    cached: dict[str, list[Tensor]],
    micro_batch_size: int,
    temperature: float,
    objective: ObjectiveConfig,
    *,
    num_tokens: int,
    num_sequences: int,
    progress: Callable[[int], None],
) -> dict[str, Tensor]:
    """Forward and backward of one optimizer step over this rank's rows; gradients end in the DDP buffers.

    cached: per-row log-probs (old_log_probs, ref_log_probs, masked_image_log_probs), on the last stage. num_tokens, num_sequences: of
    the whole step, all data-parallel ranks. Returns this rank's contributions to the metrics ({} before the last stage).
    """
    num_micro_batches = -(-len(rows) // micro_batch_size)
    # the schedule divides by the number of micro-batches and DDP by the data-parallel size; the weights of the loss already hold both
    scale = num_micro_batches * parallel.dp_group().size()
    settings = objective.model_dump(exclude={"advantage"})  # the rest are papo_loss's options, by name

    def loss(batch: MicroBatch, logits: Tensor):
        log_probs, entropy = response_log_probs(logits, batch, temperature)
        advantages = torch.tensor([[row.advantage] for row in batch.rows], device=logits.device)
        value, metrics = papo_loss(
            log_probs,
            advantages=advantages,
            response_mask=batch.response_mask,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            **batch.log_probs,
            **settings,
        )
        metrics["entropy"] = entropy.sum() / max(num_tokens, 1)
        progress(len(batch.rows))
        return value * scale, metrics

    def batches() -> Iterator[MicroBatch]:
        for number, batch in enumerate(collator.batches(rows, micro_batch_size)):
            here = slice(number * micro_batch_size, number * micro_batch_size + len(batch.rows))
            if parallel.is_last_stage():
                batch.log_probs = {name: pad_responses(values[here], batch.response_mask) for name, values in cached.items()}
            yield batch

    per_batch = _run(model, batches(), num_micro_batches, loss, forward_only=False)
    return {name: sum(metrics[name] for metrics in per_batch) for name in per_batch[0]} if per_batch else {}

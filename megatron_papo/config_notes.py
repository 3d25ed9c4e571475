"""What a person should be told about a configuration before a run starts."""

from megatron_papo.config import Config


def notes(config: Config) -> list[str]:
    """Return one sentence for each setting that does less than its name promises; none of them is a mistake."""
    objective, training = config.objective, config.training
    found = []
    if objective.masked_image_entropy_coef > 0 and objective.masked_branch != "recompute_with_grad":
        as_published = " (as published)" if objective.masked_branch == "cached" else ""
        found.append(
            f"objective.masked_image_entropy_coef {objective.masked_image_entropy_coef} reaches no gradient with"
            f" objective.masked_branch {objective.masked_branch}{as_published}: it changes the logged loss alone;"
            " recompute_with_grad trains on it"
        )
    if training.max_tokens_per_micro_batch is not None and training.layout == "plain":
        found.append(
            f"training.max_tokens_per_micro_batch {training.max_tokens_per_micro_batch} is not read with"
            " training.layout plain: the two micro-batch sizes are"
        )
    return found


def bytes_on_disk(config: Config, parameters: int) -> int:
    """Return the most bytes that the checkpoints of a run take at once, the one that is being written included.

    A checkpoint with optimizer holds the weights and, in float32, Adam's two moments and (where the weights are
    bfloat16) main parameters. Rollouts, pictures, predictions and logs come on top: below 0.1 MB a rollout.

    Args:
        config: Its cadence, dtype and sft section are read.
        parameters: Number of the model's parameters.
    """
    weights, checkpoint = 2 if config.model.dtype == "bfloat16" else 4, bytes_of_checkpoint(config, 1)
    kept = config.keep_checkpoints
    if kept is not None:
        kept = max(kept, config.hacking_guard.rollback_iterations + 1) + config.keep_best + 1
    exports = None if config.keep_exports is None else config.keep_exports + config.keep_best + 1
    start = 1 if config.sft is None else 2  # the reference of stage 3, the cold start of stage 2
    return parameters * (
        _at_most(kept, config.iterations) * checkpoint + (_at_most(exports, config.iterations) + start) * weights
    )


def bytes_of_checkpoint(config: Config, parameters: int) -> int:
    """Return the bytes of one checkpoint with optimizer, see bytes_on_disk."""
    return parameters * (14 if config.model.dtype == "bfloat16" else 12)


def _at_most(kept: int | None, iterations: int) -> int:
    return iterations if kept is None else min(kept, iterations)

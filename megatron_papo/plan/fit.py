"""Layouts that fit so many GPUs: all that divide the model, the fastest first, and traced in that order until enough
are found that fit.

Seconds need no trace, so what would be slow is never traced. What arithmetic alone shows to be too large is not traced
either (least_bytes), nor what holds more than a layout of its kind that did not fit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from megatron_papo.config import Config
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.model.parallel_sizes import check_parallel_sizes
from megatron_papo.plan import estimates
from megatron_papo.plan.estimates import Flops
from megatron_papo.plan.layers import Asked, Traces, shares_of
from megatron_papo.plan.memory import allowance
from megatron_papo.plan.plan import Plan, Question, as_on_gpus, beside, first_ranks, plan_of, problems_of_server
from megatron_papo.plan.seconds import GPUS_OF_NODE, Seconds, seconds_of
from megatron_papo.plan.trace import Numbers
from megatron_papo.plan.workload import Lengths, copies_in_update, fullest

SIZES = (1, 2, 4, 8)
"""Of tensor and of pipeline parallelism."""
FACTORS = (0.5, 1, 2)
"""Of the configured micro-batch."""
REQUESTS = 128
"""Under way at once on each server, at least."""
SHARED = {"checkpoint_every": 1, "save_while_sampling": False, "export_directory": None}
"""What sharing GPUs excludes otherwise: training gives them up after each iteration, and loads its checkpoint again."""


@dataclass(frozen=True)
class Candidate:
    """A configuration whose layout divides the model, and its estimated seconds."""

    config: Config
    seconds: Seconds

    @property
    def kind(self) -> tuple:
        """Return what tells layouts apart that are worth a line of their own: not micro-batch, recompute, servers'
        size."""
        parallel, server = self.config.parallel, self.config.server
        return (*parallel.model_dump().values(), server.shares_gpus)

    @property
    def size(self) -> tuple[int, ...]:
        """Return what makes a layout of a kind hold more, number by number."""
        training = self.config.training
        tokens = training.max_tokens_per_micro_batch or 0 if training.layout == "group" else 0
        return self.config.model.recompute == "none", tokens, training.micro_batch_size


def check_gpus(gpus: int) -> None:
    """Raise UserError where so many GPUs are no node, and no number of nodes."""
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: give the number of GPUs, at least 1")
    if gpus > GPUS_OF_NODE and gpus % GPUS_OF_NODE:
        raise UserError(
            f"--gpus {gpus}: of several nodes with {GPUS_OF_NODE} GPUs each: give a multiple of {GPUS_OF_NODE}"
        )


def candidates(config: Config, hf: HFConfig, gpus: int, question: Question) -> list[Candidate]:
    """Return all layouts of so many GPUs that divide the model and may fit, the fastest first.

    Of several nodes the first one samples and the others train, as stages/submit.slurm has it; on one node the GPUs are
    shared, or some of them sample.
    """
    flops = _flops_by_micro_batch(hf, question)
    found = []
    for changes in _changes(config, gpus):
        changed = as_on_gpus(_changed(config, changes))
        server = estimates.server_share(changed, hf, question.gpu_bytes)
        if problems_of_server(server, changed, question.gpu_bytes) or not _divides(hf, changed):
            continue
        least = least_bytes(changed, hf)
        if least + allowance(least, changed) + beside(changed) > question.gpu_bytes:
            continue
        work = flops(changed)
        seconds = seconds_of(changed, hf, question.usual, work, question.gpu_bytes, question.mfu, question.gpu)
        found.append(Candidate(changed, seconds))
    best: dict[tuple, Candidate] = {}  # by what is traced: of the servers' sizes the fastest
    for each in sorted(found, key=lambda candidate: candidate.seconds.iteration):
        best.setdefault((each.kind, each.size), each)
    return list(best.values())


def fitting(
    found: Sequence[Candidate], hf: HFConfig, question: Question, traces: Traces, count: int, at_once: int
) -> Iterator[tuple[Candidate, Plan]]:
    """Yield each candidate that is traced, with its plan, until `count` fit, one of a kind.

    Args:
        found: Of candidates().
        hf: The model.
        question: Its ranks are those of each candidate's layout.
        traces: Makes them.
        count: How many are to fit.
        at_once: Candidates whose traces are asked for together.
    """
    left, fit = list(found), 0
    while left and fit < count:
        wave: list[Candidate] = []
        for each in list(left):
            if len(wave) == at_once:
                break
            if any(each.kind == other.kind for other in wave):
                continue
            if _is_valid(each.config):
                wave.append(each)
            else:
                left.remove(each)
        prefetched = _together(wave, hf, question, traces)
        for each in wave:
            left.remove(each)
            plan = plan_of(each.config, hf, replace(question, ranks=first_ranks(each.config)), prefetched)
            if plan.fits:
                fit += 1
                left = [other for other in left if other.kind != each.kind]
            else:
                left = [other for other in left if other.kind != each.kind or not _holds_more(other, each)]
            yield each, plan
            if fit == count:
                return


def _holds_more(other: Candidate, than: Candidate) -> bool:
    return all(mine >= yours for mine, yours in zip(other.size, than.size, strict=True))


def _together(wave: Sequence[Candidate], hf: HFConfig, question: Question, traces: Traces) -> Traces:
    """Return what knows the traces of all these candidates, asked for at once."""
    asked = [
        share.asked
        for each in wave
        for rank in first_ranks(each.config)
        for share in shares_of(each.config, hf, rank, question.exact)
    ]
    made = list(zip(asked, traces(asked), strict=True))

    def known(wanted: Sequence[Asked]) -> list[Numbers]:
        return [next(numbers for each, numbers in made if each == one) for one in wanted]

    return known


def least_bytes(config: Config, hf: HFConfig) -> int:
    """Return what the first pipeline stage holds at least, without a trace: parameters, gradients and optimizer, and
    what is kept of each layer for the backward pass (with recompute its input; else at least what norms, rotation,
    matrix products and the gate need)."""
    parallel, text, vision = config.parallel, hf.text, hf.vision
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    element = estimates.bytes_of_number(config)
    held = estimates.parameters_of(hf) / (tensor * stages) * (element + 4 + 12 / parallel.data_parallel_size)
    if config.model.freeze:
        return int(held / 2)
    copies = copies_in_update(config)
    worst = fullest(config, copies)[-1]
    rows = prompts_at_once(config, worst, copies)
    tokens, patches = rows * copies * worst.prompt_tokens, rows * copies * 4 * worst.image_tokens
    if config.model.recompute == "full":
        of_token, of_patch = text.hidden_size, vision.hidden_size
    else:
        of_token = 6 * text.hidden_size + 5 * text.intermediate_size
        of_patch = 6 * vision.hidden_size + 5 * vision.intermediate_size
    own = config.training.global_batch_size / parallel.data_parallel_size
    own *= 1 if config.training.layout == "group" else config.rollout.group_size
    under_way = min(stages, -(-own // rows))
    kept = (text.num_layers / stages * of_token * tokens + vision.depth * of_patch * patches) * under_way
    return int(held + kept * element / tensor)


def prompts_at_once(config: Config, lengths: Lengths, copies: int) -> int:
    """Return how many prompts are in a micro-batch of an update."""
    training, size = config.training, config.rollout.group_size
    own = training.global_batch_size // config.parallel.data_parallel_size
    if training.layout == "plain" or training.max_tokens_per_micro_batch is None:
        return min(training.micro_batch_size, own * size)
    tokens = copies * (lengths.prompt_tokens + size * lengths.response_tokens)
    return max(1, min(training.max_tokens_per_micro_batch // tokens, own))


def _changes(config: Config, gpus: int) -> Iterator[dict[str, Any]]:
    """Yield changes of a configuration, section by section: layouts, servers, micro-batches, recompute."""
    concurrency = config.rollout.concurrency
    for training, server in _divisions(gpus):
        for tensor in SIZES:
            for stages in SIZES:
                if training % (tensor * stages):
                    continue
                for tower in ("sharded", "spread") if tensor > 1 else ("sharded",):
                    parallel = {
                        "tensor_model_parallel_size": tensor,
                        "pipeline_model_parallel_size": stages,
                        "data_parallel_size": training // (tensor * stages),
                        "sequence_parallel": tensor > 1,
                        "vision_tower": tower,
                    }
                    for recompute in ("full", "none"):
                        for sizes in _micro_batches(config):
                            yield {
                                "parallel": parallel,
                                "server": server,
                                "rollout": {"concurrency": max(concurrency, REQUESTS * server["replicas"])},
                                "model": {"recompute": recompute},
                                "training": sizes,
                                **(SHARED if server["shares_gpus"] else {}),
                            }


def _divisions(gpus: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield how many GPUs train, and which servers there are."""
    for tensor in SIZES:
        if gpus > GPUS_OF_NODE:
            servers = {"replicas": GPUS_OF_NODE // tensor, "first_gpu": 0, "shares_gpus": False}
            yield gpus - GPUS_OF_NODE, servers | {"tensor_parallel_size": tensor}
            continue
        if gpus % tensor == 0:
            servers = {"replicas": gpus // tensor, "first_gpu": 0, "shares_gpus": True}
            yield gpus, servers | {"tensor_parallel_size": tensor}
        for replicas in range(1, (gpus - 1) // tensor + 1):
            training = gpus - replicas * tensor
            servers = {"replicas": replicas, "first_gpu": training, "shares_gpus": False}
            yield training, servers | {"tensor_parallel_size": tensor}


def _micro_batches(config: Config) -> Iterator[dict[str, int]]:
    """Yield micro-batch sizes; of the group layout none that would cut a group which the configured one does not."""
    training, size = config.training, config.rollout.group_size
    whole = config.data.max_prompt_tokens + size * config.rollout.max_response_tokens
    for factor in FACTORS:
        if training.layout == "group" and training.max_tokens_per_micro_batch is not None:
            tokens = int(factor * training.max_tokens_per_micro_batch)
            if tokens >= min(whole, training.max_tokens_per_micro_batch):
                yield {"max_tokens_per_micro_batch": tokens}
        elif factor * training.micro_batch_size >= 1 and factor * training.log_prob_micro_batch_size >= 1:
            yield {
                "micro_batch_size": int(factor * training.micro_batch_size),
                "log_prob_micro_batch_size": int(factor * training.log_prob_micro_batch_size),
            }


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    """Return a configuration with some keys changed, section by section; whether they go together is not looked at."""
    update = {
        key: getattr(config, key).model_copy(update=value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return config.model_copy(update=update)


def _divides(hf: HFConfig, config: Config) -> bool:
    try:
        check_parallel_sizes(hf, config.parallel)
    except UserError:
        return False
    return True


def _is_valid(config: Config) -> bool:
    try:
        Config.model_validate(config.model_dump())
    except ValidationError:
        return False
    return True


def _flops_by_micro_batch(hf: HFConfig, question: Question) -> Callable[[Config], Flops]:
    """Return what counts an iteration's FLOPs, once for all layouts with micro-batches of a size."""
    kept: dict[tuple, Flops] = {}

    def flops(config: Config) -> Flops:
        training = config.training
        key = (
            training.layout,
            training.max_tokens_per_micro_batch,
            training.micro_batch_size,
            training.log_prob_micro_batch_size,
        )
        if key not in kept:
            kept[key] = estimates.work_of_iteration(config, hf, question.usual)[1]
        return kept[key]

    return flops

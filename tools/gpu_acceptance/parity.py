"""Section parity: this project's model in bfloat16 is as near to transformers in float32 as transformers' own bfloat16
is.

The same weights, pictures and tokens three times: transformers in float32 is the judge, transformers in bfloat16 shows
what bfloat16 costs, and ours may cost FACTOR times that. Log-probs of the response tokens, and the gradient of their
mean with respect to every parameter. Ours in float32 must equal the judge but for the order of summation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.gpu_acceptance.report import Fact, Line, passed_if
from tools.gpu_acceptance.task import Shape, Task, gradients_by_official_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_papo.config import Config
    from megatron_papo.model.hf_config import HFConfig
    from megatron_papo.training.rows import TrainingRollout

FACTOR = 1.5
"""Both errors are means over hundreds of tokens or millions of numbers, so they scatter by a few per cent; where ours
rounds once more than transformers (the vision tower's rotation) it came out 4 % higher on a CPU."""
LARGEST_FACTOR = 2.0
"""Of the largest single difference, which is one number and scatters."""
FLOAT32 = 1e-4
"""Mean |difference| of log-probs in float32, in nats. Measured 2e-6 on a CPU."""
CONTROL = 3.0
"""Text positions for the picture's tokens must be so many times further off than ours may be."""


@dataclass(frozen=True)
class Side:
    """What one program says."""

    log_probs: "Tensor"
    """[tokens] of all responses, float32 on the CPU."""
    gradients: "dict[str, Tensor]"
    """By official name, float32 on the CPU."""

    def error(self, judge: "Side") -> tuple[float, float]:
        """Return the mean and the largest |difference| of the log-probs, in nats."""
        difference = (self.log_probs - judge.log_probs).abs()
        return difference.mean().item(), difference.max().item()

    def gradient_error(self, judge: "Side", of: Callable[[str], bool]) -> float:
        """Return the norm of the difference of some parameters' gradients, relative to the judge's."""
        names = [name for name in judge.gradients if of(name)]
        difference = sum(float((self.gradients[name] - judge.gradients[name]).square().sum()) for name in names)
        return (difference / sum(float(judge.gradients[name].square().sum()) for name in names)) ** 0.5


@dataclass(frozen=True)
class Sides:
    """The same rollouts, by each program."""

    judge: Side
    """transformers in float32."""
    theirs: Side
    """transformers in bfloat16."""
    ours: Side
    """This project's model in bfloat16."""
    exact: Side
    """The same in float32."""
    wrong: Side
    """ours, with text positions for the pictures' tokens."""


def run(task: Task) -> Iterator[Line | Fact]:
    yield from compare(sides_of(task))


def sides_of(task: Task) -> Sides:
    """Compute log-probs and gradients of made rollouts, in every way."""
    import torch

    from megatron_papo.model.hf_config import read_hf_config

    torch.backends.cudnn.allow_tf32 = False
    hf_dir, megatron_dir = task.checkpoint()
    shape = Shape(2, 100, 40) if task.device == "cpu" else Shape(2 if task.quick else 4, 1000, 250)
    config = task.config("bfloat16", [*shape.changes, "rollout.group_size=3"])
    float32 = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})})
    hf, pictures = read_hf_config(hf_dir), task.output / "pictures"
    rows = task.rows(hf, config, pictures, shape)
    device = torch.device(task.device)
    return Sides(
        by_transformers(hf_dir, torch.float32, device, rows, pictures, config),
        by_transformers(hf_dir, torch.bfloat16, device, rows, pictures, config),
        by_ours(megatron_dir, hf, rows, pictures, config),
        by_ours(megatron_dir, hf, rows, pictures, float32),
        by_ours(megatron_dir, hf, rows, pictures, config, text_positions),
    )


def compare(sides: Sides) -> Iterator[Line | Fact]:
    """Yield what the programs say of each other."""
    judge, theirs, ours = sides.judge, sides.theirs, sides.ours
    count = sum(gradient.numel() for gradient in judge.gradients.values())
    yield Fact("parity: response tokens, parameters", f"{len(judge.log_probs)}, {count:,}")
    mean, largest = sides.exact.error(judge)
    found = f"mean {mean:.2g}, largest {largest:.2g} nats, limit {FLOAT32:g} on average"
    yield Line("log-probs in float32 equal transformers'", passed_if(mean <= FLOAT32), found)
    (mean, largest), (their_mean, their_largest) = ours.error(judge), theirs.error(judge)
    found = f"mean {mean:.3g} nats, transformers' own bfloat16 {their_mean:.3g}, limit {FACTOR:g} times that"
    yield Line("log-probs in bfloat16, from transformers in float32", passed_if(mean <= FACTOR * their_mean), found)
    found = f"{largest:.3g} nats, transformers' own bfloat16 {their_largest:.3g}, limit {LARGEST_FACTOR:g} times that"
    yield Line("the same, the largest", passed_if(largest <= LARGEST_FACTOR * their_largest), found)
    for part, of in (("decoder", lambda name: not _is_vision(name)), ("vision tower", _is_vision)):
        error, their_error = ours.gradient_error(judge, of), theirs.gradient_error(judge, of)
        found = f"{error:.2%} of their norm, transformers' own bfloat16 {their_error:.2%}, limit {FACTOR:g} times that"
        yield Line(f"gradients of the {part} in bfloat16", passed_if(error <= FACTOR * their_error), found)
    mean, _ = sides.wrong.error(judge)
    noticed = mean > CONTROL * FACTOR * their_mean
    found = f"{mean:.3g} nats on average"
    yield Line("control: text positions for pictures are noticed", passed_if(noticed), found)


def by_transformers(
    hf_dir: Path,
    dtype: "torch.dtype",
    device: "torch.device",
    rows: "Sequence[TrainingRollout]",
    root: Path,
    config: "Config",
) -> Side:
    """Return what transformers says about some rollouts.

    Args:
        hf_dir: the checkpoint.
        dtype: of its weights and activations.
        device: where it computes.
        rows: the rollouts.
        root: the directory that the pictures' paths start from.
        config: pixel limits.
    """
    import torch

    from megatron_papo.checkpoint.name_map import disk_name
    from megatron_papo.pictures.preprocess import PictureSettings
    from tools.reference import Reference, pixels_of

    reference, settings, said = Reference(hf_dir, dtype, device), PictureSettings.of(config.data), []
    total = sum(row.response_length for row in rows)
    gradients: dict[str, Tensor] = {}
    for row in rows:
        response = row.rollout.response_token_ids
        logits = reference.response_logits(row.prompt_token_ids, response, pixels_of(row, root, settings), row.grids)
        chosen = torch.tensor(response, device=device)[:, None]
        log_probs = torch.log_softmax(logits, -1).gather(-1, chosen)[:, 0]
        (log_probs.sum() / total).backward()
        said.append(log_probs.detach().cpu())
        for name, parameter in reference.model.named_parameters():  # added up in float32, as megatron-core does
            if parameter.grad is not None:
                official = disk_name(name)
                gradients[official] = gradients.get(official, 0) + parameter.grad.float()
                parameter.grad = None
    return Side(torch.cat(said), {name: gradient.cpu() for name, gradient in gradients.items()})


def by_ours(
    megatron_dir: Path,
    hf: "HFConfig",
    rows: "Sequence[TrainingRollout]",
    root: Path,
    config: "Config",
    rotary_positions: Callable | None = None,
) -> Side:
    """Return what this project's model says, with the wrapper, the kernels and the micro-batches that training uses.

    Args:
        megatron_dir: the checkpoint in Megatron's format.
        hf: the model.
        rows: the rollouts.
        root: the directory that the pictures' paths start from.
        config: dtype, layout, pixel limits.
        rotary_positions: what the model gets as positions instead of its own.
    """
    import torch

    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.distributed import process_groups
    from megatron_papo.model.qwen2_5_vl import Responses, build_model
    from megatron_papo.training.collator import Collator
    from megatron_papo.training.optimizer import build_optimizer

    dtype = getattr(torch, config.model.dtype)
    process_groups.initialize(config.parallel)
    model = build_model(hf, dtype=dtype, sequence_parallel=False, recompute=config.model.recompute)
    megatron_files.load_weights(megatron_dir, model)
    wrapped, _ = build_optimizer(model, config.optimizer, dtype)
    wrapped.zero_grad_buffer()
    place = process_groups.device()
    collator = Collator(
        config, hf, root, with_pixels=True, device=place, dtype=dtype, rotary_positions=rotary_positions
    )
    total, said = sum(row.response_length for row in rows), []
    for part in collator.plan(rows, config.training.micro_batch_size):
        batch = collator.collate(part)
        statistics = wrapped(
            batch.input_ids,
            batch.position_ids,
            batch.pixel_values,
            batch.image_grids,
            pictures=batch.pictures,
            groups=batch.groups,
            responses=Responses(batch.response_positions, batch.response_tokens, 1.0),
        )
        (statistics.log_probs.sum() / total).backward()
        said.append(statistics.log_probs.detach().float().cpu())
    gradients = {name: value.cpu() for name, value in gradients_by_official_name(model, hf).items()}
    process_groups.destroy()
    return Side(torch.cat(said), gradients)


def text_positions(token_ids: Sequence[int], grids: Sequence) -> "Tensor":
    """Return the rotary positions that a row would have if its image tokens were text."""
    from tools.check_parity import text_positions as of_text

    return of_text(token_ids, grids)


def _is_vision(name: str) -> bool:
    return name.startswith("visual.")

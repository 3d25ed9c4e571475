"""What one rank holds while it trains: the package's own code on a fake device.

`trace` runs what stage 5 runs (training/policy.py, training/passes.py): it builds the policy, sweeps over some
micro-batches and updates on some. Nothing of the model, the objective or the optimizer is restated here.
"""

import gc
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.distributed import process_groups
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.model.log_probs import one_for_all
from megatron_papo.pictures.preprocess import TEMPORAL
from megatron_papo.plan.fake_device import DEVICE, FakeDevice, Place
from megatron_papo.plan.ledger import Ledger
from megatron_papo.plan.workload import copies_in_update, fullest, rows_of
from megatron_papo.run.records import Rollout
from megatron_papo.training.collator import Collator, Kind, MicroBatch, Pictures, kinds_of
from megatron_papo.training.forward_step import PerRollout
from megatron_papo.training.layouts import layout_of
from megatron_papo.training.loss_recipe import loss_recipe
from megatron_papo.training.passes import Passes, PassPlan, StepRows, split_into_steps
from megatron_papo.training.policy import Policy
from megatron_papo.training.rows import TrainingRollout

Numbers = dict[str, int]
"""What a trace found, by name. All of them grow evenly with the number of layers of a kind (layers.py).

parameters          of this rank
main_parameters     of which this rank's optimizer holds main parameter and moments
pinned              bytes of the reference's copy on the host
PHASE/PART/peak     bytes held at most, PHASE/PART/live at the end; build, resident, sweep_reference, sweep_policy,
                    sweep_masked, update, optimizer; the parts are those of the model (Parts), of micro-batches with
                    pictures and of those without
PHASE/kernels       per micro-batch; PHASE/communication/NAME bytes of a collective's arguments
"""


class PlannedPasses(Passes):
    """Passes whose metrics nobody can read."""

    def constants_of_step(self, policy: Policy, step: StepRows, constants: PerRollout) -> PerRollout:
        """Return the constants of a step; what tokens are weighed by is no value here."""
        return constants if self.config.objective.weighs_tokens else super().constants_of_step(policy, step, constants)

    def read_metrics(self, contributions: dict[str, Tensor]) -> dict[str, float]:
        return {"loss": 0.0}


class PlannedCollator(Collator):
    """Makes micro-batches of pictures that are no files."""

    def __init__(self, config: Config, hf: HFConfig, device: FakeDevice):
        super().__init__(
            config,
            hf,
            Path(),
            with_pixels=process_groups.is_first_stage(),
            device=DEVICE,
            dtype=getattr(torch, config.model.dtype),
        )
        self.on = device
        self.made: Counter[str] = Counter()
        """Micro-batches, by phase."""
        self.shows = ""
        """What the present micro-batch shows."""

    def collate(self, rows: Sequence[TrainingRollout], pictures: Pictures = "original") -> MicroBatch:
        """Return the micro-batch, after saying what will be read of its values."""
        self._grids = {row.rollout.prompt_id: row.grids for row in rows}
        batch = super().collate(rows, pictures)
        self.made[self.on.ledger.phase] += 1
        self.shows = "pictures" if rows[0].grids else "text"
        tokens = [grid[1] * grid[2] // self.hf.vision.spatial_merge_size**2 for grid in batch.image_grids]
        self.on.ledger.integer = sum(tokens[picture] for picture in batch.pictures)
        return batch

    def plan(
        self, rows: Sequence[TrainingRollout], micro_batch_size: int, pictures: Pictures = "original"
    ) -> list[Sequence[TrainingRollout]]:
        """Return the micro-batches, after telling the device what their hidden states are like."""
        parts = super().plan(rows, micro_batch_size, pictures)
        copies, multiple = len(kinds_of(pictures)), self.length_multiple
        lengths = [self.layout.row_lengths(part) for part in parts]
        width = self.hf.text.hidden_size
        shapes = [[-(-max(of_part) // multiple), len(of_part) * copies, width] for of_part in lengths]
        self.on.expect(shapes)
        return parts

    def expect(self, parts: Sequence[Sequence[TrainingRollout]], pictures: Pictures) -> None:
        """Nothing has to be prepared."""

    def _patches(self, rollout: Rollout, kind: Kind) -> list[Tensor]:
        patch = torch.zeros(1, self.hf.vision.patch_values // TEMPORAL, dtype=torch.uint8)
        return [patch.expand(math.prod(grid), -1) for grid in self._grids[rollout.prompt_id]]


@dataclass(frozen=True)
class Work:
    """The rollouts that a trace goes over."""

    swept: StepRows
    updated: StepRows


def work_of(config: Config, hf: HFConfig, data_rank: int, stage: int) -> Work:
    """Return the fullest micro-batches of a data-parallel rank: of the update as many as a pipeline stage has under
    way, and one more."""
    training = config.training
    under_way = config.parallel.pipeline_model_parallel_size - stage
    copies = copies_in_update(config)
    return Work(
        _first(config, hf, data_rank, training.log_prob_micro_batch_size, 1, 1 if under_way == 1 else 2),
        _first(config, hf, data_rank, training.micro_batch_size, copies, under_way + 1),
    )


def _first(config: Config, hf: HFConfig, data_rank: int, size: int, copies: int, count: int) -> StepRows:
    """Return a rank's share of steps of the fullest rollouts, as far as its first `count` micro-batches go; of several
    kinds of such rollouts one micro-batch of each but the last, whose pictures pile up on a first pipeline stage."""
    groups, whole = config.training.global_batch_size, StepRows([], [], [], [])
    kinds = fullest(config, copies)
    for number, lengths in enumerate(kinds):
        rows = rows_of(hf, config, lengths, range(number * groups, (number + 1) * groups))
        step = split_into_steps(rows, config, data_rank, config.parallel.data_parallel_size)[0]
        is_last = number == len(kinds) - 1
        parts = layout_of(config.training).plan(step.own, size, copies)
        taken = sum(map(len, parts[: max(1, count - number) if is_last else 1]))
        whole.all.extend(step.all)
        whole.own.extend(step.own[:taken])
        whole.places.extend(place + number * len(rows) for place in step.places[:taken])
        whole.denominators.extend(step.denominators[:taken])
    return whole


def trace(config: Config, hf: HFConfig, rank: int) -> Numbers:
    """Return what a rank of the layout holds and computes, with the fullest micro-batches that the configuration
    admits.

    Args:
        config: a whole configuration.
        hf: sizes of the model.
        rank: of parallel.world_size.
    """
    ledger = Ledger()
    before = one_for_all.set(ledger.counted)
    gc.collect()
    gc.freeze()  # the libraries' own objects need not be looked at again and again
    try:
        with FakeDevice(rank, config.parallel, ledger) as device:
            return _trace(config, hf, device)
    finally:
        one_for_all.reset(before)
        gc.unfreeze()


def _trace(config: Config, hf: HFConfig, device: FakeDevice) -> Numbers:
    ledger = device.ledger
    ledger.mark("build/model")
    policy = Policy(config, hf)
    policy.make_random()
    main_parameters = make_moments(policy)
    gc.collect()
    ledger.mark("resident/all")

    place = Place.of(device.rank, config.parallel)
    work = work_of(config, hf, place.data, place.pipeline)
    several = config.rollout.rollout_batch_size > config.training.global_batch_size
    plan, collator = PassPlan.of(config.objective), PlannedCollator(config, hf, device)

    def passes_over(*steps: StepRows) -> PlannedPasses:
        return PlannedPasses(config, hf, list(steps), plan, collator, lambda rollouts: None)

    parts = Parts(policy, ledger, collator)
    sweeps, update = passes_over(work.swept), passes_over(work.updated)
    if plan.reference:
        with parts.of("sweep_reference"):
            sweeps.sweep_reference(policy)
    if plan.of_first_step or several:
        with parts.of("sweep_policy"):
            passes_over(*[work.swept] * (2 if several else 1)).sweep_policy(policy.model)
    if plan.before_each_step:
        with parts.of("sweep_masked"):
            sweeps.sweep(policy.model, sweeps.rows, plan.before_each_step)
    constants = constants_of(config, plan, several, work.updated.own)

    def before_step(*_: object) -> None:
        ledger.mark("optimizer/all")

    for optimizer in torch_optimizers(policy):
        optimizer.register_step_pre_hook(before_step)
    recipe = loss_recipe(config.objective, 0)
    with parts.of("update"):
        update.update(policy, update.steps[0], constants, recipe, config.optimizer.learning_rate)
    policy.model.module.zero_grad()
    ledger.mark("end")
    return _numbers(policy, main_parameters, ledger, collator.made)


def _numbers(policy: Policy, main_parameters: int, ledger: Ledger, made: Counter[str]) -> Numbers:
    numbers = {
        "parameters": sum(parameter.numel() for parameter in policy.model.parameters()),
        "main_parameters": main_parameters,
        "pinned": ledger.pinned,
    }
    for name, stretch in ledger.stretches.items():
        phase = name.partition("/")[0]
        if phase in ("start", "end"):
            continue
        batches = made[phase] or 1
        numbers[f"{name}/peak"], numbers[f"{name}/live"] = stretch.peak, stretch.live
        kernels = f"{phase}/kernels"
        numbers[kernels] = numbers.get(kernels, 0) + stretch.kernels // batches
        for collective, count in stretch.communication.items():
            key = f"{phase}/communication/{collective}"
            numbers[key] = numbers.get(key, 0) + count // batches
    return numbers


def torch_optimizers(policy: Policy) -> list[torch.optim.Optimizer]:
    """Return the AdamW's inside megatron-core's optimizer."""
    whole = policy.optimizer
    chain = whole.chained_optimizers if isinstance(whole, ChainedOptimizer) else [whole]
    return [part.optimizer for part in chain if part.optimizer is not None]


def make_moments(policy: Policy) -> int:
    """Give the optimizer what its first step would, with the kernels of a GPU; return how many main parameters it has
    on this rank."""
    count = 0
    for optimizer in torch_optimizers(policy):
        for group in optimizer.param_groups:
            group["foreach"] = True  # what torch chooses on a GPU
            for parameter in group["params"]:
                count += parameter.numel()
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    return count


def constants_of(config: Config, plan: PassPlan, several: bool, rows: list[TrainingRollout]) -> PerRollout:
    """Return what the sweeps before the first step leave in the loss of these rollouts. several: they are of a later
    step."""
    if not process_groups.is_last_stage():
        return {}
    names = ["ref_log_probs"] if plan.reference else []
    names += ["old_log_probs", "old_entropy"] if several else []
    names += ["masked_image_log_probs", "masked_image_entropy"] if "masked" in plan.of_first_step else []
    names += ["policy_weights"] if config.objective.weighs_tokens else []
    names += ["contrast_weights"] if config.objective.contrast is not None else []
    names += ["rollout_log_probs"] if config.objective.importance_sampling_cap is not None else []
    return {name: [torch.zeros(row.response_length, device=DEVICE) for row in rows] for name in names}


class Parts:
    """Marks in a ledger which part of the model computes: a phase's peak within each of them grows evenly with the
    number of layers, that of the whole phase does not."""

    def __init__(self, policy: Policy, ledger: Ledger, collator: PlannedCollator):
        self.ledger, self.collator, self.phase = ledger, collator, ""
        model = policy.model.module.module if hasattr(policy.model.module, "module") else policy.model.module
        if model.vision_model is not None:
            model.vision_model.register_forward_pre_hook(lambda *_: self._mark(self._named("tower")))
            model.vision_model.register_forward_hook(lambda _, args, out: self._forward(out, "embed", "tower backward"))
        decoder = model.language_model.decoder
        decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        decoder.register_forward_hook(lambda _, args, out: self._forward(out, "head", "decoder backward"))

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Count towards the parts of a phase."""
        gc.collect()
        self.phase = phase
        self._mark("begin")
        yield
        self._mark("end")

    def _mark(self, part: str) -> None:
        self.ledger.mark(f"{self.phase}/{part}")

    def _before_decoder(self, _: torch.nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        self._watch(hidden, self._named("embed backward"))
        self._mark(self._named("decoder"))

    def _forward(self, out: object, after: str, backward: str) -> None:
        self._watch(out[0] if isinstance(out, tuple) else out, self._named(backward))
        self._mark(self._named(after))

    def _named(self, part: str) -> str:
        return f"{self.collator.shows}: {part}"

    def _watch(self, tensor: object, part: str) -> None:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda gradient: self._mark(part))

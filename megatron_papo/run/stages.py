"""The table of stages: which keys each reads, what it reads and makes, as functions of run and iteration.

Fingerprints, hints ("make it with ..."), --dry-run, tools.status and the tables of README and docs/pipeline.md come
from here. A stage sees the configuration through a view of its keys: reading another one is an error at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_papo.config import BenchmarkConfig, Config, PromptSource, Section, is_living, value_of
from megatron_papo.run.run_directory import RunDirectory

PICTURES = ("data.min_pixels", "data.max_pixels", "data.resize", "data.transparency")
COLUMNS = ("problem_key", "answer_key", "images_key", "target_key", "saliency_key")
SETS = ("data.evaluation", "evaluation.benchmarks", "evaluation.source")
"""What says which evaluation sets there are. Of one of them, the stages list the keys that decide what they make."""
ROWS_OF_SET = ("split", "count", *COLUMNS)
PROMPTS_OF_SET = (
    "form",
    "image_archive",
    "prompt_template",
    "system_prompt",
    "strip_problem",
    "problem_by",
    "problems_of",
)
PICTURES_OF_SET = ("min_pixels", "max_pixels", "resize")
EVALUATION = (
    "evaluation.samples_per_prompt",
    "evaluation.temperature",
    "evaluation.top_p",
    "evaluation.top_k",
    "evaluation.max_response_tokens",
    "evaluation.min_pixels",
    "evaluation.max_pixels",
    "evaluation.resize",
    "evaluation.masked_images",
    "evaluation.masked_image",
    "evaluation.without_images",
)
PROMPTS = (
    "data.synthetic",
    "data.problem_key",
    "data.answer_key",
    "data.images_key",
    "data.target_key",
    "data.saliency_key",
    "data.prompt_template",
    "data.system_prompt",
    "data.strip_problem",
    "data.max_prompt_tokens",
    *PICTURES,
)


@dataclass(frozen=True)
class Turn:
    """Which of its outputs a stage makes."""

    iteration: int | None = None
    evaluation_set: str | None = None

    def __str__(self) -> str:
        words = [] if self.iteration is None else [f"--iteration {self.iteration}"]
        return " ".join(words if self.evaluation_set is None else [*words, f"--evaluation-set {self.evaluation_set}"])


@dataclass(frozen=True)
class InputSpec:
    """Something that a stage reads."""

    name: str
    """Of the command line's option, and in the manifest."""
    help: str
    made_by: tuple[str, ...]
    """The stages that may have made it."""
    path: Callable[[RunDirectory, Turn], Path]
    """Where it is in a run."""
    needed: Callable[[Config, Turn], bool] = lambda config, turn: True
    from_outside: bool = False
    """A directory that no stage made will do, too."""


@dataclass(frozen=True)
class Stage:
    """One row of the table."""

    name: str
    title: str
    decided_by: tuple[str, ...]
    """Keys that are part of its fingerprint, sections with all that is not living in them."""
    also_reads: tuple[str, ...]
    """Keys that change no number of its output: places, cadences, speed, and what it checks beforehand."""
    inputs: tuple[InputSpec, ...]
    output: Callable[[RunDirectory, Turn], Path]
    writes: str
    turns: Callable[[RunDirectory], list[Turn]]
    """What a whole run wants of it, in order."""
    processes: Callable[[Config], int] | None = None
    """How many torchrun starts; None: it is one process."""
    decided_by_of_set: tuple[str, ...] = ()
    """Of stage 1: the keys that decide an evaluation set, in place of decided_by."""
    keys_of_set: tuple[str, ...] = ()
    """Of an evaluation set, the keys of its own that decide the output."""
    iteration_decides: bool = False
    """The number of the iteration is part of the fingerprint."""

    @property
    def number(self) -> int:
        return int(self.name.removeprefix("stage").partition("_")[0])

    @property
    def keys(self) -> tuple[str, ...]:
        return self.decided_by + self.decided_by_of_set + self.also_reads

    def needed_inputs(self, config: Config, turn: Turn) -> list[InputSpec]:
        """Return the inputs that this turn reads under this configuration."""
        return [spec for spec in self.inputs if spec.needed(config, turn)]

    def values(self, config: Config, turn: Turn) -> dict[str, object]:
        """Return the keys that decide an output, with their values as plain data.

        Of a section, what is living is left out, unless the section is so as a whole.
        """
        of_set = self.decided_by_of_set and turn.evaluation_set is not None
        keys = list(self.decided_by_of_set if of_set else self.decided_by)
        if turn.evaluation_set is not None:
            section, place = set_section(turn.evaluation_set)
            keys += [f"{place}.{key}" for key in self.keys_of_set if key in section.model_fields]
        return {key: _plain(key, value_of(config, key)) for key in keys}

    def arguments(self, turn: Turn) -> dict[str, object]:
        """Return what decides an output beside keys and inputs."""
        if self.iteration_decides:
            return {"iteration": turn.iteration}
        return {} if turn.evaluation_set is None or not self.decided_by_of_set else {"set": turn.evaluation_set}


def _plain(key: str, value: object) -> object:
    if not isinstance(value, Section):
        return value
    names = type(value).model_fields
    return {
        name: _plain(f"{key}.{name}", getattr(value, name))
        for name in names
        if is_living(key) or not is_living(f"{key}.{name}")
    }


def set_section(name: str) -> tuple[type[PromptSource], str]:
    """Return the type of an evaluation set's section, and its dotted key."""
    return (
        (PromptSource, "data.evaluation")
        if name == "evaluation"
        else (BenchmarkConfig, f"evaluation.benchmarks.{name}")
    )


def _iterations(run: RunDirectory) -> list[Turn]:
    return [Turn(number) for number in range(1, run.config.iterations + 1)]


def _once(run: RunDirectory) -> list[Turn]:
    return [Turn()]


def _number(turn: Turn) -> int:
    assert turn.iteration is not None
    return turn.iteration


def _set(turn: Turn) -> str:
    assert turn.evaluation_set is not None
    return turn.evaluation_set


def _uses_rollback(config: Config, turn: Turn) -> bool:
    return config.hacking_guard.action == "rollback_and_lower_gamma"


def _rollback(run: RunDirectory, turn: Turn) -> Path:
    return run.rollback(_number(turn)) or run.trained(_number(turn) - 1)


def _needs_previous(config: Config, turn: Turn) -> bool:
    return config.rollout.dynamic_sampling is not None and _number(turn) > 1


def _source_keys(name: str) -> list[str]:
    """Return what decides the rows of a source, beside its content."""
    return [f"data.{name}.{key}" for key in ROWS_OF_SET]


DATA = InputSpec(
    "data", "output of stage 1: training prompts and pictures", ("stage1_prepare_data",), lambda run, turn: run.data
)
EXPORTS = ("stage2_sft", "stage6_convert_to_hf", "stage1_prepare_data")
CHECKPOINTS = ("stage3_convert_to_megatron", "stage5_train")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "stage1_prepare_data",
            "rows of any source, or of the synthetic task, become prompts and pictures",
            decided_by=("seed", *_source_keys("train"), *_source_keys("sft"), *PROMPTS),
            decided_by_of_set=("seed", *PROMPTS, *(f"evaluation.{key}" for key in PICTURES_OF_SET)),
            keys_of_set=(*ROWS_OF_SET, *PROMPTS_OF_SET, *PICTURES_OF_SET),
            also_reads=(
                "data.train.source",
                "data.sft.source",
                *SETS,
                "data.image_root",
                "model.path",
                "masked_image",
                "objective",
                "evaluation",
                "data.skip_bad_rows",
                "data.max_suspicious_share",
                "reward",
                "rollout.rollout_batch_size",
            ),  # fmt: skip
            inputs=(
                InputSpec(
                    "hf",
                    "of an evaluation set: checkpoint whose tokenizer it is made with",
                    ("stage1_prepare_data",),
                    lambda run, turn: run.base,
                    needed=lambda config, turn: turn.evaluation_set is not None,
                    from_outside=True,
                ),  # fmt: skip
            ),
            output=lambda run, turn: (
                run.data if turn.evaluation_set is None else run.evaluation_data(turn.evaluation_set)
            ),
            writes="prompts.jsonl, images/",
            turns=lambda run: [Turn(), *(Turn(evaluation_set=name) for name in run.config.evaluation_sets)],
        ),
        Stage(
            "stage2_sft",
            "supervised cold start, where the configuration has one (DeepSpeed ZeRO)",
            decided_by=("seed", "sft", "model.dtype", "model.recompute", *PICTURES),
            also_reads=(),
            inputs=(
                DATA,
                InputSpec(
                    "hf",
                    "Hugging Face checkpoint to start from",
                    ("stage1_prepare_data",),
                    lambda run, turn: run.base,
                    from_outside=True,
                ),  # fmt: skip
            ),
            output=lambda run, turn: run.sft,
            writes="Hugging Face checkpoint, metrics.jsonl",
            turns=lambda run: [] if run.config.sft is None else [Turn()],
            processes=lambda config: 0 if config.sft is None else config.sft.processes,
        ),
        Stage(
            "stage3_convert_to_megatron",
            "the start of training and the frozen reference, as a Megatron checkpoint",
            decided_by=(),
            also_reads=("parallel",),
            inputs=(
                InputSpec(
                    "hf", "Hugging Face checkpoint", EXPORTS, lambda run, turn: run.exported(0), from_outside=True
                ),
            ),
            output=lambda run, turn: run.reference,
            writes="Megatron checkpoint (torch_dist), proof that every bit was kept",
            turns=_once,
        ),
        Stage(
            "stage4_rollout",
            "group_size graded responses to each prompt of the iteration's batch, sampled by SGLang",
            decided_by=("seed", "rollout", "reward", "masked_image", "model.dtype", *PICTURES),
            also_reads=("server",),
            inputs=(
                DATA,
                InputSpec(
                    "hf",
                    "Hugging Face checkpoint: the policy that samples",
                    EXPORTS,
                    lambda run, turn: run.exported(run.sampled_by(_number(turn))),
                    from_outside=True,
                ),  # fmt: skip
                InputSpec(
                    "previous",
                    "this stage's output of the iteration before, where the prompts start (dynamic sampling)",
                    ("stage4_rollout",),
                    lambda run, turn: run.rollouts(_number(turn) - 1),
                    needed=_needs_previous,
                ),  # fmt: skip
            ),
            output=lambda run, turn: run.rollouts(_number(turn)),
            writes="rollouts.jsonl",
            turns=_iterations,
            iteration_decides=True,
        ),
        Stage(
            "stage5_train",
            "one iteration of PAPO, tensor-, pipeline- and data-parallel",
            decided_by=(
                "seed",
                "model.dtype",
                "model.recompute",
                "model.freeze",
                "parallel",
                "objective",
                "hacking_guard",
                "masked_image",
                "kept_image",
                "optimizer",
                "training",
                "rollout",
                *PICTURES,
            ),  # fmt: skip
            also_reads=("server.shares_gpus",),
            inputs=(
                InputSpec(
                    "megatron",
                    "Megatron checkpoint to continue from",
                    CHECKPOINTS,
                    lambda run, turn: run.trained(_number(turn) - 1),
                ),  # fmt: skip
                InputSpec(
                    "rollouts",
                    "stage 4's output of this iteration",
                    ("stage4_rollout",),
                    lambda run, turn: run.rollouts(_number(turn)),
                ),  # fmt: skip
                DATA,
                InputSpec(
                    "reference",
                    "Megatron checkpoint of the frozen reference of KL_ref",
                    ("stage3_convert_to_megatron",),
                    lambda run, turn: run.reference,
                    needed=lambda config, turn: config.objective.uses_reference,
                ),  # fmt: skip
                InputSpec(
                    "rollback",
                    "earlier checkpoint that the hacking guard may go back to",
                    CHECKPOINTS,
                    _rollback,
                    needed=_uses_rollback,
                ),  # fmt: skip
            ),
            output=lambda run, turn: run.trained(_number(turn)),
            writes="Megatron checkpoint with optimizer state, metrics.jsonl, guard.jsonl",
            turns=_iterations,
            iteration_decides=True,
            processes=lambda config: config.parallel.world_size,
        ),
        Stage(
            "stage6_convert_to_hf",
            "back to a Hugging Face checkpoint",
            decided_by=(),
            also_reads=(),
            inputs=(
                InputSpec(
                    "megatron",
                    "Megatron checkpoint",
                    CHECKPOINTS,
                    lambda run, turn: run.trained(_number(turn)),
                ),  # fmt: skip
            ),
            output=lambda run, turn: run.exported(_number(turn)),
            writes="Hugging Face checkpoint, proof that every bit was kept",
            turns=_iterations,
        ),
        Stage(
            "stage7_evaluate",
            "avg@k on an evaluation set, with and without the picture",
            decided_by=("seed", *EVALUATION, "reward", "masked_image", "model.dtype", *PICTURES),
            keys_of_set=(*PICTURES_OF_SET, "grading", "groups"),
            also_reads=(
                *SETS,
                "data.prompt_template",
                "data.system_prompt",
                "data.strip_problem",
                "server",
                "rollout.concurrency",
                "rollout.request_timeout_seconds",
            ),  # fmt: skip
            inputs=(
                InputSpec(
                    "data",
                    "output of stage 1: prompts and pictures to answer",
                    ("stage1_prepare_data",),
                    lambda run, turn: run.evaluation_data(_set(turn)),
                ),  # fmt: skip
                InputSpec(
                    "hf",
                    "Hugging Face checkpoint to evaluate",
                    EXPORTS,
                    lambda run, turn: run.exported(_number(turn)),
                    from_outside=True,
                ),  # fmt: skip
            ),
            output=lambda run, turn: run.evaluated(_number(turn), _set(turn)),
            writes="predictions.jsonl, metrics.json, protocol.json",
            turns=lambda run: [
                Turn(number, name) for number in run.evaluated_iterations() for name in run.evaluated_sets(number)
            ],
        ),
    )
}


def paths(stage: Stage, run: RunDirectory, turn: Turn) -> dict[str, Path]:
    """Return where a turn of a stage finds its inputs in a run, by name."""
    return {spec.name: spec.path(run, turn) for spec in stage.needed_inputs(run.config, turn)}


def all_turns(run: RunDirectory, at_least: int = 0) -> Iterator[tuple[Stage, Turn]]:
    """Yield everything that a whole run makes, in the order in which run_all.sh makes it.

    at_least: Go on to this iteration where the run has fewer.
    """
    for name in ("stage1_prepare_data", "stage2_sft", "stage3_convert_to_megatron"):
        yield from ((STAGES[name], turn) for turn in STAGES[name].turns(run))
    evaluation = STAGES["stage7_evaluate"]
    yield from ((evaluation, turn) for turn in evaluation.turns(run) if turn.iteration == 0)
    for number in range(1, max(run.config.iterations, at_least) + 1):
        yield from ((STAGES[name], Turn(number)) for name in ("stage4_rollout", "stage5_train", "stage6_convert_to_hf"))
        yield from ((evaluation, turn) for turn in evaluation.turns(run) if turn.iteration == number)


def maker(run: RunDirectory, path: Path, at_least: int = 0) -> tuple[Stage, Turn] | None:
    """Return which turn of which stage makes a directory of a run; None for something from outside. at_least: as
    above."""
    return next(((stage, turn) for stage, turn in all_turns(run, at_least) if stage.output(run, turn) == path), None)

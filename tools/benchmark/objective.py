"""What the PAPO objective costs: its share of a training step, and its peak memory against the size of the logits.

    .venv/bin/python -m tools.benchmark.objective [--quick] [--threads N] [--tokens N] [--repeat N]

The objective is everything after the logits: token_statistics and papo_loss, from the logits to their gradient. Two
objectives:

    k3_cached             log-probs of the masked image cached, k3 estimator, sampled entropies (published)
    exact_with_gradient   twins in the micro-batch, gradient through both, exact KL and entropies over the whole
                          vocabulary

Demo: a micro-batch of configs/demo.yaml (64 rollouts, and their twins) in one process. `step` is papo_step, forward and
backward, with the demo's model; `objective` is the same papo_step with the model's place taken by its logits. The
optimizer's update is left out.

Vocabulary of 151,936: the decoder of Qwen2.5-VL-3B on --tokens rows (of the objective with twins, half of them are
twins). ONE decoder layer of that width is measured and multiplied by 36, and the output layer's matrix product is
added; embeddings, vision tower, prompts and optimizer are left out. A real step takes longer, so the share is an upper
bound.

Memory: the peak of what forward and backward of the objective allocate beyond the logits, as a multiple of the logits'
bytes; the gradient of the logits alone is 1.0. Beside it the textbook: log_softmax, gather and entropy by autograd in
fp32, the same loss, the same run.

CUDA where there is a device, otherwise the CPU. Times are medians; what is compared is measured in turns, so that other
load on the machine falls on all alike. Standard output: a table, and as its last line one JSON object. Progress goes to
standard error.
"""

import argparse
import copy
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_papo.config import Config
from megatron_papo.run.command_line import run
from tools.benchmark.measure import peak_bytes, seconds_in_turns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_papo.model.log_probs import TokenStatistics
    from megatron_papo.model.qwen2_5_vl import Qwen2_5_VL
    from megatron_papo.run.records import Rollout
    from megatron_papo.training.collator import Collator, Kind, MicroBatch

DEMO_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
KINDS = {
    "k3_cached": [
        "objective.masked_branch=cached",
        "objective.kl_prcp_estimator=k3",
        "objective.entropy_estimator=sampled",
    ],
    "exact_with_gradient": [
        "objective.masked_branch=recompute_with_grad",
        "objective.kl_prcp_estimator=exact",
        "objective.entropy_estimator=exact",
    ],
}
"""What each kind sets on top of configs/demo.yaml."""
DTYPES = ("float32", "bfloat16")
VOCABULARY = 151_936


@dataclasses.dataclass(frozen=True)
class Width:
    """Of a decoder: the sizes in config.json."""

    hidden: int
    intermediate: int
    heads: int
    kv_groups: int
    layers: int
    mrope_section: tuple[int, int, int]


QWEN2_5_VL_3B = Width(2048, 11008, 16, 2, 36, (16, 24, 24))
QUICK = Width(256, 512, 4, 2, 36, (8, 12, 12))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def textbook_statistics(
    logits: "Tensor",
    positions: "Tensor",
    tokens: "Tensor",
    group: object,
    *,
    temperature: float,
    kl_of_halves: bool,
    second_half_gradient: bool,
) -> "TokenStatistics":
    """Compute token_statistics of one whole vocabulary as one writes it first: fp32, autograd.

    positions must be every row in order.

    Lenient to the textbook: no copy for positions or temperature, and no gradient for an entropy that the loss does not
    use.
    """
    import torch

    from megatron_papo.model.log_probs import LOG_RATIO_LIMIT, TokenStatistics

    log_p = torch.log_softmax(logits.float(), -1)
    with torch.set_grad_enabled(kl_of_halves):
        entropy = -(log_p.exp() * log_p).sum(-1)
    kl = None
    if kl_of_halves:
        first, second = log_p.chunk(2)
        kl = (first.exp() * (first - second).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)).sum(-1)
    return TokenStatistics(log_p.gather(-1, tokens[:, None])[:, 0], entropy, kl)


def demo_rollouts(config: Config, directory: Path) -> "list[Rollout]":
    """One micro-batch of rollouts whose responses are those that the cold start teaches; rewards made up. Writes their
    pictures."""
    from megatron_papo.data.chat import ChatFormat, RenderSettings
    from megatron_papo.data.prompts import PromptMaker
    from megatron_papo.pictures.preprocess import PictureSettings
    from megatron_papo.pictures.store import ImageStore
    from megatron_papo.run.records import Rewards, Rollout
    from megatron_papo.seeds import derive_seed
    from megatron_papo.synthetic.rows import synthetic_rows

    size = config.rollout.group_size
    groups = config.training.micro_batch_size // size
    chat = ChatFormat(directory / "model", RenderSettings.of(config.data))
    maker = PromptMaker(config.data, chat, ImageStore(directory), PictureSettings.of(config.data))
    prompts = list(
        maker.prompts(synthetic_rows(config.data.synthetic, config.seed, "benchmark", groups, with_target=True))
    )
    return [
        Rollout(
            prompt_id=prompt.id,
            iteration=1,
            epoch=0,
            group=group,
            sample=sample,
            answer=prompt.answer,
            prompt_token_ids=prompt.token_ids,
            prompt_num_tokens=prompt.num_tokens,
            images=prompt.images,
            response_token_ids=prompt.target_token_ids or [],
            rollout_log_probs=[-1.0] * len(prompt.target_token_ids or []),
            text=prompt.target or "",
            finish_reason="stop",
            rewards=Rewards(overall=sample % 2, accuracy=sample % 2, format=1),
            temperature=config.rollout.temperature,
            top_p=1.0,
            sampling_seed=0,
            masked_image_seed=derive_seed(config.seed, group),
            weight_version="benchmark",
        )
        for group, prompt in enumerate(prompts)
        for sample in range(size)
    ]


def logits_in_place_of(model: "Qwen2_5_VL", logits: "Tensor") -> "torch.nn.Module":
    """Return a model for papo_step whose last stage starts from a leaf: [N, V] logits of the response tokens.

    What is left of the step is the objective.
    """
    import torch

    from megatron_papo.distributed import process_groups
    from megatron_papo.model.log_probs import TokenStatistics, token_statistics
    from megatron_papo.model.qwen2_5_vl import Responses

    class LogitsOnly(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model_type, self.config = model.model_type, copy.copy(model.config)
            self.config.finalize_model_grads_func = self.config.grad_scale_func = None  # there are no weights
            self.logits = logits.detach().requires_grad_()

        def forward(self, *_: object, responses: Responses, **__: object) -> TokenStatistics:
            self.logits.grad = None
            places = torch.arange(len(self.logits), device=self.logits.device)
            return token_statistics(
                self.logits,
                places,
                responses.tokens,
                process_groups.tp_group(),
                temperature=responses.temperature,
                kl_of_halves=responses.kl_of_halves,
                second_half_gradient=responses.second_half_gradient,
            )

        def set_input_tensor(self, _: object) -> None:
            pass

    return LogitsOnly()


def collator_of(batch: "MicroBatch") -> "Collator":
    """Return a collator for papo_step that has already made its only micro-batch."""
    from megatron_papo.training.collator import Collator, MicroBatch, Pictures
    from megatron_papo.training.layouts import Part

    class OneBatch(Collator):
        def __init__(self) -> None:
            pass

        def plan(self, rows: Part, micro_batch_size: int, pictures: Pictures = "original") -> list[Part]:
            return [rows]

        def collate(self, rows: Part, pictures: Pictures = "original") -> MicroBatch:
            return batch

    return OneBatch()


def measure_demo(directory: Path, rollouts: list, overrides: list[str], repeat: int) -> dict:
    """Seconds of papo_step and of its objective on one micro-batch of the demo, with random weights.

    directory: holds the pictures of the rollouts, and model/ with the demo's config.json.
    """
    import torch

    from megatron_papo.distributed import process_groups
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.model.qwen2_5_vl import build_model
    from megatron_papo.training.collator import Collator
    from megatron_papo.training.forward_step import PassSettings, papo_step, sweep
    from megatron_papo.training.loss_recipe import counts_of, denominators_of, loss_recipe
    from megatron_papo.training.optimizer import build_optimizer
    from megatron_papo.training.rows import make_rows, rollout_advantages

    config, hf, dtype = demo_config(overrides), read_hf_config(directory / "model"), torch.float32
    objective, settings = config.objective, PassSettings(config.training.micro_batch_size, config.rollout.temperature)
    advantages = rollout_advantages(rollouts, config.rollout.group_size, objective.advantage, directory)
    rows = make_rows(rollouts, advantages, directory, config, hf, directory)
    model = build_model(hf, dtype=dtype, sequence_parallel=False, recompute=config.model.recompute)
    collator = Collator(config, hf, directory, with_pixels=True, device=process_groups.device(), dtype=dtype)

    def log_probs(kind: "Kind") -> "list[Tensor]":
        return sweep(model, collator, rows, settings, [kind])[kind].log_probs

    constants = dict.fromkeys(("old_log_probs", "ref_log_probs"), log_probs("original"))
    if not objective.masked_rows_ride:
        constants["masked_image_log_probs"] = log_probs("masked")
    wrapped, _ = build_optimizer(model, config.optimizer, dtype)

    def step(model: torch.nn.Module, collator: Collator) -> float:
        recipe = loss_recipe(objective, 0)
        metrics, _ = papo_step(
            model,
            collator,
            rows,
            constants,
            settings,
            recipe,
            denominators_of([counts_of(row) for row in rows], objective),
        )
        return float(metrics["loss"])

    def whole() -> float:
        wrapped.zero_grad_buffer()
        return step(wrapped, collator)

    batch = collator.collate(rows, "both" if objective.masked_rows_ride else "original")
    with torch.no_grad():
        logits = model(
            batch.input_ids, batch.position_ids, batch.pixel_values, batch.image_grids, pictures=batch.pictures
        )
        logits = logits.flatten(0, 1)[batch.response_positions]
    alone, one = logits_in_place_of(model, logits), collator_of(batch)
    seconds = seconds_in_turns({"step": whole, "objective": lambda: step(alone, one)}, repeat)
    return {
        "rollouts": len(rows),
        "response_tokens": sum(row.response_length for row in rows),
        "logits_shape": list(logits.shape),
        "step_seconds": seconds["step"],
        "objective_seconds": seconds["objective"],
        "objective_share": seconds["objective"] / seconds["step"],
        "step_loss": whole(),
        "objective_loss": step(alone, one),
    }


def demo_config(overrides: list[str]) -> Config:
    from megatron_papo.config_files import load_config

    one_process = [
        "tensor_model_parallel_size=1",
        "pipeline_model_parallel_size=1",
        "data_parallel_size=1",
        "sequence_parallel=false",
    ]
    return load_config(DEMO_CONFIG, [*(f"parallel.{value}" for value in one_process), *overrides])


def decoder_layer(width: Width, tokens: int, dtype: "torch.dtype") -> Callable[[], None]:
    """-> forward and backward of one layer of the product on one row of so many tokens."""
    import torch
    from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import build_module

    from megatron_papo.distributed import process_groups
    from megatron_papo.model.group_attention import GroupAttention
    from megatron_papo.model.layer_specs import transformer_config, transformer_layer

    head = width.hidden // width.heads
    config = transformer_config(
        dtype=dtype, recompute="none", num_layers=1, hidden_size=width.hidden, num_attention_heads=width.heads,
        num_query_groups=width.kv_groups, kv_channels=head, ffn_hidden_size=width.intermediate,
        mrope_section=list(width.mrope_section), add_bias_linear=False,
    )  # fmt: skip
    layer = build_module(transformer_layer(GroupAttention, AttnMaskType.causal), config=config, layer_number=1)
    positions = torch.arange(tokens, device=process_groups.device()).expand(3, 1, tokens)
    rotary = MultimodalRotaryEmbedding(kv_channels=head, rotary_percent=1.0)(positions, list(width.mrope_section))
    hidden = torch.randn(tokens, 1, width.hidden, device=process_groups.device(), dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(hidden)
    return lambda: layer(hidden, attention_mask=None, rotary_pos_emb=rotary)[0].backward(gradient)


def output_layer(width: Width, tokens: int, dtype: "torch.dtype") -> Callable[[], None]:
    """-> forward and backward of the product of hidden states with the (tied) embedding."""
    import torch

    from megatron_papo.distributed import process_groups

    weight = (
        torch.randn(VOCABULARY, width.hidden, device=process_groups.device(), dtype=dtype).mul_(0.02).requires_grad_()
    )
    hidden = torch.randn(tokens, width.hidden, device=process_groups.device(), dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, VOCABULARY, device=process_groups.device(), dtype=dtype)
    return lambda: torch.nn.functional.linear(hidden, weight).backward(gradient)


def objective_alone(kind: str, logits: "Tensor", statistics_of: Callable) -> Callable[[], None]:
    """-> from the logits [rows, V], every row a response token of one rollout (with twins: half of them), to their
    gradient."""
    import torch

    from megatron_papo.distributed import process_groups
    from megatron_papo.objective.papo_loss import Averages, MaskedImageTokens, ResponseTokens, StepCounts, papo_loss
    from megatron_papo.training.loss_recipe import loss_recipe

    config = demo_config(KINDS[kind])
    twins, rows = config.objective.masked_rows_ride, len(logits)
    count = rows // 2 if twins else rows
    generator = torch.Generator(logits.device).manual_seed(config.seed)
    tokens = torch.randint(logits.shape[-1], (count,), device=logits.device, generator=generator).repeat(rows // count)
    positions, mask = torch.arange(rows, device=logits.device), torch.ones(1, count, device=logits.device)
    old = -12.0 + torch.rand(1, count, device=logits.device, generator=generator)
    recipe, averages = loss_recipe(config.objective, 0), Averages(StepCounts(tokens=count, sequences=1))

    def forward_and_backward() -> None:
        logits.grad = None
        found = statistics_of(
            logits, positions, tokens, process_groups.tp_group(),
            temperature=config.rollout.temperature, kl_of_halves=twins, second_half_gradient=True,
        )  # fmt: skip
        log_probs, entropy = found.log_probs[None], found.entropy[None]
        masked_image = MaskedImageTokens(old - 0.1)
        if twins:
            masked_image = MaskedImageTokens(log_probs[:, count:], entropy[:, count:], found.kl[None])
        response_tokens = ResponseTokens(
            log_probs=log_probs[:, :count],
            old_log_probs=old,
            advantages=torch.ones(1, 1, device=logits.device),
            mask=mask,
            entropy=entropy[:, :count],
            ref_log_probs=old,
            masked_image=masked_image,
        )
        loss, _ = papo_loss(response_tokens, averages, recipe.coefficients, recipe.formulas)
        loss.backward()

    return forward_and_backward


def measure_vocabulary(width: Width, tokens: int, dtype_name: str, repeat: int) -> dict:
    """Seconds, shares and peaks of both kinds on [tokens, 151936] logits of one dtype."""
    import torch

    from megatron_papo.distributed import process_groups
    from megatron_papo.model.log_probs import token_statistics

    dtype = getattr(torch, dtype_name)
    logits = torch.randn(tokens, VOCABULARY, device=process_groups.device()).mul_(2).to(dtype).requires_grad_()
    statistics_of: dict[str, Callable] = {"ours": token_statistics, "textbook": textbook_statistics}
    objectives: dict[object, Callable[[], object]] = {
        (kind, name): objective_alone(kind, logits, how) for kind in KINDS for name, how in statistics_of.items()
    }
    model: dict[object, Callable[[], object]] = {
        "layer": decoder_layer(width, tokens, dtype),
        "output_layer": output_layer(width, tokens, dtype),
    }
    seconds = seconds_in_turns(model | objectives, repeat)
    without = width.layers * seconds["layer"] + seconds["output_layer"]
    found: dict[str, Any] = {
        "layer_seconds": seconds["layer"],
        "output_layer_seconds": seconds["output_layer"],
        "step_seconds_without_objective": without,
    }
    for kind in KINDS:
        peaks = {}
        for name in statistics_of:
            logits.grad = None  # the peak must hold the new one
            peaks[name] = peak_bytes(objectives[kind, name]) / (logits.numel() * logits.element_size())
        ours, textbook = seconds[kind, "ours"], seconds[kind, "textbook"]
        found[kind] = {
            "objective_seconds": ours,
            "objective_share": ours / (without + ours),
            "textbook_seconds": textbook,
            "textbook_time_ratio": textbook / ours,
            "peak_bytes_over_logits_bytes": peaks["ours"],
            "textbook_peak_bytes_over_logits_bytes": peaks["textbook"],
        }
    return found


def show(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    table = Table(title="The demo: one micro-batch, forward and backward")
    for column in ("objective", "logits", "step, s", "objective, s", "share"):
        table.add_column(column, justify="left" if column == "objective" else "right")
    for kind in KINDS:
        demo = report["demo"][kind]
        shape = " x ".join(map(str, demo["logits_shape"]))
        seconds = f"{demo['step_seconds']:.3f}", f"{demo['objective_seconds']:.4f}"
        table.add_row(kind, shape, *seconds, f"{100 * demo['objective_share']:.1f} %")
    console.print(table)
    large = report["vocabulary_151936"]
    table = Table(
        title=f"{large['tokens']} x {VOCABULARY} logits, width of {large['width']}; peak: times the logits' bytes"
    )
    for column in (
        "objective",
        "logits",
        "rest of step, s",
        "objective, s",
        "share",
        "peak",
        "textbook, s (ratio)",
        "its peak",
    ):
        table.add_column(column, justify="left" if column in ("objective", "logits") else "right")
    for dtype in DTYPES:
        for kind in KINDS:
            row, rest = large[dtype][kind], large[dtype]["step_seconds_without_objective"]
            table.add_row(
                kind,
                dtype,
                f"{rest:.2f}",
                f"{row['objective_seconds']:.3f}",
                f"{100 * row['objective_share']:.2f} %",
                f"{row['peak_bytes_over_logits_bytes']:.2f}",
                f"{row['textbook_seconds']:.3f} ({row['textbook_time_ratio']:.1f})",
                f"{row['textbook_peak_bytes_over_logits_bytes']:.2f}",
            )
    console.print(table)
    print(
        f"rest of step: one decoder layer, measured, times {large['layers']}, plus the output layer; without the"
        " vision tower, prompts"
    )
    print(
        "and the optimizer, so that the share is an upper bound. peak: the gradient of the logits alone is 1.00 of it."
    )
    print(
        f"{report['device']}, {report['threads']} threads, median of {report['repeat']}, load average"
        f" {report['load_average']:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a narrow decoder, 64 tokens, one measurement: shows that it runs, in seconds",
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="of torch on a CPU (default: 1, as each rank trains with)"
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="rows of logits at the large vocabulary, even (default: 256; quick: 64)"
    )
    parser.add_argument(
        "--repeat", type=int, metavar="N", help="measurements that each median is of (default: 5; quick: 1)"
    )
    args = parser.parse_args()
    width, tokens, repeat = (QUICK, 64, 1) if args.quick else (QWEN2_5_VL_3B, 256, 5)
    tokens = tokens if args.tokens is None else args.tokens
    repeat = repeat if args.repeat is None else args.repeat
    if tokens < 2 or tokens % 2:
        parser.error("--tokens must be even: half of the rows are twins")
    if args.threads < 1 or repeat < 1:
        parser.error("--threads and --repeat must be at least 1")
    print(json.dumps(measure(width, tokens, repeat, args.threads)))


def measure(width: Width, tokens: int, repeat: int, threads: int) -> dict:
    """The whole report; prints its table."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler else announces itself on standard error
    import torch

    from megatron_papo.distributed import process_groups
    from megatron_papo.seeds import derive_seed
    from megatron_papo.synthetic.tiny_model import make_tiny_model

    config = demo_config([])
    process_groups.initialize(config.parallel)
    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "repeat": repeat, "demo": {}}
    with tempfile.TemporaryDirectory() as directory:
        make_tiny_model(Path(directory, "model"), derive_seed(config.seed, "tiny_model"))
        rollouts = demo_rollouts(config, Path(directory))
        for kind, overrides in KINDS.items():
            say(f"demo: {kind}")
            report["demo"][kind] = measure_demo(Path(directory), rollouts, overrides, repeat)
    report["vocabulary_151936"] = {
        "tokens": tokens,
        "vocabulary": VOCABULARY,
        "width": "Qwen2.5-VL-3B" if width is QWEN2_5_VL_3B else "a narrow decoder",
        "layers": width.layers,
    }
    for dtype in DTYPES:
        say(f"vocabulary of {VOCABULARY}: {dtype}")
        report["vocabulary_151936"][dtype] = measure_vocabulary(width, tokens, dtype, repeat)
    report["load_average"] = os.getloadavg()[0]
    show(report)
    process_groups.shutdown()
    return report


if __name__ == "__main__":
    run(main)

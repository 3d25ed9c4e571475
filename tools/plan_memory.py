"""Says what a run will need before the first GPU-hour: memory of every rank's GPU phase by phase, of the node, disk,
tokens, FLOPs and hours; and whether it fits, with the key to change where it does not. Needs no GPU and no weights.

    .venv/bin/python -m tools.plan_memory --config configs/papo_g_3b.yaml --geometry 3b
    .venv/bin/python -m tools.plan_memory --config configs/papo_g_72b.yaml --geometry 72b --rank 24 --json
    .venv/bin/python -m tools.plan_memory --run runs/demo --geometry tiny --gpu-memory 24GB
    .venv/bin/python -m tools.plan_memory --config configs/papo_g_7b.yaml --geometry 7b --fit --gpus 8 --gpu-memory 40GB

--fit looks for layouts, micro-batches, recompute and servers that fit so many GPUs, and prints what it has traced,
the fastest first; --write FILE writes the fastest, without --fit the configuration's own, as a machine's part of a
preset.
Stage 5's own code runs on tensors that have sizes and no values, as a rank of the configuration's layout: by default
the first one of each pipeline stage. A few layers are traced and the others told from them; what was traced is kept in
~/.cache/megatron_papo (or $XDG_CACHE_HOME), which may be deleted. Memory is that of the fullest micro-batches which the
configuration admits; tokens, FLOPs and hours are those of rollouts of --prompt-tokens and --response-tokens.
docs/plan.md: what is counted, what is not, and how far off it was.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_papo.config import Config
from megatron_papo.config_files import load_config, resolve_config
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig, read_hf_config
from megatron_papo.model.parallel_sizes import check_parallel_sizes
from megatron_papo.run.command_line import run
from tools.convert.geometry import NAMES, config_tree

if TYPE_CHECKING:
    from megatron_papo.plan.fit import Candidate
    from megatron_papo.plan.layers import Traces
    from megatron_papo.plan.plan import Plan, Question

UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration, e.g. configs/papo_g_3b.yaml")
    what.add_argument("--run", type=Path, metavar="DIR", help="run directory: reads its config.yaml")
    add = parser.add_argument
    add("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value")
    add(
        "--model",
        type=Path,
        metavar="DIR",
        help="checkpoint directory, of which config.json is read (default model.path)",
    )
    add("--geometry", metavar="NAME", help=f"a published size in place of a checkpoint: {', '.join(NAMES)}")
    add("--gpu-memory", default="80GB", metavar="SIZE", help="of each GPU, with its unit (default %(default)s)")
    add("--rank", type=int, metavar="R", help="this rank alone (default: the first of each pipeline stage)")
    add("--all", action="store_true", help="all ranks")
    add("--exact", action="store_true", help="trace all layers, not a few of them: minutes")
    add("--fit", action="store_true", help="find what fits --gpus GPUs")
    add("--gpus", type=int, metavar="N", help="how many there are, with --fit: of one node, or a multiple of 8")
    add("--top", type=int, default=3, metavar="N", help="with --fit: how many layouts to find (default %(default)s)")
    add("--write", type=Path, metavar="FILE", help="write layout and servers, with what they need, as a preset's part")
    add(
        "--prompt-tokens", type=int, default=1000, metavar="N", help="of a usual prompt, picture included (%(default)s)"
    )
    add("--response-tokens", type=int, default=250, metavar="N", help="of a usual response (%(default)s)")
    add(
        "--picture-tokens",
        type=int,
        default=900,
        metavar="N",
        help="of a usual picture, a token 28 x 28 px (%(default)s)",
    )
    add(
        "--mfu",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="of its peak that a GPU is taken to reach (%(default)s)",
    )
    add("--gpu", default="H100", metavar="NAME", help="whose peak (default %(default)s)")
    add("--json", action="store_true", help="one JSON object instead of tables")
    return parser.parse_args(arguments)


def size_in_bytes(text: str, option: str = "--gpu-memory") -> int:
    """Return the bytes that "80GB" or "79.6 GiB" says. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text.strip(), re.ASCII)
    if found is None or found[2] not in UNITS:
        raise UserError(f"{option} {text}: a number with its unit is expected, {', '.join(UNITS)}: e.g. 80GB")
    return int(float(found[1]) * UNITS[found[2]])


def model_of(config: Config, model: Path | None, geometry: str | None) -> HFConfig:
    """Return the sizes of the model. Raises UserError."""
    if geometry is not None:
        if geometry not in NAMES:
            raise UserError(f"--geometry {geometry}: no such size, there are {', '.join(NAMES)}: or give --model DIR")
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(config_tree(geometry)))
            return read_hf_config(Path(directory))
    path = model or (None if config.model.path is None else Path(config.model.path))
    if path is None:
        raise UserError("model.path is null: give --model DIR, or --geometry tiny")
    if not path.is_dir():
        raise UserError(f"{path}: no such directory: give --model DIR, or --geometry, one of {', '.join(NAMES)}")
    return read_hf_config(path)


def question_of(args: argparse.Namespace, config: Config, gpu_bytes: int) -> "Question":
    """Return what the arguments ask. Raises UserError."""
    from megatron_papo.plan.plan import Question, first_ranks
    from megatron_papo.plan.workload import usual
    from megatron_papo.training.accounting import PEAK_FLOPS

    if args.gpu not in PEAK_FLOPS:
        raise UserError(f"--gpu {args.gpu}: its peak is not known, but {', '.join(PEAK_FLOPS)}")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu}: give a share above 0 and at most 1")
    if min(args.prompt_tokens, args.response_tokens) < 1 or args.picture_tokens < 0:
        raise UserError("--prompt-tokens and --response-tokens must be above 0, --picture-tokens not below")
    ranks = list(range(config.parallel.world_size)) if args.all else first_ranks(config)
    return Question(
        usual=usual(config, args.prompt_tokens, args.response_tokens, args.picture_tokens),
        gpu_bytes=gpu_bytes,
        ranks=ranks if args.rank is None else [args.rank],
        exact=args.exact,
        mfu=args.mfu,
        gpu=args.gpu,
    )


def main() -> None:
    args = parse()
    size_in_bytes(args.gpu_memory)
    if (args.gpus is None) == args.fit:
        raise UserError("--fit and --gpus go together: give both, e.g. --fit --gpus 8")
    if args.fit and (args.rank is not None or args.all or args.top < 1):
        raise UserError("--fit looks at ranks by itself, and for one layout or more: leave out --rank and --all")
    if args.write is not None and not args.write.absolute().parent.is_dir():
        raise UserError(f"--write {args.write}: no such directory: name a file in one that is there")
    config = load_config(args.config or args.run / "config.yaml", args.overrides)
    hf = model_of(config, args.model, args.geometry)
    if not args.fit:
        check_parallel_sizes(hf, config.parallel)
    size = config.parallel.world_size
    if args.rank is not None and not 0 <= args.rank < size:
        raise UserError(f"--rank {args.rank}: the layout has ranks 0 to {size - 1}: give one of them")
    question, traces = prepared(args, config)
    from megatron_papo.plan.plan import plan_of

    if args.fit:
        config, plan = found(args, config, hf, question, traces)
    else:
        plan = plan_of(config, hf, question, traces)
    if args.json:
        print(json.dumps(dataclasses.asdict(plan)))
    else:
        print("\n".join(report(plan, question, config)))
    if args.write:
        write(args, config, hf, question, plan)


def prepared(args: argparse.Namespace, config: Config) -> tuple["Question", "Traces"]:
    """Return the question, and what makes traces; from here on torch is there, on one core and without GPUs."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan needs no GPU, and is the same with one
    warnings.filterwarnings("ignore")  # megatron-core's, of what is not installed
    import torch

    torch.set_num_threads(1)
    from megatron_papo.plan.cache import cached
    from megatron_papo.plan.processes import in_processes

    return question_of(args, config, size_in_bytes(args.gpu_memory)), cached(in_processes(progress))


def needs(config: Config, gpu_memory: str | None) -> list[str]:
    """Return the plan of a configuration whose model is there, for people.

    Args:
        config: Whole.
        gpu_memory: Of each GPU, as --gpu-memory has it. None: nobody asked, so the plan for 80GB where it costs
            nothing, because its traces are in the cache, and nothing otherwise.

    Raises UserError where somebody asked and the model is not there, or cannot be laid out so.
    """
    from megatron_papo.plan import cache

    if gpu_memory is None and not any(cache.directory().glob("*.json")):
        return []
    try:
        hf = model_of(config, None, None)
        check_parallel_sizes(hf, config.parallel)
        args = parse(["--config", "", *([] if gpu_memory is None else ["--gpu-memory", gpu_memory])])
        question, traces = prepared(args, config)
        from megatron_papo.plan.plan import plan_of

        return report(
            plan_of(config, hf, question, cache.cached(cache.nothing) if gpu_memory is None else traces),
            question,
            config,
        )
    except (UserError, LookupError):
        if gpu_memory is None:
            return []
        raise


def found(
    args: argparse.Namespace, config: Config, hf: HFConfig, question: "Question", traces: "Traces"
) -> tuple[Config, "Plan"]:
    """Print the layouts that fit, and return the fastest with its plan. Raises UserError where none fits."""
    from megatron_papo.plan.fit import candidates, check_gpus, fitting

    check_gpus(args.gpus)
    could = candidates(config, hf, args.gpus, question)
    at_once = max(1, len(os.sched_getaffinity(0)) // 4)
    fits = []
    for candidate, plan in fitting(could, hf, question, traces, args.top, at_once):
        print(of_candidate(candidate, plan), file=sys.stderr if args.json else sys.stdout, flush=True)
        if plan.fits:
            fits.append((candidate, plan))
    if not fits:
        raise UserError(
            f"--fit: no layout of {args.gpus} GPUs of {args.gpu_memory} holds this model: give more GPUs, or smaller"
            " rollouts: --set data.max_prompt_tokens=, --set rollout.max_response_tokens="
        )
    fits.sort(key=lambda pair: pair[0].seconds.iteration)
    candidate, plan = fits[0]
    return candidate.config, plan


def of_candidate(candidate: "Candidate", plan: "Plan") -> str:
    """Return a line about a layout that was traced."""
    config, seconds = candidate.config, candidate.seconds
    parallel, server, training = config.parallel, config.server, config.training
    tensor = parallel.tensor_model_parallel_size
    micro_batch = (
        f"{training.max_tokens_per_micro_batch} tokens"
        if training.layout == "group"
        else f"{training.micro_batch_size} rollouts"
    )
    return (
        f"{'fits' if plan.fits else 'too large':<10}{gb(plan.needed_bytes):>9}  {seconds.iteration:5.0f} s "
        f" TP{tensor} x PP{parallel.pipeline_model_parallel_size} x DP{parallel.data_parallel_size}"
        f"{f', tower {parallel.vision_tower}' if tensor > 1 else ''}, {micro_batch}, recompute {config.model.recompute}"
        f", {server.replicas} servers of TP{server.tensor_parallel_size}"
        f"{' on the same GPUs' if server.shares_gpus else ''}"
    )


def write(args: argparse.Namespace, config: Config, hf: HFConfig, question: "Question", plan: "Plan") -> None:
    """Write the machine's part of a preset. Raises UserError."""
    from megatron_papo.plan.machine_file import Traced, machine_file, write_machine_file

    file = args.config or args.run / "config.yaml"
    below = resolve_config(file, args.overrides).base
    base = load_config(below or file, [f"model.path={config.model.path}"])
    words = [*sys.argv[1:]]
    at = words.index("--write")
    command = shlex.join([".venv/bin/python", "-m", "tools.plan_memory", *words[:at], *words[at + 2 :]])
    text = machine_file(config, base, hf, question, Traced.of(plan), str(file), command)
    write_machine_file(args.write, text)
    print(f"wrote {args.write}", file=sys.stderr)


def progress(number: int, count: int) -> None:
    """Show how many traces are made, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{number} of {count} traces", end="" if number < count else "\r\033[K", file=sys.stderr, flush=True)


def admitted(config: Config) -> str:
    """Return what memory is counted with."""
    from megatron_papo.plan.workload import copies_in_update, fullest, longest

    kinds, worst = fullest(config, copies_in_update(config)), longest(config)
    if len(kinds) == 2:
        return f"{config.training.max_tokens_per_micro_batch} tokens, all of them responses, or all pictures"
    pictures = f"{worst.pictures} pictures of {worst.pixels} px" if worst.image_tokens else "no picture"
    rows = config.training.micro_batch_size if config.training.layout == "plain" else 1
    return f"{rows} rollouts of {worst.prompt_tokens} + {worst.response_tokens} tokens, {pictures} in each prompt"


def gb(count: float) -> str:
    """Return bytes for people: GB, TB from a thousand on."""
    return f"{count / 1e12:,.1f} TB" if count >= 1e12 else f"{count / 1e9:,.1f} GB"


def report(plan: "Plan", question: "Question", config: Config) -> list[str]:
    """Return the plan for people."""
    parallel = config.parallel
    layout = (
        f"TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size}"
        f" x DP{parallel.data_parallel_size}"
    )
    usual = question.usual
    lines = [
        f"{layout}, {parallel.world_size} processes; the fullest micro-batches that are admitted: {admitted(config)}"
    ]
    names = list(dict.fromkeys(name for rank in plan.ranks for name in rank.phases))
    lines.append(f"{'GB, held at most in':<28}" + "".join(f"{f'rank {rank.rank}':>10}" for rank in plan.ranks))
    for name in names:
        peaks = (
            f"{rank.phases[name].peak_bytes / 1e9:10.1f}" if name in rank.phases else " " * 10 for rank in plan.ranks
        )
        lines.append(f"  {name:<26}" + "".join(peaks))
    lines += [
        f"{'G parameters':<28}" + "".join(f"{rank.parameters / 1e9:10.2f}" for rank in plan.ranks),
        "",
        f"GPU      {gb(plan.needed_bytes)} of {gb(plan.gpu_bytes)}: rank {plan.fullest_rank}, with an allowance for"
        " CUDA, NCCL and fragmentation" + (", and what a server keeps of it" if plan.server.shares_gpus else ""),
        f"server   {gb(plan.server.bytes)} on each of {plan.server.gpus} GPUs"
        f"{' that also train' if plan.server.shares_gpus else ''}: weights {gb(plan.server.weights)}, a cache of"
        f" {plan.server.cache_tokens:,} tokens a server",
        f"node     {gb(plan.host.total)} of host memory for {plan.host.processes_on_node} processes: reference"
        f" {gb(plan.host.reference)}, saving {gb(plan.host.save)}, pictures at most {gb(plan.host.pictures)}"
        + (f", servers' weights {gb(plan.host.servers)}" if plan.host.servers else "")
        + (f", exports {gb(plan.host.exports)}" if plan.host.exports else ""),
        f"disk     {gb(plan.disk.iteration)} an iteration (checkpoint {gb(plan.disk.checkpoint)}, export"
        f" {gb(plan.disk.export)}), at most {gb(plan.disk.most)} at once",
        f"tokens   {plan.tokens.sampled:,} sampled, {plan.tokens.computed:,} through the decoder an iteration (rollouts"
        f" of {usual.prompt_tokens} + {usual.response_tokens}); {plan.flops.total / 1e15:,.1f} PFLOP",
        *(
            f"batch    {name}: {work.kernels:,} kernels, {gb(sum(work.communication_bytes.values()))} of communication"
            f" in a micro-batch of rank {plan.ranks[0].rank}"
            for name, work in plan.ranks[0].micro_batches.items()
        ),
        f"time     about {plan.seconds.iteration:,.0f} s an iteration (sampling {plan.seconds.sampling:,.0f}, training"
        f" {plan.seconds.training:,.0f} at {plan.seconds.mfu:.0%} of the peak of {plan.seconds.gpu}, saving"
        f" {plan.seconds.saving:,.0f}), {plan.seconds.hours:,.0f} hours, {plan.seconds.gpu_hours:,.0f} GPU-hours for"
        f" {config.iterations} iterations; without evaluations, starts, and what dynamic sampling throws away",
        "",
        *(plan.problems or ["It fits."]),
    ]
    return lines


if __name__ == "__main__":
    run(main)

"""What can be known before a run does anything: every problem at once, each with what cures it.

Each check is the very function by which a stage refuses later, or one of this module for what no stage asks. Some look
at the configuration and the model (they hold on any machine), others at this machine.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megatron_papo.checkpoint.model_files import model_fingerprint, require_one_model
from megatron_papo.config import Change, Config, DataConfig, PromptSource, is_place
from megatron_papo.config_notes import bytes_on_disk
from megatron_papo.data.chat import require_checkpoint, require_ids_in_vocabulary, tokenizer_hash
from megatron_papo.data.fingerprint import source_fingerprint
from megatron_papo.data.hub_files import files_here, is_offline
from megatron_papo.data.rows import hub_data_set
from megatron_papo.data.set_files import files_of, has_known_names
from megatron_papo.distributed.gpus import count_gpus, require_usable_gpus
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HFConfig, read_hf_config
from megatron_papo.model.parallel_sizes import check_parallel_sizes
from megatron_papo.pictures.model_processor import read_model_processor
from megatron_papo.pictures.preprocess import MERGE, PATCH, PictureSettings
from megatron_papo.run.manifest import Manifest, read_manifest
from megatron_papo.run.outside import remembered_fingerprint
from megatron_papo.run.room import require_room
from megatron_papo.run.run_directory import RunDirectory
from megatron_papo.run.stages import set_section
from megatron_papo.sglang.compilers import missing_for_triton
from megatron_papo.sglang.nodes import require_own_gpus, server_launcher
from megatron_papo.sglang.open_files import most_connections
from megatron_papo.sglang.server_start import problems as server_problems
from megatron_papo.sglang.server_start import sglang_python

BYTES_PER_PARAMETER = 2
"""Of the weights of a published model."""
MOST_OF_A_GPU = 0.5
"""A server that takes this share of a GPU leaves no room to train there."""
PIXELS_PER_TOKEN = (PATCH * MERGE) ** 2

Check = Callable[[], object]


def problems_of_run(run: RunDirectory, todo: Sequence[str]) -> list[str]:
    """Return what contradicts the model that a run starts from, or the lengths that it was made for.

    Args:
        run: Its configuration.
        todo: Keys of the commands that are left to do, as run_all.sh calls them; what they do not need is not asked.
    """
    if not todo:
        return []
    config, path = run.config, run.config.model.path
    found = found_by([lambda: require_lengths(config)])
    if path is None or not {"1", "2", "3", "4:1", "7:0"} & set(todo) or not Path(path).is_dir():
        return found
    model = Path(path)
    shown = [PictureSettings.of(config.data)]
    shown += [
        PictureSettings.of_evaluation(config.data, config.evaluation, entry)
        for entry in config.evaluation_sets.values()
    ]
    found += found_by(
        [
            lambda: require_one_model(model),
            lambda: tokenizer_hash(model),
            lambda: read_model_processor(model).require_limits(shown),
        ]
    )
    try:
        hf = read_hf_config(model)
    except UserError as error:
        return found + list(error.lines)
    return found + found_by(
        [
            lambda: require_ids_in_vocabulary(model),
            lambda: check_parallel_sizes(hf, config.parallel),
            lambda: require_context(hf, model, config),
        ]
    )


def problems_of_places(run: RunDirectory, differences: Sequence[Change]) -> list[str]:
    """Return which data or model lies at a new place, but is not what the run was made from.

    Args:
        run: With the new places.
        differences: What a start changes in the configuration.
    """
    return found_by([partial(_require_same_content, run, change) for change in differences if is_place(change.key)])


def _require_same_content(run: RunDirectory, change: Change) -> None:
    data, made = run.config.data, read_manifest(run.data)
    cure = f"--set {change.key}={change.old}, or choose another --name"
    pairs: list[tuple[str | None, str]] = []
    if change.key == "model.path":
        made = read_manifest(run.reference if run.config.sft is None else run.sft)
        recorded = None if made is None else made.recipe.inputs.get("hf")
        pairs.append((recorded, remembered_fingerprint(run.root, run.base, model_fingerprint) if recorded else ""))
    elif change.key.startswith(("data.evaluation.", "evaluation.")):
        for name, source in run.config.evaluation_sets.items():
            if change.key in ("evaluation.source", f"{set_section(name)[1]}.source"):
                pairs += _of_source(read_manifest(run.evaluation_data(name)), name, source, data)
        cure = f"--set {change.key}={change.old}, or move {run.root / 'evaluation'} away first"
    else:
        pairs += _of_source(made, "train", data.train, data) + _of_source(made, "sft", data.sft, data)
    if any(recorded not in (None, found) for recorded, found in pairs):
        raise UserError(
            f"{run.root}: {change.key} {change.new}: holds something else than {change.old}, which the run was made"
            f" from: {cure}"
        )


def _of_source(
    made: Manifest | None, name: str, source: PromptSource | None, data: DataConfig
) -> list[tuple[str | None, str]]:
    """Return the fingerprints of a set when stage 1 read it, and as it lies there now."""
    recorded = None if made is None else made.recipe.inputs.get(name)
    if recorded is None or source is None:
        return []
    return [(recorded, source_fingerprint(source, data, name == "sft"))]


def problems_of_machine(
    run: RunDirectory, todo: Sequence[str], own_launcher: bool, prefetch: str = "tools.prefetch --config FILE"
) -> list[str]:
    """Return what this machine lacks for a run.

    Args:
        run: Its configuration, and what is there of it already.
        todo: As in problems_of_run.
        own_launcher: Another launcher than torchrun starts training, perhaps on other machines.
        prefetch: Module and arguments that download its model and data.
    """
    config, stages = run.config, {key[0] for key in todo}
    checks: list[Check] = []
    if config.model.path is not None and stages & {"1", "2", "3"}:
        checks.append(lambda: require_checkpoint(Path(str(config.model.path)), prefetch))
    if "1" in stages:
        checks.append(lambda: require_sources(config, prefetch))
    if stages & {"4", "7"}:
        checks += [lambda: require_server(run), lambda: most_connections(config.rollout.concurrency)]
    if "5" in stages:
        checks.append(lambda: require_disk(run))
        if not own_launcher:
            checks += [require_usable_gpus, require_compiler, lambda: require_gpus(config)]
    return found_by(checks)


def found_by(checks: Sequence[Check]) -> list[str]:
    """Return the lines of all UserErrors that checks raise."""
    lines: list[str] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            lines += [line for line in error.lines if line not in lines]
    return lines


def require_lengths(config: Config) -> None:
    """Raise UserError where prompts or responses cannot have the lengths that the configuration allows."""
    data, lines = config.data, []
    fewest = data.min_pixels // PIXELS_PER_TOKEN
    if fewest >= data.max_prompt_tokens:
        lines.append(
            f"data.min_pixels {data.min_pixels} makes {fewest} tokens of a picture, data.max_prompt_tokens is"
            f" {data.max_prompt_tokens}: every prompt with a picture would be left out:"
            f" --set data.max_prompt_tokens={2 * fewest}, or lower data.min_pixels"
        )
    for section, longest in (
        ("rollout", data.max_prompt_tokens + config.rollout.max_response_tokens),
        ("evaluation", data.max_prompt_tokens + config.evaluation.max_response_tokens),
    ):
        if config.server.max_total_tokens is not None and config.server.max_total_tokens < longest:
            lines.append(
                f"server.max_total_tokens {config.server.max_total_tokens} cannot hold one request of"
                f" data.max_prompt_tokens + {section}.max_response_tokens = {longest}:"
                f" --set server.max_total_tokens={longest}, or null"
            )
    if lines:
        raise UserError(*lines)


def require_context(hf: HFConfig, model: Path, config: Config) -> None:
    """Raise UserError where a prompt and its response can be longer than what the model was made for."""
    context, lines = hf.text.max_position_embeddings, []
    for section, response in (
        ("rollout", config.rollout.max_response_tokens),
        ("evaluation", config.evaluation.max_response_tokens),
    ):
        if config.data.max_prompt_tokens + response > context:
            room = max(1, context - response)
            lines.append(
                f"{model / 'config.json'}: the model takes {context} tokens (max_position_embeddings),"
                f" data.max_prompt_tokens {config.data.max_prompt_tokens} + {section}.max_response_tokens {response}"
                f" are more: --set data.max_prompt_tokens={room}, or lower {section}.max_response_tokens"
            )
    if lines:
        raise UserError(*lines)


def require_sources(config: Config, prefetch: str) -> None:
    """Raise UserError where a data set is not there, or is none that can be read. prefetch: see problems_of_machine."""
    data, lines = config.data, []
    sets: dict[str, PromptSource | None] = {"data.train": data.train, "data.sft": data.sft}
    sets |= {set_section(name)[1]: source for name, source in config.evaluation_sets.items()}
    for key, source in sets.items():
        if source is None or source.source == "synthetic":
            continue
        lines += [f"{key}.source: {line}" for line in found_by([partial(_require_source, source, prefetch)])]
    if data.image_root is not None and not Path(data.image_root).is_dir():
        lines.append(f"data.image_root {data.image_root}: no such directory: --set data.image_root=DIR, or null")
    if lines:
        raise UserError(*lines)


def _require_source(source: PromptSource, prefetch: str) -> None:
    if files_of(source).tables or not is_offline():
        return
    try:
        if has_known_names(source):
            files_here(source)
        else:
            hub_data_set(source)
    except UserError:
        raise UserError(
            f"{source.source} ({source.split}): not among the downloaded data sets, and HF_HUB_OFFLINE is set: where"
            f" there is a network run .venv/bin/python -m {prefetch}, with the same HF_HOME"
        )


def require_server(run: RunDirectory) -> None:
    """Raise UserError where no server can be started so on this machine; a port that one of the run's own has is
    free."""
    server = run.config.server
    if server_launcher() is not None:  # ports, interfaces and GPUs are those of other machines
        require_own_gpus(server)
        sglang_python(server)
        return
    if any(run.server.rglob("server.json")):
        server = server.model_copy(update={"port": 0})
    lines = server_problems(server)
    if lines:
        raise UserError(*lines)


def descriptors_note(config: Config) -> str | None:
    """Return what to say where fewer files may be open than requests are to be under way; None where there is room."""
    wanted = config.rollout.concurrency
    room = most_connections(wanted)
    if room == wanted:
        return None
    return (
        f"rollout.concurrency {wanted} needs more open files than are allowed here (ulimit -Hn): fewer requests will be"
        f" under way: --set rollout.concurrency={room}, or raise the limit"
    )


def require_disk(run: RunDirectory) -> None:
    """Raise UserError where the checkpoints of a run, beyond those that are there, do not fit on the disk."""
    needed = checkpoint_bytes(run)
    there = sum(file.stat().st_size for file in run.root.rglob("*") if file.is_file()) if needed else 0
    try:
        require_room(run.root, needed - there, "checkpoints and exports")
    except UserError as error:
        raise UserError(f"{error}; --set keep_checkpoints=1 --set keep_exports=1 keeps the fewest")


def checkpoint_bytes(run: RunDirectory) -> int:
    """Return the most bytes that the checkpoints of a run take at once; 0 where its model is small or not known."""
    model = run.config.model.path
    weights = 0 if model is None else sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    needed = bytes_on_disk(run.config, weights // BYTES_PER_PARAMETER)
    return needed if needed >= 1e9 else 0


def require_compiler() -> None:
    """Raise UserError where training on GPUs lacks what compiles its kernels."""
    lines = missing_for_triton(Path(sys.executable), os.environ) if count_gpus() else []
    if lines:
        raise UserError(*lines)


def require_gpus(config: Config) -> None:
    """Raise UserError where a machine with GPUs has too few of them; one without trains on its processors."""
    count = count_gpus()
    if not count:
        return
    training, server = config.parallel.world_size, config.server
    is_elsewhere = server_launcher() is not None
    last = server.first_gpu + server.replicas * server.tensor_parallel_size
    lines = []
    if training > count:
        lines.append(
            f"parallel: tensor * pipeline * data = {training} processes, {count} GPUs here: lower"
            " --set parallel.data_parallel_size=, or start it on several machines (stages/submit.slurm)"
        )
    if last > count and not is_elsewhere:
        lines.append(
            f"server: GPUs {server.first_gpu} to {last - 1} (first_gpu, replicas * tensor_parallel_size), {count} GPUs"
            " here: lower --set server.replicas=, or --set server.first_gpu="
        )
    overlaps = server.first_gpu < training and last <= count and server.memory_fraction >= MOST_OF_A_GPU
    if overlaps and not server.shares_gpus and not is_elsewhere:
        lines.append(
            f"server.first_gpu {server.first_gpu}: training takes GPUs 0 to {training - 1}:"
            f" --set server.first_gpu={training}, or --set server.shares_gpus=true"
        )
    if lines:
        raise UserError(*lines)

"""Training checkpoints: model, optimizer and a small state, saved and loaded by all ranks together (torch_dist).

What one TP x PP x DP layout saved, any other loads; what stage 3 converted loads here too. The directory also carries
hf/, the small files of the Hugging Face checkpoint, so that exporting needs nothing else.
"""

import shutil
from pathlib import Path
from typing import TypeVar, cast

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint import save as dcp_save

from megatron_papo.checkpoint import optimizer_state
from megatron_papo.checkpoint.convert import OPTIMIZER_PREFIXES, require_same_names
from megatron_papo.checkpoint.proof import require_proof_if_converted
from megatron_papo.checkpoint.torch_dist_files import TorchDistCheckpoint, cause_of, make_reproducible
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HF_FILES
from megatron_papo.reading import reading
from megatron_papo.run import console
from megatron_papo.run.stage_output import file_hash

_Value = TypeVar("_Value")


class _PlainSave(TorchDistSaveShardedStrategy):
    """megatron-core's torch_dist format by PyTorch's own writer, in this process.

    megatron-core's writer starts a process server and forks per save: seconds for a small model, and it waits for ever
    if one dies.
    """

    def save(self, sharded_state_dict: dict, checkpoint_dir: Path) -> None:
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        try:
            dcp_save(
                mcore_to_pyt_state_dict(flat, False), storage_writer=FileSystemWriter(checkpoint_dir), planner=planner
            )
        except CheckpointException as error:
            raise cause_of(error, checkpoint_dir)


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy the hf/ folder of Megatron checkpoint `source` into checkpoint `target`; one rank calls it."""
    if not (source / HF_FILES / "config.json").is_file():
        raise UserError(
            f"{source / HF_FILES}: missing: convert the Hugging Face checkpoint with stages.stage3_convert_to_megatron"
        )
    shutil.copytree(source / HF_FILES, target / HF_FILES)


def save(
    directory: Path,
    model: torch.nn.Module,
    optimizer: MegatronOptimizer | None = None,
    state: dict | None = None,
) -> dict[str, str]:
    """Write a checkpoint and return the sha256 of its .distcp files by name, each hashed by the rank that wrote it.

    Collective; every rank gets all hashes.

    Args:
        directory: made where it is not there.
        model: Qwen2_5_VL or a wrapper of it.
        optimizer: its state is written too; None: weights alone.
        state: plain data (numbers, strings, lists, dicts), the same on every rank.

    Raises UserError where a file system refuses.
    """
    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    tree = {"model": _model_state(model)}
    if optimizer is not None:
        tree["optimizer"] = optimizer_state.sharded_state(optimizer, tree["model"], is_loading=False)
    if state is not None:
        tree["state"] = state
    tree["saved_from"] = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
    }
    console.quiet()
    dist_checkpointing.save(tree, str(directory), sharded_strategy=_PlainSave("torch_dist", 1))
    if torch.distributed.get_rank() == 0:
        make_reproducible(directory)
    return _gather_hashes(directory)


def hash_files_of_this_rank(directory: Path) -> dict[str, str]:
    """Return name -> sha256 of the .distcp files that this rank wrote, which torch names __RANK_NUMBER.distcp."""
    files = sorted(directory.glob(f"__{torch.distributed.get_rank()}_*.distcp"))
    return {file.name: file_hash(file) for file in files}


def _gather_hashes(directory: Path) -> dict[str, str]:
    """Return the hashes of all ranks on every rank. A rank that cannot read says so to all: none is left waiting."""
    try:
        result: dict[str, str] | str = hash_files_of_this_rank(directory)
    except OSError as error:
        result = f"{error.filename}: cannot be read after it was written: {error.strerror}"
    hashes: dict[str, str] = {}
    for part in _gather(result):
        if isinstance(part, str):
            raise UserError(part)
        hashes |= part
    return hashes


def _gather(value: _Value) -> list[_Value]:
    parts = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, value)
    return parts


def load_weights(checkpoint: Path | TorchDistCheckpoint, model: torch.nn.Module) -> None:
    """Fill the model from a checkpoint (a directory, or one that is opened already), casting to its dtype. Collective.

    An optimizer that exists already must be told: optimizer.reload_model_params(). Raises UserError for missing or
    unknown tensors and other shapes, and for a converted checkpoint whose proof is missing or failed.
    """
    stored = _opened(checkpoint)
    require_proof_if_converted(stored.directory)
    _check_against(stored, model)
    tree = _load({"model": _model_state(model)}, stored)
    result = _unwrap(model).load_state_dict(tree["model"], strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
    if missing or result.unexpected_keys:
        raise RuntimeError(
            f"{stored.directory}: load_state_dict left out {missing}, did not know {result.unexpected_keys}"
        )


def has_optimizer(checkpoint: Path | TorchDistCheckpoint) -> bool:
    """Return whether the checkpoint can be resumed from; one that stage 3 converted cannot."""
    return any(key.startswith(OPTIMIZER_PREFIXES) for key in _opened(checkpoint).tensors)


def load_optimizer(
    checkpoint: Path | TorchDistCheckpoint, model: torch.nn.Module, optimizer: MegatronOptimizer
) -> dict:
    """Fill the optimizer (fp32 main parameters included) and return the `state` that was saved with it. Collective.

    Raises UserError where the checkpoint holds no optimizer.
    """
    stored = _opened(checkpoint)
    if not has_optimizer(stored):
        raise UserError(f"{stored.directory}: holds no optimizer state: give a checkpoint that stage 5 wrote")
    model_state = _model_state(model)
    tree = {"optimizer": optimizer_state.sharded_state(optimizer, model_state, is_loading=True)}
    loaded = _load(tree, stored)
    optimizer_state.load(optimizer, loaded["optimizer"])
    return loaded.get("state", {})


def _load(tree: dict, stored: TorchDistCheckpoint) -> dict:
    """Return what megatron-core loads. Raises UserError where the checkpoint does not hold what the tree asks for."""
    stored.require_plain()
    with reading(stored.directory, "restore the checkpoint or make it again"):
        try:
            return dist_checkpointing.load(tree, str(stored.directory))
        except CheckpointException as error:
            raise cause_of(error, stored.directory)


def _opened(checkpoint: Path | TorchDistCheckpoint) -> TorchDistCheckpoint:
    return checkpoint if isinstance(checkpoint, TorchDistCheckpoint) else TorchDistCheckpoint(checkpoint)


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    return model


def _model_state(model: torch.nn.Module) -> dict:
    sharded_state_dict = cast(MegatronModule, _unwrap(model)).sharded_state_dict
    return sharded_state_dict(
        metadata={"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    )


def _check_against(stored: TorchDistCheckpoint, model: torch.nn.Module) -> None:
    """Compare the names and shapes that all ranks together want with those in the checkpoint."""
    wanted = _model_state(model)
    apply_factories(wanted)
    parts = _gather({tensor.key: tuple(tensor.global_shape) for tensor in nested_values(wanted)})
    shapes = {key: shape for part in parts for key, shape in part.items()}
    names = {key for key in stored.tensors if not key.startswith(OPTIMIZER_PREFIXES)}
    require_same_names(stored.directory, names, set(shapes))
    for key, shape in shapes.items():
        if stored.tensors[key].shape != shape:
            raise UserError(
                f"{stored.directory}: {key} has shape {list(stored.tensors[key].shape)}, the model {list(shape)}:"
                " another model's checkpoint"
            )

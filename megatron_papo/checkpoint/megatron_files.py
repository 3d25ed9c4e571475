"""Training checkpoints: model, optimizer and a small state, saved and loaded by all ranks together (torch_dist).

What one TP x PP x DP layout saved, any other loads; what stage 3 converted loads here too. The directory also carries
hf/, the small files of the Hugging Face checkpoint, so that exporting needs nothing else.
"""

import logging
import shutil
from pathlib import Path

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
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint import save as dcp_save

from megatron_papo.checkpoint import optimizer_state
from megatron_papo.checkpoint.convert import OPTIMIZER_PREFIXES, require_same_names
from megatron_papo.checkpoint.proof import require_proof_if_converted
from megatron_papo.checkpoint.torch_dist_files import TorchDistCheckpoint, cause_of, make_reproducible
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HF_FILES

# Takes the metrics and hf/ that lie beside the weights for a broken checkpoint, and says so at each save.
logging.getLogger("megatron.core.dist_checkpointing.serialization").setLevel(logging.ERROR)


class _PlainSave(TorchDistSaveShardedStrategy):
    """megatron-core's torch_dist format by PyTorch's own writer, in this process.

    megatron-core's writer starts a process server and forks per save: seconds for a small model, and it waits for ever
    if one dies.
    """

    def save(self, sharded_state_dict, checkpoint_dir) -> None:
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        try:
            dcp_save(
                mcore_to_pyt_state_dict(flat, False), storage_writer=FileSystemWriter(checkpoint_dir), planner=planner
            )
        except CheckpointException as error:
            raise cause_of(error, checkpoint_dir)


def copy_hf_files(source: Path, target: Path) -> None:
    """The hf/ folder of Megatron checkpoint `source` into checkpoint `target`; one rank calls it."""
    if not (source / HF_FILES / "config.json").is_file():
        raise UserError(
            f"{source / HF_FILES}: missing: convert the Hugging Face checkpoint with stages.stage3_convert_to_megatron"
        )
    shutil.copytree(source / HF_FILES, target / HF_FILES)


def save(directory: Path, model: torch.nn.Module, optimizer=None, state: dict | None = None) -> None:
    """Collective. model: Qwen2_5_VL or a wrapper of it. state: plain data (numbers, strings, lists, dicts), the same on
    every rank."""
    if torch.distributed.get_rank() == 0:
        Path(directory).mkdir(parents=True, exist_ok=True)
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
    dist_checkpointing.save(tree, str(directory), sharded_strategy=_PlainSave("torch_dist", 1))
    if torch.distributed.get_rank() == 0:
        make_reproducible(Path(directory))
    torch.distributed.barrier()


def load_weights(directory: Path, model: torch.nn.Module) -> None:
    """Collective. Fills the model, casting to its dtype. Raises UserError for missing or unknown tensors and other
    shapes, and for a converted checkpoint whose proof is missing or failed.

    An optimizer that exists already must be told: optimizer.reload_model_params().
    """
    require_proof_if_converted(Path(directory))
    _check_against(Path(directory), model)
    tree = dist_checkpointing.load({"model": _model_state(model)}, str(directory))
    result = _unwrap(model).load_state_dict(tree["model"], strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
    if missing or result.unexpected_keys:
        raise RuntimeError(f"{directory}: load_state_dict left out {missing}, did not know {result.unexpected_keys}")


def has_optimizer(directory: Path) -> bool:
    """Whether the checkpoint can be resumed from; one that stage 3 converted cannot."""
    return any(key.startswith(OPTIMIZER_PREFIXES) for key in TorchDistCheckpoint(Path(directory)).tensors)


def load_optimizer(directory: Path, model: torch.nn.Module, optimizer) -> dict:
    """Collective. Fills the optimizer (fp32 main parameters included) and returns the `state` that was saved with
    it."""
    if not has_optimizer(directory):
        raise UserError(f"{directory}: holds no optimizer state: give a checkpoint that stage 5 wrote")
    model_state = _model_state(model)
    tree = {"optimizer": optimizer_state.sharded_state(optimizer, model_state, is_loading=True)}
    loaded = dist_checkpointing.load(tree, str(directory))
    optimizer_state.load(optimizer, loaded["optimizer"])
    return loaded.get("state", {})


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    while hasattr(model, "module"):
        model = model.module
    return model


def _model_state(model: torch.nn.Module) -> dict:
    return _unwrap(model).sharded_state_dict(
        metadata={"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    )


def _check_against(directory: Path, model: torch.nn.Module) -> None:
    """Compares the names and shapes that all ranks together want with those in the checkpoint."""
    stored = TorchDistCheckpoint(directory).tensors
    wanted = _model_state(model)
    apply_factories(wanted)
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(
        everyone, {tensor.key: tuple(tensor.global_shape) for tensor in nested_values(wanted)}
    )
    shapes = {key: shape for part in everyone for key, shape in part.items()}
    require_same_names(directory, {key for key in stored if not key.startswith(OPTIMIZER_PREFIXES)}, set(shapes))
    for key, shape in shapes.items():
        if stored[key].shape != shape:
            raise UserError(
                f"{directory}: {key} has shape {list(stored[key].shape)}, the model {list(shape)}: another model's"
                " checkpoint"
            )

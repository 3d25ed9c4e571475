"""Training checkpoints: model, optimizer and a small state, saved and loaded by all ranks together (torch_dist).

What one TP x PP x DP layout saved, any other loads; what stage 3 converted loads here too. The directory also carries
hf/, the small files of the Hugging Face checkpoint, so that exporting needs nothing else.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, cast

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import CheckpointException

from megatron_papo.checkpoint import optimizer_state
from megatron_papo.checkpoint.convert import OPTIMIZER_PREFIXES, require_same_names
from megatron_papo.checkpoint.hf_files import TensorInfo
from megatron_papo.checkpoint.proof import require_proof_if_converted
from megatron_papo.checkpoint.torch_dist_files import TorchDistCheckpoint
from megatron_papo.checkpoint.torch_dist_writer import ChunkWriter, WrittenChunks, finish
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HF_FILES
from megatron_papo.reading import reading
from megatron_papo.run import console
from megatron_papo.run.room import refusal

_Value = TypeVar("_Value")
AGAIN = "restore the checkpoint or make it again"


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
    """Write a checkpoint and return the sha256 of its .distcp files by name, see Save. Collective."""
    return Save(directory, model, optimizer, state).finish()


class Save:
    """A checkpoint that is being written: made, perhaps begun, finished. All ranks call the methods together.

    Each rank writes what it alone owns (DistributedOptimizer's state) and its share of what the data-parallel ranks
    hold alike: of P parameters of its model-parallel shard in b bytes each, P * (b + 12) / DP bytes, hashed while they
    are written. Beside that it needs torch_dist_writer.CHUNK_BYTES of host memory for the copy of a part and four
    blocks of hashed_files.BLOCK, 128 MiB together whatever P is, and nothing on the device: no communication but names
    and places. begin() costs nothing more: nothing is copied ahead.
    """

    def __init__(
        self,
        directory: Path,
        model: torch.nn.Module,
        optimizer: MegatronOptimizer | None = None,
        state: dict | None = None,
    ):
        """Look at what is to be written. Nothing of it may change before finish() has returned.

        Args:
            directory: made where it is not there.
            model: Qwen2_5_VL or a wrapper of it.
            optimizer: its state is written too; None: weights alone.
            state: plain data (numbers, strings, lists, dicts), the same on every rank.
        """
        self.directory = directory
        if torch.distributed.get_rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        tree: dict = {"model": _model_state(model)}
        part = None if optimizer is None else optimizer_state.distributed_part(optimizer)
        if part is not None:
            boxes = optimizer_state.sharded_state(part, tree["model"])
        elif optimizer is not None:
            with torch.no_grad():
                tree["optimizer"] = optimizer.sharded_state_dict(tree["model"], is_loading=False, metadata={})
        apply_factories(tree)
        _share_among_replicas(tree)
        if part is not None:
            tree["optimizer"] = boxes
        if state is not None:
            tree["state"] = dict(state)
        tree["saved_from"] = {
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
            "data_parallel_size": parallel_state.get_data_parallel_world_size(),
        }
        console.quiet()
        sharded, self._common = save_preprocess(tree)  # with megatron-core's check that each part is saved by one rank
        self._own = [tensor for tensor in nested_values(sharded) if is_main_replica(tensor.replica_id)]
        self._rank = torch.distributed.get_rank()
        self._writing: Future[WrittenChunks] | None = None

    def begin(self) -> None:
        """Write from a thread, until finish()."""
        pool = ThreadPoolExecutor(1, "save")
        self._writing = pool.submit(self._write)
        pool.shutdown(wait=False)

    def finish(self) -> dict[str, str]:
        """Return name -> sha256 of all ranks' files once the checkpoint is complete, written now or since begin();
        afterwards this holds no tensors any more, which may be a GPU's.

        Raises UserError, on all ranks, where a file system refuses.
        """
        writing = self._write if self._writing is None else self._writing.result
        infos = {tensor.key: TensorInfo(tensor.dtype, tuple(tensor.global_shape)) for tensor in self._own}
        parts = _agreed(self.directory, lambda: (infos, writing()))
        self._own = []
        if self._rank == 0:
            all_infos = {key: info for infos_of_rank, _ in parts for key, info in infos_of_rank.items()}
            finish(self.directory, dict(sorted(all_infos.items())), [written for _, written in parts], self._common)
        return {name: value for _, written in parts for name, value in written.hashes.items()}

    def _write(self) -> WrittenChunks:
        """Write this rank's files."""
        with ChunkWriter(self.directory, self._rank) as writer:
            for tensor in self._own:
                stacked = tensor.data.reshape((1,) * tensor.prepend_axis_num + tuple(tensor.local_shape))
                writer.write_in_parts(tensor.key, tensor.global_offset, stacked)
        return writer.written


def _share_among_replicas(tree: dict) -> None:
    """Decide which data-parallel rank saves what all of them hold: the one that has least so far, the large tensors
    first. Every rank comes to the same result."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    load = [0] * group.size()
    tensors = [tensor for tensor in nested_values(tree) if isinstance(tensor, ShardedTensor)]
    for tensor in sorted(tensors, key=lambda tensor: tensor.data.nbytes, reverse=True):
        pipeline, tensor_parallel, replica = tensor.replica_id
        assert replica == group.rank()
        if (pipeline, tensor_parallel) == (0, 0):
            writer = load.index(min(load))
            load[writer] += tensor.data.nbytes
            tensor.replica_id = (0, 0, (replica - writer) % group.size())


def _agreed(directory: Path, work: Callable[[], _Value]) -> list[_Value]:
    """Return what the work returns on each rank. Where it fails on one, all say so. Collective."""
    failure: BaseException | None = None
    result: _Value | str
    try:
        result = work()
    except Exception as error:
        failure = error
        why = refusal(error) or f"{type(error).__name__}: {error}"
        result = str(error) if isinstance(error, UserError) else f"{directory}: cannot write: {why}"
    results: list[_Value] = []
    for part in _gather(result):
        if isinstance(part, str):
            raise UserError(part) from failure
        results.append(part)
    return results


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
    part = optimizer_state.distributed_part(optimizer)
    if part is not None:
        with reading(stored.directory, AGAIN):
            optimizer_state.load(part, model_state, stored)
    else:
        with torch.no_grad():
            tree = {"optimizer": optimizer.sharded_state_dict(model_state, is_loading=True, metadata={})}
            optimizer.load_state_dict(_load(tree, stored)["optimizer"])
    return dict(stored.common.get("state", {}))


def _load(tree: dict, stored: TorchDistCheckpoint) -> dict:
    """Return what megatron-core loads. Raises UserError where the checkpoint does not hold what the tree asks for."""
    stored.require_plain()
    with reading(stored.directory, AGAIN):
        try:
            return dist_checkpointing.load(tree, str(stored.directory))
        except CheckpointException as error:
            raise next((cause for cause, _ in error.failures.values()), error)  # what went wrong on some rank


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

"""The Hugging Face model under DeepSpeed: loading, one optimizer step, and writing it back as a Hugging Face
checkpoint."""

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from megatron_papo.checkpoint.hf_files import (
    HFCheckpoint,
    TensorInfo,
    copy_small_files,
    correct_config,
    headers_for,
    names_in_order,
    write_weights,
)
from megatron_papo.checkpoint.name_map import disk_name
from megatron_papo.config import ModelConfig, SftConfig
from megatron_papo.distributed import process_groups
from megatron_papo.errors import UserError
from megatron_papo.sft.batches import SftBatch, TargetLoss, deepspeed_config

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration


def import_deepspeed() -> ModuleType:
    """Return DeepSpeed, kept from compiling C++ when it starts."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # A launcher sets it; a single process may be started without one.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    # torch renames two collectives that DeepSpeed calls; of no interest to who trains.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its shared-memory communication for CPUs is compiled in every process at the first start (40 s), and a build that
    # was killed leaves a lock on which all later ones wait for ever. Plain gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class SftEngine:
    """DeepSpeed ZeRO around TargetLoss. All ranks make it and call its methods together."""

    def __init__(self, directory: Path, model: ModelConfig, config: SftConfig):
        self.source = HFCheckpoint(directory)
        self.config = config
        self.deepspeed = import_deepspeed()
        settings = deepspeed_config(config, model.dtype)
        loss = TargetLoss(_load(directory, model, settings, self.source.hf.tie_word_embeddings))
        self.optimizer = torch.optim.AdamW(
            loss.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )
        self.deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
        self.engine, *_ = self.deepspeed.initialize(model=loss, optimizer=self.optimizer, config=settings)

    def step(self, batches: list[SftBatch], total_tokens: int, learning_rate: float) -> tuple[float, float]:
        """Make one optimizer step and return (loss, norm of the gradient before clipping), the same on every rank.

        Args:
            batches: this rank's micro-batches.
            total_tokens: target tokens of the global batch, all ranks together.
            learning_rate: of this step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed divides the gradient by the number of ranks and of micro-batches; it is to be divided by the tokens
        # alone.
        scale = process_groups.world_size() * len(batches) / total_tokens
        loss = torch.zeros((), device=process_groups.device())
        for batch in batches:
            summed = self.engine(**batch.to(process_groups.device()))
            loss += summed.detach() / total_tokens
            self.engine.backward(summed * scale)
            self.engine.step()
        torch.distributed.all_reduce(loss)
        return float(loss), float(self.engine.get_global_grad_norm())

    def save(self, directory: Path | None) -> dict[str, str]:
        """Write a Hugging Face checkpoint with the source's files, tensor names and order, and return the sha256 of its
        weight files by name.

        One tensor at a time: with ZeRO-3 each is gathered from the ranks, written and forgotten.

        Args:
            directory: existing; None on all ranks but one, which return {}.

        Raises UserError where the model is not the source's, or a file system refuses.
        """
        parameters = {
            disk_name(name): parameter
            for name, parameter in self.engine.module.model.state_dict(keep_vars=True).items()
        }
        _check_names(set(self.source.tensors), set(parameters), self.source.directory)
        infos = {name: TensorInfo(parameters[name].dtype, info.shape) for name, info in self.source.tensors.items()}
        headers = headers_for(self.source.headers, infos, shard_bytes=None)

        def gathered(names: list[str]) -> Iterator[torch.Tensor]:
            for name in names:
                with self.deepspeed.zero.GatheredParameters([parameters[name]], enabled=self.config.zero_stage == 3):
                    if tuple(parameters[name].shape) != infos[name].shape:
                        raise UserError(f"{self.source.directory}: {name} has another shape than the model in memory")
                    yield parameters[name].detach().cpu()

        if directory is None:
            for header in headers.values():  # the same collectives in the same order
                for _ in gathered([disk_name(name) for name in names_in_order(header)]):
                    pass
            return {}
        copy_small_files(self.source.directory, directory)
        dtypes = {info.dtype for info in infos.values()}
        correct_config(directory, dtypes, self.source.headers, self.source.hf.tie_word_embeddings)
        return write_weights(directory, headers, gathered)


def _load(directory: Path, model: ModelConfig, settings: dict, tied: bool) -> "Qwen2_5_VLForConditionalGeneration":
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging as transformers_logging

    if settings["zero_optimization"]["stage"] == 3:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        # While it is alive, from_pretrained shards every tensor over the ranks as it reads it.
        alive = HfDeepSpeedConfig(settings)  # noqa: F841 only has to exist
    if not process_groups.is_main_rank():
        transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    # transformers 4.57 wrote the flag into text_config alone; transformers 5 before 5.19 would then make a random
    # untied head.
    config.tie_word_embeddings = tied
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, config=config, dtype=getattr(torch, model.dtype)
    )
    if model.recompute == "full":
        loaded.gradient_checkpointing_enable()
    return loaded.train()


def _check_names(stored: set[str], in_memory: set[str], directory: Path) -> None:
    missing, extra = sorted(stored - in_memory), sorted(in_memory - stored - {"lm_head.weight"})
    if missing or extra:
        raise UserError(
            f"{directory}: not a Qwen2.5-VL checkpoint: unknown tensors {missing[:5]}, absent tensors {extra[:5]}"
        )

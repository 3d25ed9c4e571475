"""What a training process holds from one iteration to the next: the policy with its optimizer on the device, the
reference on the host."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from megatron_papo.checkpoint import megatron_files
from megatron_papo.checkpoint.megatron_files import Save
from megatron_papo.checkpoint.torch_dist_files import TorchDistCheckpoint
from megatron_papo.config import Config
from megatron_papo.distributed import collectives
from megatron_papo.model.freezing import is_frozen
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.model.qwen2_5_vl import build_model
from megatron_papo.training.encoded_pictures import EncodedPictures
from megatron_papo.training.optimizer import build_optimizer


class Policy:
    """This rank's part of the network that is trained. All ranks call the methods together."""

    def __init__(self, config: Config, hf: HFConfig):
        self.config, self.hf = config, hf
        self.dtype = getattr(torch, config.model.dtype)
        self._trained: tuple[DistributedDataParallel, MegatronOptimizer] | None = None
        self.state: dict = {"step": 0}
        """Plain data that is saved with the checkpoint: the optimizer step of the run, the hacking guard's state."""
        self.at: Path | None = None
        """The checkpoint whose weights, optimizer and state these are."""
        self._reference: list[torch.Tensor] | None = None
        self.encoded_pictures: EncodedPictures | None = None
        """Of the vision tower, where it is frozen; for the collator."""
        if "vision_tower" in config.model.freeze:
            kept = int(config.training.encoded_picture_gigabytes * 1e9)
            self.encoded_pictures = EncodedPictures(self._encode_picture, kept)

    @property
    def model(self) -> DistributedDataParallel:
        """Return the network in its data-parallel wrapper; load() comes first."""
        return self._held()[0]

    @property
    def optimizer(self) -> MegatronOptimizer:
        return self._held()[1]

    def _held(self) -> tuple[DistributedDataParallel, MegatronOptimizer]:
        if self._trained is None:
            raise RuntimeError("no checkpoint is loaded")
        return self._trained

    def load(self, checkpoint: Path) -> None:
        """Load a checkpoint's weights and, unless it comes from a conversion, its optimizer and state; what was held
        before is forgotten."""
        self.forget()
        stored = TorchDistCheckpoint(checkpoint)
        model = self._build(stored)
        self._trained = build_optimizer(model, self.config.optimizer, self.dtype)
        resumes = megatron_files.has_optimizer(stored)
        self.state = megatron_files.load_optimizer(stored, model, self.optimizer) if resumes else {"step": 0}
        self.at = checkpoint

    def make_random(self) -> None:
        """Take random weights, and the same as the reference: for measurements, which need no checkpoint."""
        self.forget()
        model = self._empty()
        self._reference = [_on_host(parameter) for parameter in model.parameters()]
        self._trained = build_optimizer(model, self.config.optimizer, self.dtype)
        self.state = {"step": 0}

    def save(self, directory: Path, published: Path, with_optimizer: bool = True) -> dict[str, str]:
        """Write a checkpoint; return the sha256 of the files that the ranks wrote, by name. See prepare_save."""
        return self.prepare_save(directory, published, with_optimizer).finish()

    def prepare_save(self, directory: Path, published: Path, with_optimizer: bool = True) -> Save:
        """Return a checkpoint that has yet to be written, before the policy changes.

        Args:
            directory: Where to.
            published: The name it is going to have.
            with_optimizer: Optimizer and state, too: it can be resumed from.
        """
        self.at = published
        return Save(directory, self.model.module, self.optimizer if with_optimizer else None, self.state)

    def forget(self) -> None:
        """Gives up the device's memory; the next load brings everything back."""
        self._trained = self.at = None
        if self.encoded_pictures is not None:
            self.encoded_pictures.forget()
        gc.collect()  # hooks make cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def load_reference(self, checkpoint: Path) -> None:
        """Into host memory (pinned on GPU machines), unless it is there already: the reference never changes."""
        if self._reference is None:
            with torch.no_grad():
                self._reference = [
                    _on_host(parameter) for parameter in self._build(TorchDistCheckpoint(checkpoint)).parameters()
                ]
            gc.collect()

    @contextmanager
    def as_reference(self) -> Iterator[torch.nn.Module]:
        """Give the model the reference's weights for a while; its own wait in the reference's place. Afterwards they
        are back, bit for bit."""
        if self._reference is None:
            raise RuntimeError("no reference is loaded")
        sees_otherwise = self.encoded_pictures is not None and self._reference_sees_otherwise(self._reference)
        self._exchange(self._reference)
        if self.encoded_pictures is not None and sees_otherwise:
            self.encoded_pictures.forget()
        yield self.model
        self._exchange(self._reference)
        if self.encoded_pictures is not None and sees_otherwise:
            self.encoded_pictures.forget()

    def _reference_sees_otherwise(self, reference: Sequence[torch.Tensor]) -> bool:
        """Say whether the reference's vision tower is another one than the frozen tower of the policy, on any rank."""
        pairs = zip(self.model.module.named_parameters(), reference, strict=True)
        differs = any(
            is_frozen(name, ["vision_tower"], tied=False) and not torch.equal(parameter.cpu(), stored)
            for (name, parameter), stored in pairs
        )
        return collectives.max_over_ranks(differs) > 0

    def _encode_picture(self, patches: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        tower = self.model.module.vision_model
        assert tower is not None  # it is the first stage
        return tower.encode(patches, grid)

    @torch.no_grad()
    def _exchange(self, reference: Sequence[torch.Tensor]) -> None:
        for parameter, stored in zip(self.model.parameters(), reference, strict=True):
            waiting = parameter.detach().clone()
            parameter.copy_(stored)
            stored.copy_(waiting)

    def _build(self, stored: TorchDistCheckpoint) -> MegatronModule:
        model = self._empty()
        megatron_files.load_weights(stored, model)
        return model

    def _empty(self) -> MegatronModule:
        parallel, recompute = self.config.parallel, self.config.model.recompute
        return build_model(
            self.hf,
            dtype=self.dtype,
            sequence_parallel=parallel.sequence_parallel,
            recompute=recompute,
            vision_tower=parallel.vision_tower,
            frozen=self.config.model.freeze,
        )


def _on_host(parameter: torch.Tensor) -> torch.Tensor:
    stored = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu", pin_memory=parameter.is_cuda)
    return stored.copy_(parameter)

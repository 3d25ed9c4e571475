"""What a section is given, and what several of them make first. Nothing is imported at the top that a machine may
lack."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from megatron_papo.config import Config
    from megatron_papo.model.hf_config import HFConfig
    from megatron_papo.synthetic.tiny_model import TinySizes
    from megatron_papo.training.rows import TrainingRollout

DEMO_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
ONE_PROCESS = [f"parallel.{name}_parallel_size=1" for name in ("tensor_model", "pipeline_model", "data")]


@dataclass(frozen=True)
class Task:
    """What a section is given."""

    output: Path
    """Where it may write; below it, what several sections use is made once."""
    device: Literal["cuda", "cpu"]
    quick: bool
    """Smaller measurements: for a first look."""

    @property
    def gpus(self) -> int:
        """Return the number of GPUs; 0 with --device cpu."""
        if self.device == "cpu":
            return 0
        import torch

        return torch.cuda.device_count()

    def checkpoint(self) -> tuple[Path, Path]:
        """Return a small random model of the real architecture, with weights that bfloat16 holds exactly: the Hugging
        Face checkpoint, and the same in Megatron's format. On GPUs its heads are as wide as the published models'."""
        from megatron_papo.checkpoint.convert import HFCheckpoint, hf_to_megatron
        from megatron_papo.synthetic.tiny_model import make_tiny_model

        place = self.output / "model"
        if not place.exists():
            partial = self.output / "model.partial"
            shutil.rmtree(partial, ignore_errors=True)
            make_tiny_model(partial / "hf", seed=1, sizes=self._sizes())
            _round_to_bfloat16(partial / "hf")
            (partial / "megatron").mkdir()
            hf_to_megatron(HFCheckpoint(partial / "hf"), partial / "megatron")
            partial.rename(place)
        return place / "hf", place / "megatron"

    def _sizes(self) -> "TinySizes":
        from megatron_papo.synthetic.tiny_model import TinySizes

        if self.device == "cpu":  # those of the demo
            return TinySizes(initializer_range=0.15, random_biases_and_norms=True)
        return TinySizes(
            hidden_size=1024,  # heads of 128
            intermediate_size=2816,
            num_layers=8,
            num_heads=8,
            num_kv_heads=2,
            vision_hidden_size=640,  # heads of 80
            vision_intermediate_size=1728,
            vision_depth=8,
            vision_heads=8,
            full_attention_layers=(3, 7),
            initializer_range=0.04,
            random_biases_and_norms=True,
        )

    def config(self, dtype: str, changes: Sequence[str] = ()) -> "Config":
        """Return the demo's configuration for one process, with some changes."""
        from megatron_papo.config_files import load_config

        one = [*ONE_PROCESS, "parallel.sequence_parallel=false", f"model.dtype={dtype}"]
        return load_config(DEMO_CONFIG, [*one, *changes])

    def rows(self, hf: "HFConfig", config: "Config", directory: Path, shape: "Shape") -> list["TrainingRollout"]:
        """Return made rollouts, whole groups, each with a picture of noise.

        Args:
            hf: the model.
            config: group size and pixel limits.
            directory: where the pictures are written.
            shape: how many and how long.
        """
        from argparse import Namespace

        from megatron_papo.training.rows import make_rows, rollout_advantages
        from tools.benchmark.layout import make_rollouts

        directory.mkdir(exist_ok=True)
        size = config.rollout.group_size
        wanted = Namespace(
            groups=shape.groups,
            group_size=size,
            prompt_tokens=shape.prompt_tokens,
            response_tokens=shape.response_tokens,
        )
        rollouts = make_rollouts(wanted, hf, directory)
        advantages = rollout_advantages(rollouts, size, config.objective.advantage, directory)
        return make_rows(rollouts, advantages, directory, config, hf, directory)


@dataclass(frozen=True)
class Shape:
    """Of made rollouts."""

    groups: int
    prompt_tokens: int
    """Of each prompt, nine tenths of them one picture."""
    response_tokens: int
    """On average."""

    @property
    def changes(self) -> list[str]:
        """Return the configuration under which they are accepted."""
        return [f"data.max_pixels={self.prompt_tokens * 784}", f"data.max_prompt_tokens={4 * self.prompt_tokens}"]


def _round_to_bfloat16(hf_dir: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(hf_dir / "model.safetensors").items()}
    save_file(tensors, hf_dir / "model.safetensors", metadata={"format": "pt"})
    tree = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps({**tree, "torch_dtype": "bfloat16"}, indent=2))


def gradients_by_official_name(model: "torch.nn.Module", hf: "HFConfig") -> dict[str, "torch.Tensor"]:
    """Return the gradients that megatron-core's wrapper has summed up in one process, as transformers names and lays
    out its parameters."""
    from megatron_papo.checkpoint.name_map import pieces

    gradients = {name: vars(parameter)["main_grad"] for name, parameter in model.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    for piece in pieces(hf):
        layer = "" if piece.layer is None else f"{piece.layer}."
        name = piece.megatron.replace("decoder.layers.", f"decoder.layers.{layer}")
        tensor = gradients[name].reshape(piece.megatron_shape).float()
        found |= dict(zip(piece.hf_shapes, piece.layout.to_hf(tensor, hf), strict=True))
    return found

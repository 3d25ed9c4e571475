"""Hugging Face <-> Megatron: one walk over the name map in each direction, one piece in memory at a time.

    hf_to_megatron(HFCheckpoint(hf_dir), megatron_dir)          safetensors -> torch_dist, plus hf/ with the small files
    megatron_to_hf(MegatronCheckpoint(megatron_dir), hf_dir)    back; the same bytes if nothing was trained in between

Every tensor on either side is mapped exactly once or a UserError lists the names. Both write proof.json (verify.py).
"""

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_papo.checkpoint import hf_files, verify
from megatron_papo.checkpoint.hf_files import HFCheckpoint, SafetensorsWriter, TensorInfo
from megatron_papo.checkpoint.name_map import Piece, disk_name, pieces
from megatron_papo.checkpoint.torch_dist_files import TorchDistCheckpoint, write_pieces
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HF_FILES, read_hf_config

OPTIMIZER_PREFIXES = ("optimizer.", "chained_")
"""Keys in a training checkpoint that belong to the optimizer."""

Progress = Callable[[int], None]
"""Called with the number of bytes that were just done."""


class MegatronCheckpoint:
    """A Megatron checkpoint of this project, seen as the Hugging Face tensors it holds. Raises UserError if it is not complete."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.stored = TorchDistCheckpoint(self.directory)
        self.hf = read_hf_config(self.directory / HF_FILES)
        self.headers = hf_files.load_headers(self.directory / HF_FILES)
        names = {disk_name(name) for header in self.headers.values() for name in hf_files.header_entries(header)}
        self.pieces = pieces(self.hf, tied_head_on_disk="lm_head.weight" in names)
        self._check()
        self.tensors = {
            name: TensorInfo(self.stored.tensors[piece.megatron].dtype, shape)
            for piece in self.pieces
            for name, shape in piece.hf_shapes.items()
        }
        require_same_names(self.directory / HF_FILES / hf_files.HEADERS, names, set(self.tensors))
        self._piece_of = {name: piece for piece in self.pieces for name in piece.hf_shapes}
        self._last: tuple[Piece, dict[str, torch.Tensor]] | None = None

    def _check(self) -> None:
        expected = {piece.megatron: _stored_shape(piece) for piece in self.pieces}
        found = {key for key in self.stored.tensors if not key.startswith(OPTIMIZER_PREFIXES)}
        require_same_names(self.directory, found, set(expected))
        for key, shape in expected.items():
            if self.stored.tensors[key].shape != shape:
                raise UserError(_wrong_shape(self.directory, key, self.stored.tensors[key].shape, shape))

    def read_piece(self, piece: Piece) -> dict[str, torch.Tensor]:
        """Official names -> tensors."""
        return dict(zip(piece.hf_shapes, piece.layout.to_hf(self.stored.read(piece.megatron, piece.layer), self.hf)))

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its official name."""
        piece = self._piece_of[name]
        if self._last is None or self._last[0] is not piece:
            self._last = (piece, self.read_piece(piece))
        return self._last[1][name]


def open_checkpoint(directory: Path) -> HFCheckpoint | MegatronCheckpoint:
    """Of either kind; both have .tensors (official name -> TensorInfo) and .read(name). Raises UserError."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: not a directory: give a checkpoint directory")
    return MegatronCheckpoint(directory) if (directory / "metadata.json").exists() else HFCheckpoint(directory)


def hf_to_megatron(checkpoint: HFCheckpoint, target: Path, progress: Progress = lambda count: None) -> None:
    """Writes the torch_dist checkpoint and its proof into the existing directory `target`. `progress` sees every byte twice."""
    tied_head = checkpoint.hf.tie_word_embeddings and "lm_head.weight" in checkpoint.tensors
    plan = pieces(checkpoint.hf, tied_head)
    _check_hf(checkpoint, plan)
    hashes: dict[str, str] = {}

    def read(piece: Piece) -> torch.Tensor:
        tensors = [checkpoint.read(name) for name in piece.hf_shapes]
        for name, tensor in zip(piece.hf_shapes, tensors):
            hashes[name] = verify.tensor_hash(tensor)
            progress(tensor.nbytes)
        return piece.layout.to_megatron(tensors, checkpoint.hf)

    write_pieces(target, plan, _megatron_dtypes(checkpoint, plan), read)
    hf_files.copy_small_files(checkpoint.directory, target / HF_FILES)
    hf_files.save_headers(checkpoint.headers, target / HF_FILES)
    written = MegatronCheckpoint(target)
    read_back = {}
    for piece in written.pieces:
        for name, tensor in written.read_piece(piece).items():
            read_back[name] = verify.tensor_hash(tensor)
            progress(tensor.nbytes)
    verify.write_proof(target, "hf_to_megatron", hashes, read_back)


def megatron_to_hf(checkpoint: MegatronCheckpoint, target: Path, progress: Progress = lambda count: None) -> None:
    """Writes the Hugging Face checkpoint and its proof into the existing directory `target`. `progress` sees every byte twice."""
    dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
    hf_files.copy_small_files(checkpoint.directory / HF_FILES, target)
    hf_files.correct_config(target, set(dtypes.values()), checkpoint.headers, checkpoint.hf.tie_word_embeddings)
    writer = SafetensorsWriter(target, checkpoint.headers, dtypes)
    hashes, read_back = {}, {}
    for piece in checkpoint.pieces:
        tensor = checkpoint.stored.read(piece.megatron, piece.layer)
        hashes[piece.name] = verify.tensor_hash(tensor)
        for name, part in zip(piece.hf_shapes, piece.layout.to_hf(tensor, checkpoint.hf)):
            writer.write(name, part)
        progress(tensor.nbytes)
    writer.close()
    written = HFCheckpoint(target)
    for piece in checkpoint.pieces:
        tensor = piece.layout.to_megatron([written.read(name) for name in piece.hf_shapes], written.hf)
        read_back[piece.name] = verify.tensor_hash(tensor)
        progress(tensor.nbytes)
    verify.write_proof(target, "megatron_to_hf", hashes, read_back)


def _check_hf(checkpoint: HFCheckpoint, plan: list[Piece]) -> None:
    expected = {name: shape for piece in plan for name, shape in piece.hf_shapes.items()}
    require_same_names(checkpoint.directory, set(checkpoint.tensors), set(expected))
    for name, shape in expected.items():
        if checkpoint.tensors[name].shape != shape:
            raise UserError(_wrong_shape(checkpoint.directory, name, checkpoint.tensors[name].shape, shape))


def _megatron_dtypes(checkpoint: HFCheckpoint, plan: list[Piece]) -> dict[str, torch.dtype]:
    """By Megatron key; the tensors that become one must agree."""
    dtypes: dict[str, torch.dtype] = {}
    for piece in plan:
        for name in piece.hf_shapes:
            dtype = checkpoint.tensors[name].dtype
            if dtypes.setdefault(piece.megatron, dtype) != dtype:
                raise UserError(
                    f"{checkpoint.directory}: {name} is {dtype}, others that become {piece.megatron} are {dtypes[piece.megatron]}:"
                    " save the checkpoint in one dtype"
                )
    return dtypes


def require_same_names(where: Path, found: set[str], expected: set[str]) -> None:
    """Raises UserError that lists what is missing and what is unknown."""
    problems = [
        f"{len(names)} {what} tensor{'s' * (len(names) > 1)}: {', '.join(sorted(names)[:8])}{', ...' * (len(names) > 8)}"
        for what, names in (("missing", expected - found), ("unknown", found - expected))
        if names
    ]
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}: config.json and the weights do not belong together")


def _stored_shape(piece: Piece) -> tuple[int, ...]:
    return piece.megatron_shape if piece.layer is None else (piece.num_layers, *piece.megatron_shape)


def _wrong_shape(where: Path, name: str, found: tuple, expected: tuple) -> str:
    return f"{where}: {name} has shape {list(found)}, config.json asks for {list(expected)}: they do not belong together"

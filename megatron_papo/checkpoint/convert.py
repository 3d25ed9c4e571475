"""Hugging Face <-> Megatron: each file is read once from beginning to end and each written once, a piece at a time.

    hf_to_megatron(HFCheckpoint(hf_dir), megatron_dir)          safetensors -> torch_dist, plus hf/ with the small files
    megatron_to_hf(MegatronCheckpoint(megatron_dir), hf_dir)    back; the same bytes if nothing was trained in between

Every tensor on either side is mapped exactly once or a UserError lists the names. Both then read the result back from
disk through the inverse layouts, compare it with what they had read, and write proof.json (proof.py). Memory: the
tensors of one layer that lie apart in the files; tensors that nothing permutes (embeddings) pass in blocks of rows.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from megatron_papo.checkpoint import config_json, hf_files, proof
from megatron_papo.checkpoint.hashed_files import ahead, new_tensor_hash, tensor_bytes, tensor_hash
from megatron_papo.checkpoint.hf_files import HFCheckpoint, TensorInfo
from megatron_papo.checkpoint.layouts import LAYOUTS
from megatron_papo.checkpoint.name_map import Piece, disk_name, pieces
from megatron_papo.checkpoint.torch_dist_files import TorchDistCheckpoint
from megatron_papo.checkpoint.torch_dist_writer import TorchDistWriter
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import HF_FILES, read_hf_config
from megatron_papo.run.stage_output import require_weights

OPTIMIZER_PREFIXES = ("optimizer.", "chained_")
"""Keys in a training checkpoint that belong to the optimizer."""

BLOCK_BYTES = 128 << 20
"""Tensors that nothing permutes are read and written in blocks of rows of at most this size."""
HELD_BYTES = 2 << 30
"""Tensors that wait for the others of their piece are forgotten beyond this, and read again when the others are
there."""
READERS = 2
"""Threads that read the result back."""

Progress = Callable[[int], object]
"""Called with the number of bytes that were just done."""


@dataclass
class Written:
    """What a conversion knows of the files, for manifests: file name -> sha256."""

    source: dict[str, str]
    """Of the files of the source that were read whole."""
    target: dict[str, str]
    """Of what was written, as it was meant to be: the proof has compared it with the disk."""


class MegatronCheckpoint:
    """A Megatron checkpoint of this project, seen as the Hugging Face tensors it holds. Raises UserError if it is not
    complete."""

    def __init__(self, directory: Path, proof_read: proof.Proof | None = None):
        """Open a directory. proof_read: its proof, where the caller has read it."""
        self.directory = Path(directory)
        self._proof = proof_read
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
        self.piece_of = {name: piece for piece in self.pieces for name in piece.hf_shapes}
        self._last: tuple[Piece, dict[str, torch.Tensor]] | None = None

    @property
    def proof(self) -> "proof.Proof | None":
        """The proof of the conversion that made it, read when it is asked for; None of a checkpoint that was trained.

        Raises UserError where it is damaged or failed.
        """
        if self._proof is None and (self.directory / proof.PROOF).exists():
            self._proof = proof.require_proof(self.directory)
        return self._proof

    def _check(self) -> None:
        expected = {piece.megatron: _stored_shape(piece) for piece in self.pieces}
        present = {key for key in self.stored.tensors if not key.startswith(OPTIMIZER_PREFIXES)}
        require_same_names(self.directory, present, set(expected))
        for key, shape in expected.items():
            if self.stored.tensors[key].shape != shape:
                raise UserError(_wrong_shape(self.directory, key, self.stored.tensors[key].shape, shape))

    def read_piece(self, piece: Piece) -> dict[str, torch.Tensor]:
        """Return official name -> tensor."""
        return dict(zip(piece.hf_shapes, piece.layout.to_hf(self.stored.read(piece.megatron, piece.layer), self.hf)))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return one tensor by its official name, or its rows [first, last)."""
        piece = self.piece_of[name]
        if rows is not None and piece.layout is LAYOUTS["same"]:
            return self.stored.read(piece.megatron, piece.layer, rows)
        if self._last is None or self._last[0] is not piece:
            self._last = (piece, self.read_piece(piece))
        tensor = self._last[1][name]
        return tensor if rows is None else tensor[rows[0] : rows[1]]


def open_checkpoint(directory: Path) -> HFCheckpoint | MegatronCheckpoint:
    """Return a checkpoint of either kind; both have .tensors (official name -> TensorInfo) and .read(name, rows).

    Raises UserError.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: not a directory: give a checkpoint directory")
    require_weights(directory)
    return MegatronCheckpoint(directory) if (directory / "metadata.json").exists() else HFCheckpoint(directory)


def rows_at_once(shape: tuple[int, ...], itemsize: int) -> int:
    """Return how many rows of a tensor make a block."""
    return max(1, BLOCK_BYTES // (torch.Size(shape[1:]).numel() * itemsize))


def _block_rows(piece: Piece, itemsize: int) -> int | None:
    """Return the rows per block of a piece that passes in blocks; None for one that is read whole."""
    num_bytes = torch.Size(piece.megatron_shape).numel() * itemsize
    return (
        rows_at_once(piece.megatron_shape, itemsize)
        if piece.layout is LAYOUTS["same"] and num_bytes > BLOCK_BYTES
        else None
    )


def hf_to_megatron(
    checkpoint: HFCheckpoint, target: Path, progress: Progress = lambda count: None, dtype: torch.dtype | None = None
) -> Written:
    """Write the torch_dist checkpoint and its proof into an existing directory.

    Args:
        checkpoint: the source.
        target: the directory.
        progress: sees every byte of the source twice.
        dtype: to convert to; None keeps each tensor's.

    Raises UserError where tensors are missing, unknown or of another shape, or the result does not hold them.
    """
    tied_head = checkpoint.hf.tie_word_embeddings and "lm_head.weight" in checkpoint.tensors
    plan = pieces(checkpoint.hf, tied_head)
    _check_hf(checkpoint, plan)
    dtypes = _megatron_dtypes(checkpoint, plan, dtype)
    infos = {piece.megatron: TensorInfo(dtypes[piece.megatron], _stored_shape(piece)) for piece in plan}
    hashes = {name: new_tensor_hash() for name in checkpoint.tensors}
    with TorchDistWriter(target, infos) as writer:
        order = _write_megatron(checkpoint, plan, dtypes, writer, hashes, progress)
    hf_files.copy_small_files(checkpoint.directory, target / HF_FILES)
    hf_files.save_headers(checkpoint.headers, target / HF_FILES)
    read_back = _read_back_megatron(MegatronCheckpoint(target), order, checkpoint, progress)
    source = {name: value.hexdigest() for name, value in hashes.items()}
    proof.write_proof(target, "hf_to_megatron", checkpoint.file_hashes, dtype, source, read_back)
    return Written(checkpoint.file_hashes, writer.hashes)


def _write_megatron(
    checkpoint: HFCheckpoint,
    plan: list[Piece],
    dtypes: dict[str, torch.dtype],
    writer: TorchDistWriter,
    hashes: dict[str, xxhash.xxh3_128],
    progress: Progress,
) -> list[Piece]:
    """Write all pieces and return them in the order in which they were written.

    Args:
        checkpoint: the source.
        plan: the pieces of the model.
        dtypes: Megatron key -> dtype to write.
        writer: of the target.
        hashes: tensor -> hash, fed with what was read, in the dtype that is written.
        progress: called with the bytes of the source that were done.
    """
    piece_of = {name: piece for piece in plan for name in piece.hf_shapes}

    def block_rows(name: str) -> int | None:
        return _block_rows(piece_of[name], checkpoint.tensors[name].dtype.itemsize)

    def hashed() -> Iterator[tuple[str, int, torch.Tensor, int]]:
        for name, first, tensor in checkpoint.read_in_order(block_rows):
            cast = tensor.to(dtypes[piece_of[name].megatron])
            hashes[name].update(tensor_bytes(cast))
            yield name, first, cast, tensor.nbytes

    order: list[Piece] = []
    seen: dict[str, set[str]] = {}
    held = _Held()
    for name, first, tensor, num_bytes in ahead(hashed()):
        piece = piece_of[name]
        if block_rows(name) is not None:
            writer.write(piece.megatron, piece.layer, first, tensor)
            if first == 0:
                order.append(piece)
        else:
            held.add(piece.name, name, tensor)
            names = seen.setdefault(piece.name, set())
            names.add(name)
            if len(names) == len(piece.hf_shapes):
                waiting = held.take(piece.name)
                tensors = [
                    waiting[part] if part in waiting else checkpoint.read(part).to(dtypes[piece.megatron])
                    for part in piece.hf_shapes
                ]
                writer.write(piece.megatron, piece.layer, 0, piece.layout.to_megatron(tensors, checkpoint.hf))
                order.append(piece)
        progress(num_bytes)
    return order


class _Held:
    """Tensors by piece and name, the oldest pieces forgotten where they are too many."""

    def __init__(self) -> None:
        self._pieces: dict[str, dict[str, torch.Tensor]] = {}
        self._bytes = 0

    def add(self, piece: str, name: str, tensor: torch.Tensor) -> None:
        self._pieces.setdefault(piece, {})[name] = tensor
        self._bytes += tensor.nbytes
        while self._bytes > HELD_BYTES and len(self._pieces) > 1:
            self.take(next(iter(self._pieces)))

    def take(self, piece: str) -> dict[str, torch.Tensor]:
        tensors = self._pieces.pop(piece, {})
        self._bytes -= sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    def take_one(self, piece: str, name: str) -> torch.Tensor | None:
        tensors = self._pieces.get(piece, {})
        tensor = tensors.pop(name, None)
        if tensor is not None:
            self._bytes -= tensor.nbytes
            if not tensors:
                del self._pieces[piece]
        return tensor


def _read_back_megatron(
    written: MegatronCheckpoint, order: list[Piece], source: HFCheckpoint, progress: Progress
) -> dict[str, str]:
    """Return official name -> hash of what the finished checkpoint holds."""
    pieces_written = {piece.name: piece for piece in written.pieces}

    def read_one(planned: Piece) -> dict[str, str]:
        piece = pieces_written[planned.name]
        hashes = {name: new_tensor_hash() for name in piece.hf_shapes}
        for name, tensor in _hf_blocks(written, piece):
            hashes[name].update(tensor_bytes(tensor))
        return {name: value.hexdigest() for name, value in hashes.items()}

    result: dict[str, str] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for hashes in pool.map(read_one, order):
            result |= hashes
            progress(sum(source.tensors[name].num_bytes for name in hashes))
    return result


def _hf_blocks(checkpoint: MegatronCheckpoint, piece: Piece) -> Iterator[tuple[str, torch.Tensor]]:
    """Return a piece as Hugging Face tensors, or as blocks of rows of the only one: (name, rows)."""
    step = _block_rows(piece, checkpoint.stored.tensors[piece.megatron].dtype.itemsize)
    if step is None:
        yield from checkpoint.read_piece(piece).items()
        return
    ((name, shape),) = piece.hf_shapes.items()
    for first in range(0, shape[0], step):
        yield name, checkpoint.stored.read(piece.megatron, piece.layer, (first, min(first + step, shape[0])))


def megatron_to_hf(
    checkpoint: MegatronCheckpoint,
    target: Path,
    progress: Progress = lambda count: None,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
) -> Written:
    """Write the Hugging Face checkpoint and its proof into an existing directory.

    Args:
        checkpoint: the source.
        target: the directory.
        progress: sees every byte of the source twice.
        dtype: to convert to; None keeps each tensor's.
        shard_bytes: cut into files of at most so many bytes (and one tensor at least) under official names; None: the
            files, names and order of the checkpoint that the Megatron one came from.

    Raises UserError where the result does not hold the source's tensors, or those are not what their proof says.
    """
    infos = {name: TensorInfo(dtype or info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    hf_files.copy_small_files(checkpoint.directory / HF_FILES, target)
    headers = hf_files.headers_for(checkpoint.headers, infos, shard_bytes)
    config_json.flatten(target, checkpoint.hf.tie_word_embeddings)
    hf_files.correct_config(
        target, {info.dtype for info in infos.values()}, checkpoint.headers, checkpoint.hf.tie_word_embeddings
    )
    if shard_bytes is not None:
        hf_files.write_index(target, headers, infos)
    reader = _InHFOrder(checkpoint, dtype, progress)
    written = hf_files.write_weights(
        target, headers, lambda names: ahead(block for name in names for block in reader.blocks(name))
    )
    read_back = _read_back_hf(HFCheckpoint(target), checkpoint, progress)
    proof.write_proof(
        target, "megatron_to_hf", proof.small_file_hashes(checkpoint.directory), dtype, reader.hashes, read_back
    )
    return Written({}, written)


class _InHFOrder:
    """The tensors of a Megatron checkpoint in any order of names; each piece is read once where its tensors are asked
    for close together.

    A source that carries the proof of its own conversion must still hold what the proof says.
    """

    def __init__(self, checkpoint: MegatronCheckpoint, dtype: torch.dtype | None, progress: Progress):
        self.checkpoint, self.dtype, self.progress = checkpoint, dtype, progress
        self.hashes: dict[str, str] = {}
        """By piece, of what was read, in the dtype that is written."""
        self._proved = proof.proved_tensors(checkpoint.proof)
        self._held = _Held()

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        piece = self.checkpoint.piece_of[name]
        if _block_rows(piece, self.checkpoint.tensors[name].dtype.itemsize) is not None:
            yield from self._streamed(piece, name)
            return
        tensor = self._held.take_one(piece.name, name)
        if tensor is None:
            tensor = self._read(piece, name)
        yield tensor

    def _streamed(self, piece: Piece, name: str) -> Iterator[torch.Tensor]:
        stored, proved = new_tensor_hash(), new_tensor_hash()
        for _, tensor in _hf_blocks(self.checkpoint, piece):
            proved.update(tensor_bytes(tensor))
            self.progress(tensor.nbytes)
            tensor = tensor.to(self.dtype or tensor.dtype)
            stored.update(tensor_bytes(tensor))
            yield tensor
        self._require_proved(name, proved.hexdigest())
        self.hashes[piece.name] = stored.hexdigest()

    def _read(self, piece: Piece, wanted: str) -> torch.Tensor:
        """Return one tensor of a piece and hold the others."""
        again = piece.name in self.hashes
        tensor = self.checkpoint.stored.read(piece.megatron, piece.layer)
        num_bytes = tensor.nbytes
        cast = tensor.to(self.dtype or tensor.dtype)
        parts = dict(zip(piece.hf_shapes, piece.layout.to_hf(cast, self.checkpoint.hf)))
        if not again:
            self.hashes[piece.name] = tensor_hash(cast)
            if self._proved:
                stored = (
                    parts
                    if cast is tensor
                    else dict(zip(piece.hf_shapes, piece.layout.to_hf(tensor, self.checkpoint.hf)))
                )
                for name, part in stored.items():
                    self._require_proved(name, tensor_hash(part))
            self.progress(num_bytes)
        for name, part in parts.items():
            if name != wanted:
                self._held.add(piece.name, name, part)
        return parts[wanted]

    def _require_proved(self, name: str, value: str) -> None:
        if self._proved and self._proved.get(name) != value:
            raise UserError(
                f"{self.checkpoint.directory}: {name} is not what its proof.json says: restore the checkpoint or make"
                " it again"
            )


def _read_back_hf(written: HFCheckpoint, source: MegatronCheckpoint, progress: Progress) -> dict[str, str]:
    """Return piece -> hash of what the finished checkpoint holds, taken back into Megatron's layout.

    It is read in the order of the files.
    """

    def read_one(piece: Piece) -> str:
        step = _block_rows(piece, source.stored.tensors[piece.megatron].dtype.itemsize)
        if step is None:
            return tensor_hash(piece.layout.to_megatron([written.read(name) for name in piece.hf_shapes], written.hf))
        ((name, shape),) = piece.hf_shapes.items()
        value = new_tensor_hash()
        for first in range(0, shape[0], step):
            value.update(tensor_bytes(written.read(name, (first, min(first + step, shape[0])))))
        return value.hexdigest()

    order = sorted(source.pieces, key=lambda piece: written.place(next(iter(piece.hf_shapes))))
    result: dict[str, str] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for piece, value in zip(order, pool.map(read_one, order), strict=True):
            result[piece.name] = value
            progress(sum(source.tensors[name].num_bytes for name in piece.hf_shapes))
    return result


def _check_hf(checkpoint: HFCheckpoint, plan: list[Piece]) -> None:
    expected = {name: shape for piece in plan for name, shape in piece.hf_shapes.items()}
    require_same_names(checkpoint.directory, set(checkpoint.tensors), set(expected))
    for name, shape in expected.items():
        if checkpoint.tensors[name].shape != shape:
            raise UserError(_wrong_shape(checkpoint.directory, name, checkpoint.tensors[name].shape, shape))


def _megatron_dtypes(checkpoint: HFCheckpoint, plan: list[Piece], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return Megatron key -> dtype. Raises UserError where tensors that become one differ and `dtype` is None."""
    dtypes: dict[str, torch.dtype] = {}
    for piece in plan:
        for name in piece.hf_shapes:
            wanted = dtype or checkpoint.tensors[name].dtype
            if dtypes.setdefault(piece.megatron, wanted) != wanted:
                raise UserError(
                    f"{checkpoint.directory}: {name} is {wanted}, others that become {piece.megatron} are"
                    f" {dtypes[piece.megatron]}:"
                    " save the checkpoint in one dtype, or convert it: .venv/bin/python -m tools.convert to-megatron"
                    " --dtype"
                )
    return dtypes


def require_same_names(directory: Path, present: set[str], expected: set[str]) -> None:
    """Raise UserError that lists what is missing and what is unknown."""
    problems = [
        f"{len(names)} {what} {'tensor' if len(names) == 1 else 'tensors'}:"
        f" {', '.join(sorted(names)[:8])}{', ...' if len(names) > 8 else ''}"
        for what, names in (("missing", expected - present), ("unknown", present - expected))
        if names
    ]
    if problems:
        raise UserError(f"{directory}: {'; '.join(problems)}: config.json and the weights do not belong together")


def _stored_shape(piece: Piece) -> tuple[int, ...]:
    return piece.megatron_shape if piece.layer is None else (piece.num_layers, *piece.megatron_shape)


def _wrong_shape(directory: Path, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    wanted = f"config.json asks for {list(expected)}"
    return f"{directory}: {name} has shape {list(shape)}, {wanted}: they do not belong together"

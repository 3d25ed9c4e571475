"""What an outside data set is identified by: the content of its files and of every picture that a row names by path.

Where it lies does not count: a data set that was moved, or copied by somebody else, is the same data set. The names of
its files inside the set count, since rows without an id are named by them.
"""

import hashlib
import json
from pathlib import Path

from megatron_papo.config import DataConfig, PromptSource
from megatron_papo.data.rows import RowPictures, data_files, hugging_face_fingerprint, read_pictures
from megatron_papo.errors import UserError
from megatron_papo.pictures.store import read_named
from megatron_papo.run.stage_output import file_hash


class SourceHash:
    """Adds up the fingerprint of a source while its rows are read, for a caller that reads the pictures anyway.

    total = SourceHash(source)
    for row in rows: total.add(digests of the pictures that the row names by path)
    total.hexdigest() == source_fingerprint(source, config)
    """

    def __init__(self, source: PromptSource):
        """Hash the data files themselves. Raises UserError where there are none or one cannot be read."""
        self._sum = hashlib.sha256()
        files = data_files(source.source)
        base = Path(source.source)
        for file in files:
            name = file.relative_to(base).as_posix() if base.is_dir() else file.name
            self._add("file", name, _hash_of_file(file))
        if not files:
            self._add("data set", source.source, source.split, hugging_face_fingerprint(source))

    def add(self, digests: list[str]) -> None:
        """Add one row's pictures, saliency maps after them, that it names by path: the sha256 of each, in hex."""
        if digests:
            self._add("pictures", *digests)

    def hexdigest(self) -> str:
        """Return the fingerprint of what was added so far."""
        return self._sum.hexdigest()

    def _add(self, *entry: str) -> None:
        self._sum.update(json.dumps(entry).encode() + b"\n")


def source_fingerprint(source: PromptSource, config: DataConfig) -> str:
    """Return the fingerprint of a source by reading it: its files, and the pictures and saliency maps of its first
    source.count rows.

    Raises UserError, naming file and row, where a picture is missing or a row names something else than pictures.

    Args:
        source: files, a directory of them, or the name of a Hugging Face data set; not `synthetic`.
        config: images_key and saliency_key say which columns name pictures, image_root where their paths begin.
    """
    total = SourceHash(source)
    seen: dict[tuple[Path | None, str], str] = {}
    for row in read_pictures(source, config):
        named = [(picture, "image") for picture in row.images if isinstance(picture, str)]
        named += [(picture, "saliency map") for picture in row.saliency or [] if isinstance(picture, str)]
        for name, what in named:
            if (row.image_root, name) not in seen:
                seen[row.image_root, name] = _hash_of_picture(name, row, what)
        total.add([seen[row.image_root, name] for name, _ in named])
    return total.hexdigest()


def _hash_of_picture(name: str, row: RowPictures, what: str) -> str:
    try:
        return hashlib.sha256(read_named(name, row.image_root, what)).hexdigest()
    except UserError as error:
        raise UserError(f"{row.place}: {error}")


def _hash_of_file(file: Path) -> str:
    try:
        return file_hash(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}): correct its permissions or copy it again")

"""What an outside data set is identified by: the content of its files and of every picture that a row names by path.

Where it lies does not count: a data set that was moved, or copied by somebody else, is the same data set. The names of
its files inside the set count, since rows without an id are named by them.
"""

import hashlib
import json
from pathlib import Path

from megatron_papo.config import DataConfig, PromptSource
from megatron_papo.data.hub_files import files_here
from megatron_papo.data.rows import BadRow, SourceRow, hugging_face_fingerprint, read_rows
from megatron_papo.data.set_files import has_known_names
from megatron_papo.errors import UserError
from megatron_papo.pictures.store import read_named
from megatron_papo.reading import reading
from megatron_papo.run.stage_output import file_hash

_UNREADABLE = "unreadable"


class SourceHash:
    """Adds up the fingerprint of a source while its rows are read.

    total = SourceHash(source)
    for row in read_rows(...):
        total.know(row, name, sha256)    # of pictures that were read anyway
        total.add(row)
    total.hexdigest()
    """

    def __init__(self, source: PromptSource):
        """Hash the data files themselves. Raises UserError where there are none or one cannot be read."""
        self._sum = hashlib.sha256()
        self._known: dict[tuple[Path | None, str], str] = {}
        files = files_here(source).tables
        base = Path(source.source)
        for file in files:
            is_below = base.is_dir() and not has_known_names(source)
            name = file.relative_to(base).as_posix() if is_below else file.name
            with reading(file, "correct its permissions or copy it again"):
                self._add("file", name, file_hash(file))
        if not files:
            self._add("data set", source.source, source.split, hugging_face_fingerprint(source))

    def know(self, row: SourceRow, name: str, sha256: str) -> None:
        """Take over what a picture that the row names by path contains."""
        self._known[row.image_root, name] = sha256

    def add(self, row: SourceRow | BadRow) -> None:
        """Add the pictures, and saliency maps after them, that a row names by path. Those not known are read."""
        if isinstance(row, BadRow):
            return
        names = [picture for picture in (*row.images, *(row.saliency or [])) if isinstance(picture, str)]
        if names:
            self._add("pictures", *(self._digest(name, row.image_root) for name in names))

    def hexdigest(self) -> str:
        """Return the fingerprint of what was added so far."""
        return self._sum.hexdigest()

    def _digest(self, name: str, root: Path | None) -> str:
        if (root, name) not in self._known:
            try:
                self._known[root, name] = hashlib.sha256(read_named(name, root)).hexdigest()
            except UserError:  # a row that cannot be used: whoever reads the rows says so
                self._known[root, name] = _UNREADABLE
        return self._known[root, name]

    def _add(self, *entry: str) -> None:
        self._sum.update(json.dumps(entry).encode() + b"\n")


def source_fingerprint(source: PromptSource, config: DataConfig, with_target: bool = False) -> str:
    """Return the fingerprint of a source by reading it: its files, and the pictures and saliency maps of its first
    source.count rows. Raises UserError for a file of rows that cannot be read.

    Args:
        source: files, a directory of them, or the name of a Hugging Face data set; not `synthetic`.
        config: says which columns name pictures, and where their paths begin.
        with_target: whether rows need a target.
    """
    total = SourceHash(source)
    for row in read_rows(source, config, with_target):
        total.add(row)
    return total.hexdigest()

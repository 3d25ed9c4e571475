"""The pictures of a data set as files named by their content, so that each is stored once and its name says whether it is whole."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from megatron_papo.errors import UserError
from megatron_papo.images import decode_image, resolve_image

FOLDER = "images"
_SUFFIXES = {"JPEG": "jpg"}


@dataclass(frozen=True)
class StoredImage:
    name: str
    """Relative to the directory of the store."""
    size: tuple[int, int]
    """(width, height) of the native picture, upright."""
    content: bytes


class ImageStore:
    """The pictures below directory/images."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.written: set[str] = set()
        self._seen: dict[bytes, tuple[str, tuple[int, int]]] = {}
        (directory / FOLDER).mkdir()

    def read(self, image: bytes | str, root: Path | None) -> StoredImage:
        """The picture with its name and size. Raises UserError if it is none.

        image: encoded picture, or the path of one that must stay inside root.
        """
        content, shown = (image, "image") if isinstance(image, bytes) else (_read(image, root), f"image {image}")
        digest = hashlib.sha256(content).digest()
        if digest not in self._seen:
            decoded, kind = decode_image(content, shown)
            self._seen[digest] = f"{FOLDER}/{digest.hex()}.{_SUFFIXES.get(kind, kind.lower())}", decoded.size
        return StoredImage(*self._seen[digest], content)

    def write(self, image: StoredImage) -> None:
        """Its bytes as they are, once."""
        if image.name not in self.written:
            (self.directory / image.name).write_bytes(image.content)
            self.written.add(image.name)


def _read(name: str, root: Path | None) -> bytes:
    if root is None:
        raise UserError(f"image {name}: a path, not a picture: set data.image_root to the directory it is in")
    path = resolve_image(root, name)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"image {path}: cannot be read ({error.strerror}): replace it or drop the row")

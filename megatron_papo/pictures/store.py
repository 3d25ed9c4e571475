"""The pictures of a data set as files named by their content, so that each is stored once and its name says whether it
is whole."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_papo.errors import UserError
from megatron_papo.pictures.decode import Transparency, decode_image, decode_saliency
from megatron_papo.pictures.files import read_inside
from megatron_papo.reading import shown

IMAGES, SALIENCY = "images", "saliency"
_SUFFIXES = {"JPEG": "jpg"}


@dataclass(frozen=True)
class Seen:
    """What a look at a picture or map shows."""

    kind: str
    """Format of the file, e.g. PNG."""
    size: tuple[int, int]
    """(width, height) of the native picture, upright, or of the map."""
    one_colour: bool = False
    transparent: bool = False
    several_frames: bool = False


@dataclass(frozen=True)
class StoredImage:
    name: str
    """Relative to the directory of the store."""
    seen: Seen
    content: bytes

    @property
    def sha256(self) -> str:
        """Of the content, in hex: what its name says."""
        return Path(self.name).stem


class ImageStore:
    """The pictures below directory/images, their saliency maps, if there are any, below directory/saliency."""

    def __init__(self, directory: Path, transparency: Transparency = "white"):
        self.directory, self.transparency = directory, transparency
        self.written: set[str] = set()
        self._seen: dict[tuple[str, bytes], Seen] = {}
        (directory / IMAGES).mkdir()

    def read(self, image: bytes | str, root: Path | None) -> StoredImage:
        """Return a picture with its name and size. Raises UserError if it is none.

        Args:
            image: encoded picture, or the path of one that must stay inside root.
            root: None: a path is an error.
        """
        return self._read(IMAGES, self._look_at_image, image, root, "image")

    def read_saliency(self, saliency: bytes | str, root: Path | None) -> StoredImage:
        """Return a saliency map likewise: see decode.decode_saliency."""
        return self._read(SALIENCY, _look_at_saliency, saliency, root, "saliency map")

    def _read(
        self,
        folder: str,
        look_at: Callable[[bytes, str], Seen],
        source: bytes | str,
        root: Path | None,
        what: str,
    ) -> StoredImage:
        if isinstance(source, bytes):
            content, named = source, what
        else:
            content, named = read_named(source, root, what), f"{what} {shown(source)}"
        digest = hashlib.sha256(content).digest()
        if (folder, digest) not in self._seen:
            self._seen[folder, digest] = look_at(content, named)
        seen = self._seen[folder, digest]
        name = f"{folder}/{digest.hex()}.{_SUFFIXES.get(seen.kind, seen.kind.lower())}"
        return StoredImage(name, seen, content)

    def _look_at_image(self, content: bytes, shown: str) -> Seen:
        decoded = decode_image(content, shown, self.transparency)
        return Seen(
            decoded.format,
            decoded.image.size,
            decoded.is_one_colour,
            decoded.is_transparent,
            decoded.has_several_frames,
        )

    def write(self, image: StoredImage) -> None:
        """Write the bytes of a picture as they are, once."""
        if image.name not in self.written:
            path = self.directory / image.name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(image.content)
            self.written.add(image.name)

    def count(self, folder: str) -> int:
        """Return how many files were written below IMAGES or SALIENCY."""
        return sum(name.startswith(f"{folder}/") for name in self.written)


def _look_at_saliency(content: bytes, shown: str) -> Seen:
    values, kind = decode_saliency(content, shown)
    return Seen(kind, (values.shape[1], values.shape[0]))


def read_named(name: str, root: Path | None, what: str = "image") -> bytes:
    """Return the content of a picture that a row names by path. Raises UserError if it is missing or outside root.

    Args:
        name: path from root on.
        root: directory that it must stay inside; None: paths are not allowed.
        what: to call it in messages.
    """
    if root is None:
        raise UserError(f"{what} {shown(name)}: a path, not a picture: set data.image_root to the directory it is in")
    return read_inside(root, name, what)

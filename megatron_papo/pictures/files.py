"""Files that a row names by path: they must lie inside the data root, links followed. The root may be a zip archive."""

from pathlib import Path

from megatron_papo.errors import UserError
from megatron_papo.pictures.archive import is_archive, read_member
from megatron_papo.reading import reading, shown


def resolve_inside(root: Path, name: str, what: str = "image") -> Path:
    """Return the file of a path that must stay inside root, symbolic links followed. Raises UserError.

    Args:
        root: the data root.
        name: path from root on.
        what: to call it in messages.
    """
    _refuse_content(name, what)
    with reading(f"{what} {shown(name)}", "correct its name or drop the row"):
        root = Path(root).resolve()
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise UserError(
                f"{what} {shown(name)}: outside the data root {root}: move it inside or set data.image_root"
            )
        if not path.is_file():
            raise UserError(f"{what} {shown(name)}: no such file in {root}: put it there or drop the row")
        return path


def read_inside(root: Path, name: str, what: str = "image") -> bytes:
    """Return the content of resolve_inside's file, or of a member where root is a zip archive. Raises UserError."""
    _refuse_content(name, what)
    if is_archive(Path(root)) and not Path(root).is_dir():
        return read_member(Path(root), name, what)
    path = resolve_inside(root, name, what)
    with reading(f"{what} {path}", "replace it or drop the row"):
        return path.read_bytes()


BASE64_OF_PICTURES = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk0", "SUkq", "TU0A")
"""How PNG, JPEG, GIF, WebP, BMP and TIFF files begin in base64."""


def _refuse_content(name: str, what: str) -> None:
    """Raise UserError where a row holds something else than a name."""
    if name.startswith("data:") or (name.startswith(BASE64_OF_PICTURES) and len(name) > 64):
        raise UserError(f"{what} {shown(name)}: a picture written as text: decode it, and give its bytes or a file")
    if "://" in name:
        raise UserError(f"{what} {shown(name)}: a URL, and nothing is fetched: download it and give the file's path")

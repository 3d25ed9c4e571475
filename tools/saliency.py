"""Make the saliency maps that masked_image.strategy semantic needs, with DINOv2: the attention of the class token to
each patch in the last layer, mean over heads (arXiv 2507.06448, section 3.2).

    .venv/bin/python -m tools.saliency --model DINOV2_DIR --data DIR

DIR is a data set: .jsonl files, rows with a column of pictures (paths within DIR). Each picture's map becomes
DIR/saliency/NAME.npy, float32 [rows, columns] of patches, and each FILE.jsonl gets a neighbour FILE.saliency.jsonl, the
same rows with a column `saliency`: that one is what stage 1 takes (data.train.source). Maps that are there are kept,
so a run that was ended goes on; delete DIR/saliency to make all of them again.

DINOV2_DIR is a Hugging Face checkpoint of DINOv2 (with or without registers). Pictures are resized to --size pixels on
both sides, whatever their aspect: a map is stretched over its picture when it is used.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_papo.errors import UserError
from megatron_papo.reading import reading
from megatron_papo.run.command_line import run
from megatron_papo.run.console import progress_bar

if TYPE_CHECKING:
    import numpy as np
    import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of DINOv2's pictures."""
MAPS, SUFFIX = "saliency", ".saliency.jsonl"


def files_of(data: Path) -> list[Path]:
    """Return the data set's files. Raises UserError where there is none."""
    files = [file for file in sorted(data.glob("*.jsonl")) if not file.name.endswith(SUFFIX)]
    if not files:
        raise UserError(f"{data}: no .jsonl files: give the directory of a data set in this form")
    return files


def rows_of(file: Path, key: str) -> Iterator[tuple[dict, list[str]]]:
    """Yield the rows of a file with the names of their pictures. Raises UserError naming the row."""
    for number, line in enumerate(file.read_text().splitlines(), 1):
        with reading(f"{file}:{number}", "correct the row"):
            row = json.loads(line)
            found = row.get(key) if isinstance(row, dict) else None
            names = [] if found is None else [found] if isinstance(found, str) else found
            if not isinstance(row, dict) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"column {key} holds no paths of pictures")
        yield row, names


def map_of(name: str) -> str:
    """Return where the map of a picture lies, within the data set."""
    return f"{MAPS}/{hashlib.sha256(name.encode()).hexdigest()[:24]}.npy"


def load_model(directory: Path) -> Any:
    """Return transformers' DINOv2 that says its attention. Raises UserError for another model."""
    from transformers import AutoModel

    with reading(directory, "give the directory of a DINOv2 checkpoint, e.g. a copy of facebook/dinov2-base"):
        kind = json.loads((directory / "config.json").read_text()).get("model_type")
        if kind not in ("dinov2", "dinov2_with_registers"):
            raise UserError(f"{directory}: a model of type {kind}: give the directory of a DINOv2 checkpoint")
        options = {"attn_implementation": "eager", "local_files_only": True}
        return AutoModel.from_pretrained(directory, trust_remote_code=False, **options).eval()


def pixels_of(data: Path, names: Sequence[str], size: int) -> "torch.Tensor":
    """Return pictures as DINOv2 sees them, float32 [pictures, 3, size, size]."""
    import numpy as np
    import torch
    from PIL import Image

    from megatron_papo.pictures.preprocess import open_image

    pictures = [open_image(data, name).resize((size, size), Image.Resampling.BICUBIC) for name in names]
    values = np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures])
    return (
        torch.from_numpy((values - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32))
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def saliency(model: Any, pixels: "torch.Tensor") -> "np.ndarray":
    """Return the class token's attention to each patch in the last layer, mean over heads.

    [pictures, 3, size, size] -> float32 [pictures, size / patch, size / patch].
    """
    import torch

    patches = pixels.shape[-1] // int(model.config.patch_size)
    with torch.no_grad():
        attention = model(pixel_values=pixels, output_attentions=True).attentions[-1]
    of_class_token = attention[:, :, 0, -patches * patches :].mean(dim=1)  # registers stand before the patches
    return of_class_token.float().cpu().reshape(-1, patches, patches).numpy()


def make_maps(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Write the maps of the pictures that have none."""
    import numpy as np
    import torch

    missing = [name for name in names if not (args.data / map_of(name)).exists()]
    if not missing:
        return
    model = load_model(args.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    size = args.size // model.config.patch_size * model.config.patch_size
    if size == 0:
        raise UserError(f"--size {args.size}: below a patch of {model.config.patch_size} pixels: give more")
    (args.data / MAPS).mkdir(exist_ok=True)
    with progress_bar(len(missing), "saliency", "pictures") as bar:
        for start in range(0, len(missing), args.batch_size):
            part = missing[start : start + args.batch_size]
            maps = saliency(model, pixels_of(args.data, part, size).to(device))
            for name, values in zip(part, maps, strict=True):
                file = args.data / map_of(name)
                partial = file.with_suffix(".partial")
                with partial.open("wb") as stream:
                    np.save(stream, values)
                os.replace(partial, file)
            bar.update(len(part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint of DINOv2")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data set: .jsonl files and pictures")
    parser.add_argument("--images-key", default="images", help="column of the pictures (default images)")
    parser.add_argument("--size", type=int, default=518, help="pixels of each side for DINOv2 (default 518)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at once (default 8)")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: expected 1 or more")
    files = {file: list(rows_of(file, args.images_key)) for file in files_of(args.data)}
    make_maps(args, list(dict.fromkeys(name for rows in files.values() for _, names in rows for name in names)))
    for file, rows in files.items():
        lines = [json.dumps(row | {"saliency": [map_of(name) for name in names]}) for row, names in rows]
        target = file.with_name(file.name.removesuffix(".jsonl") + SUFFIX)
        partial = target.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in lines))
        os.replace(partial, target)
        print(f"{target}: {len(lines)} rows, {sum(len(names) for _, names in rows)} pictures")


if __name__ == "__main__":
    run(main)

"""The nine sets of PAPO's tables in miniature: the files of the authors' release with their names, record form and
quirks, and a few counting problems each, which the demo's model can answer.

    data/<split>-00000-of-00001.parquet    rows of messages, images and, of some sets, an id
    <archive>.zip                          images/<folder>/<number>.png

What is as in the release: splits, archives and folders that are called by different names; paths that begin with
./data/; the picture's place in front of the question and an instruction behind it, to be taken as they stand; MathVerse
with five versions of a problem one after the other, three of which are MathVerse_V, in an archive of its own.
"""

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_papo.config import SyntheticTaskConfig
from megatron_papo.seeds import derive_seed
from megatron_papo.synthetic.counting_task import PROBLEM, GridCountTask

INSTRUCTION = "\n\nYou first think."
"""At the end of each question: the first words of PAPO's. Behind all of it the demo's model, which has never seen it,
counts one too many."""
VERSIONS = (
    "Look. How many squares are there?",
    "How many squares are there? Look.",
    "How many squares are there?",
    "How many squares?",
    "",
)
"""Of a MathVerse problem, from Text Dominant to Vision Only: what is asked beside the picture."""
VISION_VERSIONS = VERSIONS[2:]
"""Those of MathVerse_V."""


@dataclass(frozen=True)
class MiniatureSet:
    """One set of the release."""

    name: str
    split: str
    archive: str
    folder: str
    """Below images/ in the archive."""
    problems_of: str = ""
    """The set whose problems these are; "": its own."""
    versions: tuple[str, ...] = (PROBLEM.removeprefix("<image>"),)
    """Each problem is asked in all of them."""
    has_ids: bool = False


_VERSE = "AI4Math_MathVerse"
SETS = (
    MiniatureSet("geometry3k", "hiyouga_geometry3k", "hiyouga_geometry3k_images.zip", "hiyouga_geometry3k"),
    MiniatureSet("mathvista", "AI4Math_MathVista", "AI4Math_MathVista_images.zip", "AI4Math_MathVista", has_ids=True),
    MiniatureSet("we_math", "We_Math", "We-Math_We-Math_images.zip", "We-Math_We-Math", has_ids=True),
    MiniatureSet("mmk12", "PAPO_MMK12", "PAPO_MMK12_test_images.zip", "PAPO_MMK12_test"),
    MiniatureSet("mathverse", _VERSE, f"{_VERSE}_images.zip", _VERSE, versions=VERSIONS, has_ids=True),
    MiniatureSet("logicvista", "lscpku_LogicVista", "lscpku_LogicVista_images.zip", "lscpku_LogicVista"),
    MiniatureSet(
        "clevr_count",
        "BUAADreamer_clevr_count_70k",
        "BUAADreamer_clevr_count_70k_images.zip",
        "BUAADreamer_clevr_count_70k",
    ),
    MiniatureSet("mmmu_pro", "MMMU_MMMU_Pro", "MMMU_MMMU_Pro_images.zip", "MMMU_MMMU_Pro", has_ids=True),
    MiniatureSet(
        "mathverse_v",
        f"{_VERSE}_vision_dependent",
        f"{_VERSE}_vision_dependent_images.zip",
        f"{_VERSE}_vision_dependent",
        problems_of="mathverse",
        versions=VISION_VERSIONS,
    ),
)  # fmt: skip
"""As the release names them. Folders below images/ are called as we suppose: we have not seen the archives."""


def write_miniature(
    directory: Path, task: SyntheticTaskConfig, seed: int, problems: int, instruction: str = INSTRUCTION
) -> dict[str, int]:
    """Write the files of all nine sets and return how many rows each has.

    Args:
        directory: that is there.
        task: of the pictures.
        seed: of all sets; the same one gives the same bytes.
        problems: of each set; MathVerse has five rows to a problem, MathVerse_V three.
        instruction: at the end of each question.
    """
    import pyarrow
    from pyarrow import parquet

    (directory / "data").mkdir()
    counts = {}
    for entry in SETS:
        rows, pictures = [], {}
        for row, name, picture in _rows(entry, task, seed, problems, instruction):
            rows.append(row)
            pictures[name] = picture
        parquet.write_table(
            pyarrow.Table.from_pylist(rows), directory / "data" / f"{entry.split}-00000-of-00001.parquet"
        )
        with zipfile.ZipFile(directory / entry.archive, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, picture in pictures.items():
                archive.writestr(zipfile.ZipInfo(name), picture)
        counts[entry.name] = len(rows)
    return counts


def _rows(
    entry: MiniatureSet, task: SyntheticTaskConfig, seed: int, problems: int, instruction: str
) -> Iterator[tuple[dict, str, bytes]]:
    """Yield the rows of a set, each with the name of its picture in the archive, and the picture."""
    grid = GridCountTask(task)
    number = 0
    for problem in range(problems):
        sample = grid.render(derive_seed(seed, "miniature", entry.problems_of or entry.name, problem))
        png = io.BytesIO()
        sample.image.save(png, "PNG")
        for question in entry.versions:
            name = f"images/{entry.folder}/{number}.png"
            row = {
                "messages": [
                    {"role": "user", "content": f"<image>{question}{instruction}"},
                    {"role": "assistant", "content": sample.answer},
                ],
                "images": [f"./data/{name}"],
            }
            if entry.has_ids:
                row["id"] = str(number)
            yield row, name, png.getvalue()
            number += 1

"""The rows of the paper's ablation tables: the page that lists them, and the configurations of a SLURM array over rows
and seeds.

    .venv/bin/python -m tools.ablations                                  # writes docs/ablations.md
    .venv/bin/python -m tools.ablations --array runs/ablations --rows gamma_001_3b,gamma_002_3b --seeds 1,2,3

The second writes runs/ablations/1.yaml, 2.yaml, ..., a row and a seed each, and prints the command that runs them as
one array and the one that makes the table of what came out, with intervals over seeds.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run

ROOT = Path(__file__).resolve().parents[1]
ROWS_OF, PAGE = ROOT / "configs" / "ablations", ROOT / "docs" / "ablations.md"


@dataclass(frozen=True)
class Row:
    """A row of one of the paper's tables."""

    name: str
    """Of its file in configs/ablations."""
    what: str
    overall: float | None
    """Published average over all sets, avg@8, percent; None: not known to us."""
    unknown: str = ""
    """What neither the paper nor the scripts state, and what the file has in its place."""
    more: str = ""
    """Published general / vision-dependent averages, where they are known."""


TABLES = {
    "Weight of KL_prcp (3B)": (
        Row("gamma_0005_3b", "gamma 0.005", 48.55),
        Row("gamma_001_3b", "gamma 0.01", 49.26),
        Row("gamma_002_3b", "gamma 0.02", 49.92, more="53.39 / 45.57"),
        Row("gamma_004_3b", "gamma 0.04, collapsed", 34.38),
    ),
    "Mask ratio (3B, gamma 0.01)": (
        Row("ratio_04_3b", "random, 0.4", 48.78),
        Row("ratio_06_3b", "random, 0.6", 49.26),
        Row("ratio_08_3b", "random, 0.8", 48.87),
        Row("ratio_10_3b", "random, 1.0", 48.51),
        Row("semantic_06_3b", "semantic, 0.6", 48.42),
    ),
    "Masking strategy (7B)": (
        Row("random_06_7b", "random, 0.6", 60.86, "gamma (0.02)"),
        Row("semantic_06_7b", "semantic, 0.6", 60.47, "gamma (0.02)"),
    ),
    "Without KL_ref": (
        Row("no_kl_ref_grpo_3b", "GRPO 3B", 50.18),
        Row("no_kl_ref_papo_3b", "PAPO 3B", 53.15, more="56.21 / 49.33"),
        Row("no_kl_ref_grpo_7b", "GRPO 7B", 61.30),
        Row("no_kl_ref_papo_7b", "PAPO 7B", 61.47),
    ),
    "What holds a high gamma (7B)": (
        Row("high_gamma_kl_ref_7b", "PAPO_H, increased KL_ref", 60.42, "beta (0.1)"),
        Row(
            "high_gamma_single_entropy_7b", "PAPO_H, single entropy loss", 61.12, "which one, coefficient (eta_1 0.05)"
        ),
        Row("high_gamma_double_entropy_7b", "PAPO_H, double entropy loss", 61.66, more="63.50 / 59.37"),
    ),
    "DAPO (7B)": (
        Row("dapo_7b", "DAPO", 55.01),
        Row("dapo_entropy_7b", "DAPO, entropy loss", 62.27, "coefficient (0.03)"),
        Row("papo_d_7b", "PAPO-D", 63.16, more="65.83 / 59.82"),
    ),
}
ROWS = {row.name: row for rows in TABLES.values() for row in rows}


def page() -> str:
    """Return docs/ablations.md."""
    lines = [
        "# The paper's ablations",
        "",
        "Written by `.venv/bin/python -m tools.ablations`. Published: avg@8 accuracy in percent over all sets",
        "(arXiv 2507.06448), general / vision-dependent where known. Unknown: what neither the paper nor its scripts",
        "state, in brackets what the file has in its place. No row has been run here at its published size.",
        "",
        "    .venv/bin/python -m tools.ablations --array runs/ablations --rows gamma_001_3b,gamma_002_3b --seeds 1,2,3",
        "",
        "writes a configuration per row and seed, and prints the command that runs all of them as one SLURM array",
        "and the `tools.compare` that makes the table, with intervals over seeds. One row alone:",
        "",
        "    bash run_all.sh --config configs/ablations/gamma_002_3b.yaml --name gamma_002_3b",
        "",
    ]
    for table, rows in TABLES.items():
        lines += [
            f"## {table}",
            "",
            "| row | configuration | published | general / vision | unknown | here |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            overall = "unknown" if row.overall is None else f"{row.overall:.2f}"
            cells = [
                row.what,
                f"`configs/ablations/{row.name}.yaml`",
                overall,
                row.more or "unknown",
                row.unknown or "-",
            ]
            lines.append(f"| {' | '.join(cells)} | not run |")
        lines.append("")
    lines += [
        "The semantic rows need a column of saliency maps in the data (`data.saliency_key`), which `tools.saliency`",
        "makes with a DINOv2 checkpoint.",
        "",
    ]
    return "\n".join(lines)


def of_array(row: str, seed: int) -> str:
    """Return a configuration of a row with another seed, as YAML. Raises UserError for a row that there is not."""
    if row not in ROWS:
        raise UserError(f"--rows {row}: there is {', '.join(ROWS)}")
    tree = yaml.safe_load((ROWS_OF / f"{row}.yaml").read_text())
    tree["extends"] = [str((ROWS_OF / name).resolve()) for name in tree["extends"]]
    return yaml.safe_dump(tree | {"seed": seed}, sort_keys=False)


def write_array(directory: Path, rows: list[str], seeds: list[int]) -> list[str]:
    """Write the configurations of an array, numbered from 1; return the commands that run it and compare its runs."""
    texts = {(row, seed): of_array(row, seed) for row in rows for seed in seeds}
    if directory.exists():
        raise UserError(f"--array {directory}: is there already: remove it or choose another directory")
    directory.mkdir(parents=True)
    name, numbers = directory.name, {pair: number for number, pair in enumerate(texts, 1)}
    for pair, text in texts.items():
        (directory / f"{numbers[pair]}.yaml").write_text(text)
    runs = {row: ",".join(f"runs/{name}_{numbers[row, seed]}" for seed in seeds) for row in rows}
    return [
        f"sbatch --nodes 1 --array 1-{len(texts)} stages/submit.slurm --config {directory}/%a.yaml --name {name}_%a",
        f".venv/bin/python -m tools.compare {' '.join(f'{row}={of_row}' for row, of_row in runs.items())}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--array", type=Path, metavar="DIR", help="directory to make, with a configuration per task")
    parser.add_argument("--rows", default=",".join(ROWS), metavar="ROW,ROW", help="of configs/ablations (default: all)")
    parser.add_argument("--seeds", default="1,2,3", metavar="N,N", help="seed of each run of a row (default 1,2,3)")
    parser.add_argument("--check", action="store_true", help="only say whether the page is as it would be written")
    args = parser.parse_args()
    if args.array is None:
        if args.check and PAGE.read_text() != page():
            raise UserError(f"{PAGE}: out of date: run .venv/bin/python -m tools.ablations")
        PAGE.write_text(page())
        return
    if not all(seed.isdigit() for seed in args.seeds.split(",")):
        raise UserError(f"--seeds {args.seeds}: expected whole numbers, separated by commas")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    print(*write_array(args.array, args.rows.split(","), seeds), sep="\n")


if __name__ == "__main__":
    run(main)

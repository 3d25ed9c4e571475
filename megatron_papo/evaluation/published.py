"""Published results: avg@8 of PAPO's authors (arXiv 2507.06448) in percent, as they print it.

Of four rows the values of the nine sets are known to us at second hand; they stand here because they give the published
averages and gains to a hundredth. Of the others the averages alone are known. None: not published, or not known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

GENERAL = ("geometry3k", "mathvista", "we_math", "mmk12", "mathverse")
VISION = ("logicvista", "clevr_count", "mmmu_pro", "mathverse_v")
GROUPS = {"general": GENERAL, "vision": VISION}
"""The published groups, and the order of the sets."""
SETS = GENERAL + VISION

PROMPTS = dict(zip(SETS, (601, 1000, 1740, 2000, 2180, 447, 200, 1730, 1308), strict=True))
"""Of the sets, as another re-implementation counts them; not checked by us."""
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "max_response_tokens": 2048}
"""Settings as they are called in protocol.json."""


@dataclass(frozen=True)
class PublishedRow:
    """A checkpoint of the authors."""

    name: str
    baseline: str | None
    """Name of the row that its relative gain is against; None where no gain is known."""
    overall: float
    general: float | None = None
    vision: float | None = None
    of_sets: tuple[float, ...] = ()
    """In the order of SETS; () where they are not known."""
    gains: tuple[float, float, float] | None = None
    """Published relative gains in percent: general, vision, overall."""

    @property
    def sets(self) -> dict[str, float]:
        """avg@8 of the sets that are known, in percent."""
        return dict(zip(SETS, self.of_sets, strict=False))

    @property
    def groups(self) -> dict[str, float | None]:
        """The averages of the groups, in percent."""
        return {"general": self.general, "vision": self.vision}

    def gain(self, name: str) -> float | None:
        """Return the relative gain, as a share, of a group or `overall`."""
        return None if self.gains is None else self.gains[("general", "vision", "overall").index(name)] / 100


TABLE1 = (
    PublishedRow("GRPO 3B", None, 47.92, 51.89, 42.97, (28.72, 59.34, 58.90, 57.24, 55.25, 38.14, 55.81, 25.66, 52.26)),
    PublishedRow(
        "PAPO-G 3B",
        "GRPO 3B",
        49.92,
        53.39,
        45.57,
        (30.95, 61.38, 60.09, 57.39, 57.14, 38.67, 62.56, 27.11, 53.95),
        (3.38, 5.60, 4.36),
    ),
    PublishedRow("DAPO 3B", None, 52.40, 55.02, 49.11),
    PublishedRow("PAPO-D 3B", None, 55.24, 57.09, 52.93),
    PublishedRow("GRPO 7B", None, 58.78, 62.51, 54.11, (40.18, 65.48, 68.12, 72.26, 66.51, 45.62, 73.94, 35.17, 61.71)),
    PublishedRow(
        "PAPO-G 7B",
        "GRPO 7B",
        61.66,
        63.50,
        59.37,
        (40.25, 69.53, 66.79, 72.52, 68.43, 46.07, 89.81, 36.63, 64.97),
        (1.53, 7.96, 4.39),
    ),
    PublishedRow("DAPO 7B", None, 55.01),
    PublishedRow("PAPO-D 7B", None, 63.16, 65.83, 59.82),
)
ABLATIONS = (
    PublishedRow("PAPO-G 3B, gamma .005", None, 48.55),
    PublishedRow("PAPO-G 3B, gamma .01", None, 49.26),
    PublishedRow("PAPO-G 3B, gamma .04 (collapsed)", None, 34.38),
    PublishedRow("GRPO 3B, no KL_ref", None, 50.18),
    PublishedRow("PAPO-G 3B, no KL_ref", None, 53.15, 56.21, 49.33),
    PublishedRow("PAPO-G 3B, mask ratio .4", None, 48.78),
    PublishedRow("PAPO-G 3B, mask ratio .6", None, 49.26),
    PublishedRow("PAPO-G 3B, mask ratio .8", None, 48.87),
    PublishedRow("PAPO-G 3B, mask ratio 1.0", None, 48.51),
    PublishedRow("PAPO-G 3B, semantic mask .6", None, 48.42),
    PublishedRow("GRPO 7B, no KL_ref", None, 61.30),
    PublishedRow("PAPO-G 7B, no KL_ref", None, 61.47),
    PublishedRow("PAPO_H 7B, increased KL_ref", None, 60.42),
    PublishedRow("PAPO_H 7B, single entropy", None, 61.12),
    PublishedRow("PAPO_H 7B, double entropy", None, 61.66),
    PublishedRow("PAPO-G 7B, random mask", None, 60.86),
    PublishedRow("PAPO-G 7B, semantic mask", None, 60.47),
    PublishedRow("DAPO 7B, entropy", None, 62.27),
)
TABLES: dict[str, Sequence[PublishedRow]] = {"table1": TABLE1, "ablations": ABLATIONS}

"""What stage 1 says about a set: rows that cannot be used, rows that look wrong, sets that cannot be right."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_papo.data.rows import BadRow, Columns
from megatron_papo.data.suspicions import ONE_COLOUR, Grade, suspicious_answers
from megatron_papo.pictures.store import Seen, StoredImage
from megatron_papo.reading import shown
from megatron_papo.run.records import Prompt

BAD_ROWS_SHOWN, SUSPICIOUS_SHOWN = 10, 5
EXAMPLE = 60
"""Characters of an answer that is shown."""
_LIKE_IMAGES = ("image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "figure", "figures")
_QUALITIES = {
    "transparent": "have transparent pixels (data.transparency says what shows through)",
    "several_frames": "have several frames or pages: the first is used",
}
"""Fields of Seen, and what to say of such pictures."""
Suspicious = dict[str, list[tuple[str, str]]]
"""Kind -> rows that look wrong: place, and the answer, or nothing."""


@dataclass
class SetReport:
    """Collects what is seen of a set while its rows become prompts."""

    rows: int = 0
    kept: int = 0
    overlong: int = 0
    bad: list[BadRow] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)
    """Names that any row has, in the order seen."""
    rows_with_pictures: int = 0
    places: dict[str, list[str]] = field(default_factory=dict)
    """Answer -> the rows that have it."""
    one_colour: list[str] = field(default_factory=list)
    """Rows with such a picture."""
    pictures: dict[str, Seen] = field(default_factory=dict)
    """Name -> what it looks like, of the distinct pictures of prompts."""

    def keep(self, place: str, prompt: Prompt, pictures: Sequence[StoredImage]) -> None:
        """Count a row that became a prompt."""
        self.kept += 1
        self.places.setdefault(prompt.answer, []).append(place)
        self.pictures |= {picture.name: picture.seen for picture in pictures}
        if any(picture.seen.one_colour for picture in pictures):
            self.one_colour.append(place)

    def bad_rows(self, key: str, allowed: int) -> list[str]:
        """Return what to say about the rows that cannot be used; nothing where they are few enough to be left out.

        Args:
            key: of the set in the configuration.
            allowed: data.skip_bad_rows.
        """
        count = len(self.bad)
        if count <= allowed:
            return []
        lines = self.first_bad_rows()
        more = f" ({count - len(lines)} more are not shown)" if count > len(lines) else ""
        return [
            *lines,
            f"{key}: {count} of {self.rows} rows cannot be used{more}: correct or drop them, or have up to so"
            f" many left out with --set data.skip_bad_rows={count}",
        ]

    def first_bad_rows(self) -> list[str]:
        """Return what is wrong with the first rows that cannot be used, a line each."""
        return [f"{row.place}: {row.problem}" for row in self.bad[:BAD_ROWS_SHOWN]]

    def no_rows(self, key: str, source: str) -> list[str]:
        """Return why a set has no prompt; nothing where it has one.

        Args:
            key: of the set in the configuration.
            source: where its rows are from.
        """
        if self.kept:
            return []
        if not self.rows:
            return [f"{key}: {shown(source)}: no row in it: name another data source or add rows"]
        cures = (["raise data.max_prompt_tokens"] if self.overlong else []) + (["correct the rows"] if self.bad else [])
        return [
            *self.first_bad_rows(),
            f"{key}: no row left of {shown(source)} ({self.overlong} overlong, {len(self.bad)} left out):"
            f" {', '.join(cures)} or add others",
        ]

    def no_pictures(self, key: str, columns: Columns, uses_pictures: bool) -> list[str]:
        """Return what to say about a set without any picture; nothing where that may be right.

        Args:
            key: of the set in the configuration.
            columns: that were read.
            uses_pictures: whether something is computed from the pictures of this set.
        """
        others = [column for column in self.columns if column.lower() in _LIKE_IMAGES and column != columns.images]
        if self.rows_with_pictures or not self.columns or not (others or uses_pictures):
            return []
        seen = ", ".join(map(shown, self.columns))
        cure = f"set {key}.images_key={shown((others or ['COLUMN'])[0])}"
        if uses_pictures:
            cure += (
                " (a set without pictures goes with objective.kl_prcp_coef=0, objective.masked_image_entropy_coef=0 and"
                " evaluation.masked_images=false)"
            )
        return [f"{key}: no row has a picture in column {columns.images}; the columns are {seen}: {cure}"]

    def suspicious_rows(self, grade: Grade) -> Suspicious:
        """Return the rows that look wrong. grade: the grader of responses."""
        found: Suspicious = {}
        if self.one_colour:
            found[ONE_COLOUR] = [(place, "") for place in self.one_colour]
        for answer, kind in suspicious_answers(self.places, grade).items():
            found.setdefault(kind, []).extend((place, answer) for place in self.places[answer])
        return found

    def counts(self, name: str, suspicious: Suspicious) -> dict[str, int]:
        """Return the numbers for the manifest; but for the first two, those that are not 0."""
        more = {"skipped": len(self.bad), "suspicious": sum(map(len, suspicious.values()))} | {
            f"pictures_{quality}": self._pictures_that(quality) for quality in _QUALITIES
        }
        return {name: self.kept, f"{name}_dropped_overlong": self.overlong} | {
            f"{name}_{what}": count for what, count in more.items() if count
        }

    def in_words(self, suspicious: Suspicious, max_prompt_tokens: int) -> list[str]:
        """Return what to tell about a set that can be used, a line each."""
        left_out = f", {len(self.bad)} left out (skipped.jsonl says why)" if self.bad else ""
        pictures = [
            f"{count} pictures {said}"
            for quality, said in _QUALITIES.items()
            if (count := self._pictures_that(quality))
        ]
        return [
            f"{self.kept} prompts, {self.overlong} dropped (over {max_prompt_tokens} tokens){left_out}",
            *pictures,
            *(_in_words(kind, rows, self.kept) for kind, rows in suspicious.items()),
        ]

    def _pictures_that(self, quality: str) -> int:
        """Return how many of the distinct pictures have a quality: a field of Seen."""
        return sum(getattr(seen, quality) for seen in self.pictures.values())


def too_suspicious(key: str, suspicious: Suspicious, kept: int, limit: float) -> list[str]:
    """Return what to say about kinds of suspicious rows that are a larger share than data.max_suspicious_share."""
    return [
        f"{key}: {_in_words(kind, rows, kept)}: more than data.max_suspicious_share {limit}: correct the rows,"
        " name another column, or raise it"
        for kind, rows in suspicious.items()
        if len(rows) > limit * kept
    ]


def _in_words(kind: str, rows: Sequence[tuple[str, str]], kept: int) -> str:
    """Return how many rows are suspicious, and some of them."""
    examples = [f"{place}: {shown(repr(answer), EXAMPLE)}" if answer else place for place, answer in rows]
    more = ", ..." if len(rows) > SUSPICIOUS_SHOWN else ""
    return f"{len(rows)} of {kept} rows have {kind} ({', '.join(examples[:SUSPICIOUS_SHOWN])}{more})"

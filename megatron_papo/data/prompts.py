"""From rows to Prompt records: pictures stored, prompts tokenised and measured, overlong ones left out and counted."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from megatron_papo.config import DataConfig
from megatron_papo.data.chat import ChatFormat
from megatron_papo.data.fingerprint import SourceHash
from megatron_papo.data.report import SetReport
from megatron_papo.data.rows import BadRow, SourceRow
from megatron_papo.errors import UserError
from megatron_papo.pictures.model_processor import ModelProcessor
from megatron_papo.pictures.preprocess import FACTOR, PictureSettings, model_size
from megatron_papo.pictures.store import ImageStore, StoredImage
from megatron_papo.reading import shown
from megatron_papo.run.records import Prompt


@dataclass
class PromptMaker:
    """Turns the rows of one set into records; afterwards `report` says what it has seen."""

    config: DataConfig
    chat: ChatFormat
    store: ImageStore
    shown_as: PictureSettings
    """How the pictures will be shown."""
    needs_saliency: bool = False
    """Refuse a row with pictures and no saliency maps."""
    processor: ModelProcessor | None = None
    """Of the model, which must leave resized pictures alone."""
    problems_of: str | None = None
    """Of an evaluation set: the name of the set whose problems it shows."""
    source_hash: SourceHash | None = None
    """Gets the pictures that rows name by path, as they are read."""
    report: SetReport = field(default_factory=SetReport)
    _seen: dict[str, str] = field(default_factory=dict)

    def prompts(self, rows: Iterable[SourceRow | BadRow]) -> Iterator[Prompt]:
        """Return a record per row that can be used and is not overlong; the report gets the others."""
        for row in rows:
            self.report.rows += 1
            made = self._try(row)
            if self.source_hash is not None:
                self.source_hash.add(row)
            if isinstance(made, BadRow):
                self.report.bad.append(made)
                continue
            prompt, images, saliency = made
            if prompt.num_tokens > self.config.max_prompt_tokens:
                self.report.overlong += 1
                continue
            for file in images + saliency:
                self.store.write(file)
            self.report.keep(row.place, prompt, images)
            yield prompt

    def _try(self, row: SourceRow | BadRow) -> BadRow | tuple[Prompt, list[StoredImage], list[StoredImage]]:
        if isinstance(row, BadRow):
            return row
        try:
            return self._prompt(row)
        except UserError as error:
            return BadRow(row.place, str(error))

    def _prompt(self, row: SourceRow) -> tuple[Prompt, list[StoredImage], list[StoredImage]]:
        """Return the record of a row, its pictures and their saliency maps. Raises UserError where it is bad."""
        self.report.columns |= dict.fromkeys(row.columns)
        self.report.rows_with_pictures += bool(row.images)
        if row.id in self._seen:
            raise UserError(f"id {shown(row.id)} is also that of {self._seen[row.id]}: ids must be unique")
        self._seen[row.id] = row.place
        token_ids = self.chat.encode_prompt(row.problem, len(row.images))
        self._check_saliency(row)
        images = [self.store.read(image, row.image_root) for image in row.images]
        saliency = [self.store.read_saliency(entry, row.image_root) for entry in row.saliency or []]
        if self.source_hash is not None:
            for given, file in zip([*row.images, *(row.saliency or [])], images + saliency, strict=True):
                if isinstance(given, str):
                    self.source_hash.know(row, given, file.sha256)
        prompt = Prompt(
            id=row.id,
            problem=row.problem,
            answer=row.answer,
            token_ids=token_ids,
            num_tokens=len(token_ids) + sum(self._num_tokens(image) - 1 for image in images),
            images=[image.name for image in images],
            saliency=[entry.name for entry in saliency],
            problem_id=None if self.problems_of is None else f"{self.problems_of}/{row.problem_id or row.id}",
            options=list(row.options),
            token_ids_without_images=self._without_images(row),
            target=row.target,
            target_token_ids=None if row.target is None else self.chat.encode_target(row.target),
        )
        return prompt, images, saliency

    def _check_saliency(self, row: SourceRow) -> None:
        if row.saliency is None and row.images and self.needs_saliency:
            raise UserError(
                f"no saliency map in column {self.config.saliency_key}, which masked_image.strategy semantic needs:"
                " add the column, name it with data.saliency_key, or choose another strategy"
            )
        if row.saliency is not None and len(row.saliency) != len(row.images):
            raise UserError(
                f"{len(row.saliency)} saliency maps for {len(row.images)} images: give one per image, name the column"
                " of the maps with data.saliency_key, or drop the row"
            )

    def _without_images(self, row: SourceRow) -> list[int] | None:
        return None if self.problems_of is None or not row.images else self.chat.encode_without_images(row.problem)

    def _num_tokens(self, image: StoredImage) -> int:
        """Return how many tokens a picture takes. Raises UserError where the settings, or the server, refuse it."""
        width, height = model_size(*image.seen.size, self.shown_as)
        if self.processor is not None:
            self.processor.require_unchanged(width, height)
        return width // FACTOR * (height // FACTOR)

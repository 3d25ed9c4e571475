"""From rows to Prompt records: pictures stored, prompts tokenised and measured, overlong ones left out and counted."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from megatron_papo.config import DataConfig
from megatron_papo.data.chat import ChatFormat
from megatron_papo.data.fingerprint import SourceHash
from megatron_papo.data.rows import SourceRow
from megatron_papo.errors import UserError
from megatron_papo.pictures.preprocess import FACTOR, smart_size
from megatron_papo.pictures.store import ImageStore, StoredImage
from megatron_papo.run.records import Prompt


@dataclass
class PromptMaker:
    """Turns the rows of one set into records; afterwards `kept` and `dropped` say how many there were."""

    config: DataConfig
    chat: ChatFormat
    store: ImageStore
    needs_saliency: bool = False
    """Refuse a row with pictures and no saliency maps."""
    source_hash: SourceHash | None = None
    """Gets the pictures that rows name by path, as they are read."""
    kept: int = 0
    dropped: int = 0
    _seen: dict[str, str] = field(default_factory=dict)

    def prompts(self, rows: Iterable[SourceRow]) -> Iterator[Prompt]:
        """Return a record per row that is not overlong. Raises UserError naming the first row that is bad."""
        for row in rows:
            try:
                prompt, files = self._prompt(row)
            except UserError as error:
                raise UserError(f"{row.place}: {error}") from error
            if prompt.num_tokens > self.config.max_prompt_tokens:
                self.dropped += 1
                continue
            for file in files:
                self.store.write(file)
            self.kept += 1
            yield prompt

    def _prompt(self, row: SourceRow) -> tuple[Prompt, list[StoredImage]]:
        if row.id in self._seen:
            raise UserError(f"id {row.id} is also that of {self._seen[row.id]}: ids must be unique")
        self._seen[row.id] = row.place
        token_ids = self.chat.encode_prompt(row.problem, len(row.images))
        self._check_saliency(row)
        images = [self.store.read(image, row.image_root) for image in row.images]
        saliency = [self.store.read_saliency(entry, row.image_root) for entry in row.saliency or []]
        if self.source_hash is not None:
            stored = zip([*row.images, *(row.saliency or [])], images + saliency, strict=True)
            self.source_hash.add([file.sha256 for given, file in stored if isinstance(given, str)])
        prompt = Prompt(
            id=row.id,
            problem=row.problem,
            answer=row.answer,
            token_ids=token_ids,
            num_tokens=len(token_ids) + sum(self._num_tokens(image) - 1 for image in images),
            images=[image.name for image in images],
            saliency=[entry.name for entry in saliency],
            target=row.target,
            target_token_ids=None if row.target is None else self.chat.encode_target(row.target),
        )
        return prompt, images + saliency

    def _check_saliency(self, row: SourceRow) -> None:
        if row.saliency is None and row.images and self.needs_saliency:
            raise UserError(
                f"no saliency map in column {self.config.saliency_key}, which masked_image.strategy semantic needs:"
                " add the column, name"
                " it with data.saliency_key, or choose another strategy"
            )
        if row.saliency is not None and len(row.saliency) != len(row.images):
            raise UserError(
                f"{len(row.saliency)} saliency maps for {len(row.images)} images: give one per image, name the column"
                " of the maps with"
                " data.saliency_key, or drop the row"
            )

    def _num_tokens(self, image: StoredImage) -> int:
        width, height = smart_size(*image.size, self.config.min_pixels, self.config.max_pixels)
        return width // FACTOR * (height // FACTOR)

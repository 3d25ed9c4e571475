"""Stage 1: turn raw data into prompts that every later stage reads.

For each set (train, sft; every evaluation set is an output of its own): read its rows (JSONL, parquet, a Hugging Face
data set, or the synthetic counting task), check and store the pictures (and their saliency maps), render and tokenise
the chat prompt, leave out overlong ones. Without model.path the tiny model is made too. Maps that masked_image.strategy
semantic will need are asked for here, before anything costs an hour.

Rows that cannot be used are reported together and stop the stage, unless data.skip_bad_rows lets it leave them out;
rows that look wrong are counted, and stop it above data.max_suspicious_share. A set that cannot be right as a whole
stops it. See data/report.py.

Reads:  the sources of the data section; tokenizer, image processor and vocabulary size of model.path.
Writes: prompts.jsonl, sft.jsonl, images/ and saliency/ (native pictures, named by content), tokenizer.sha256, model/
        (the tiny model), skipped.jsonl where rows were left out. Of an evaluation set: prompts.jsonl, images/,
        saliency/, tokenizer.sha256, skipped.jsonl.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_papo.config import BenchmarkConfig, Config, MaskedImageConfig, PromptSource, RewardConfig
from megatron_papo.data.chat import TOKENIZER_FILES, require_checkpoint, require_ids_in_vocabulary, tokenizer_hash
from megatron_papo.data.fingerprint import source_fingerprint
from megatron_papo.errors import UserError
from megatron_papo.reading import shown
from megatron_papo.run.command_line import StageParser, Task, run
from megatron_papo.run.console import counted, progress_bar
from megatron_papo.run.stage_output import Input, StageOutput, file_hash
from megatron_papo.run.stages import set_section

if TYPE_CHECKING:
    from megatron_papo.data.prompts import PromptMaker
    from megatron_papo.data.rows import BadRow, SourceRow

FILES = {"train": "prompts.jsonl", "sft": "sft.jsonl"}
"""What the rows of a set become; those of an evaluation set become prompts.jsonl."""


def main() -> None:
    _, tasks = StageParser("stage1_prepare_data", __doc__ or "").parse()
    started = None
    for task in tasks:
        out = task.stage_output(inputs_from_outside(task), started)
        if out.done:
            require_saliency_of_prompts(task, out.output)
            out.announce_done()
            continue
        with out:
            prepare(task, out)
        started = time.time()  # of the next output: this one's time is its own


def sources(task: Task) -> dict[str, PromptSource]:
    """Return the sets to make, by name."""
    data, evaluation_set = task.config.data, task.turn.evaluation_set
    if evaluation_set is None:
        return {"train": data.train} if data.sft is None else {"train": data.train, "sft": data.sft}
    sets = task.config.evaluation_sets
    if evaluation_set not in sets:
        raise UserError(f"--evaluation-set {evaluation_set}: there is {', '.join(sets)}")
    return {evaluation_set: sets[evaluation_set]}


def inputs_from_outside(task: Task) -> dict[str, Input]:
    """Return the sources, by their content, and the tokenizer, by that of its files.

    Sources of an output that is not there yet have no fingerprint: `prepare` adds it up while it reads them.
    """
    inputs: dict[str, Input] = {}
    for name, source in sources(task).items():
        if source.source == "synthetic":
            if source.count is None:
                key = f"data.{name}" if name in FILES else set_section(name)[1]
                raise UserError(f"{key}.count: missing: say how many rows of the synthetic task to make")
            continue
        is_there = task.output.exists()
        fingerprint = source_fingerprint(source, task.config.data, name == "sft") if is_there else ""
        inputs[name] = Input(Path(source.source), fingerprint, verify=False)
    directory = tokenizer_directory(task)
    if directory is not None:
        require_checkpoint(directory)
        tokenizer_hash(directory)
        files = {name: file_hash(directory / name) for name in TOKENIZER_FILES if (directory / name).is_file()}
        fingerprint = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        inputs["tokenizer"] = Input(directory, fingerprint, verify=False)
    return inputs


def tokenizer_directory(task: Task) -> Path | None:
    """Return the checkpoint whose tokenizer encodes the prompts; None: the tiny model, which is made here."""
    if "hf" in task.paths:
        return task.path("hf")
    return None if task.config.model.path is None else Path(task.config.model.path)


def shows_masked(config: Config, name: str) -> bool:
    """Say whether a later stage compares the pictures of a set with masked ones."""
    return config.objective.uses_masked_image if name == "train" else name != "sft" and config.evaluation.masked_images


def is_masked_later(config: Config, name: str) -> bool:
    """Say whether a later stage masks the pictures of a set by their saliency maps."""
    return masking_of(config, name).strategy == "semantic" and shows_masked(config, name)


def masking_of(config: Config, name: str) -> MaskedImageConfig:
    """Return how the pictures of a set are masked, where they are."""
    return config.masked_image if name in FILES else config.evaluation.masking(config.masked_image)


def require_saliency_of_prompts(task: Task, output: Path) -> None:
    """Check of an output what `prepare` checks of a new one: masked_image, which decides it, may have been another."""
    from megatron_papo.pictures.preprocess import require_saliency
    from megatron_papo.run.records import Prompt, read_jsonl

    for name in sources(task):
        file = output / FILES.get(name, "prompts.jsonl")
        prompts = read_jsonl(file, Prompt) if is_masked_later(task.config, name) else []
        for number, prompt in enumerate(prompts, 1):
            try:
                require_saliency(masking_of(task.config, name), prompt.images, prompt.saliency)
            except UserError as error:
                raise UserError(f"{file}:{number}: prompt {shown(prompt.id)}: {error}")


def prepare(task: Task, out: StageOutput) -> None:
    """Make all sets of one output. Raises UserError with all that is wrong with the first set that is not usable."""
    from megatron_papo.data.chat import ChatFormat, RenderSettings
    from megatron_papo.data.prompts import PromptMaker
    from megatron_papo.pictures.model_processor import read_model_processor
    from megatron_papo.pictures.preprocess import PictureSettings
    from megatron_papo.pictures.store import IMAGES, SALIENCY, ImageStore
    from megatron_papo.seeds import derive_seed

    config, model = task.config, tokenizer_directory(task)
    if model is None:
        from megatron_papo.synthetic.tiny_model import make_tiny_model

        model = out.partial / "model"
        make_tiny_model(model, derive_seed(config.seed, "tiny_model"))
    require_ids_in_vocabulary(model)
    processor, data = read_model_processor(model), config.data
    store = ImageStore(out.partial, data.transparency)
    for name, source in sources(task).items():
        shown_as, render, problems_of = PictureSettings.of(data), RenderSettings.of(data), None
        if isinstance(source, BenchmarkConfig):
            shown_as = PictureSettings.of_evaluation(data, config.evaluation, source)
            render, problems_of = RenderSettings.of_set(data, source), source.problems_of or name
        processor.require_limits([shown_as])
        maker = PromptMaker(
            data, ChatFormat(model, render), store, shown_as, is_masked_later(config, name), processor, problems_of
        )
        prepare_set(name, source, config, maker, out)
    out.counts["images"] = store.count(IMAGES)
    if store.count(SALIENCY):
        out.counts["saliency_maps"] = store.count(SALIENCY)
    (out.partial / "tokenizer.sha256").write_text(tokenizer_hash(model) + "\n")


def prepare_set(name: str, source: PromptSource, config: Config, maker: "PromptMaker", out: StageOutput) -> None:
    """Write the prompts of one set, count them, and say what is odd about it. Raises UserError with all that is
    wrong."""
    from megatron_papo.data.fingerprint import SourceHash
    from megatron_papo.data.report import too_suspicious
    from megatron_papo.data.rows import Columns, read_rows
    from megatron_papo.run.records import write_jsonl
    from megatron_papo.synthetic.rows import synthetic_rows

    with_target, data, report = name == "sft", config.data, maker.report
    rows: Iterator[SourceRow | BadRow] | Iterator[SourceRow]
    if source.source == "synthetic":
        rows = synthetic_rows(data.synthetic, config.seed, name, source.count or 0, with_target)
    else:
        rows = read_rows(source, data, with_target)
        maker.source_hash = SourceHash(source)
    if isinstance(source, BenchmarkConfig) and source.grading == "choice":
        rows = map(with_choice, rows)
    with progress_bar(source.count, f"stage 1: {name}", "rows") as bar:
        write_jsonl(out.partial / FILES.get(name, "prompts.jsonl"), maker.prompts(counted(rows, bar)))
    suspicious = report.suspicious_rows(partial(grade, config.reward))
    key = f"data.{name}" if name in FILES else set_section(name)[1]
    problems = [
        *report.bad_rows(key, data.skip_bad_rows),
        *report.no_pictures(key, Columns.of(source, data, with_target), shows_masked(config, name)),
        *too_suspicious(key, suspicious, report.kept, data.max_suspicious_share),
    ]
    problems = problems or report.no_rows(key, source.source)
    if problems:
        raise UserError(*problems)
    if maker.source_hash is not None:
        out.complete_input(name, maker.source_hash.hexdigest())
    if report.bad:
        with open(out.partial / "skipped.jsonl", "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"set": name, **vars(row)}) + "\n" for row in report.bad)
    out.counts |= report.counts(name, suspicious)
    for line in report.in_words(suspicious, data.max_prompt_tokens):
        print(shown(f"stage 1: {name}: {line}", limit=0), flush=True)
    if name == "train" and report.kept < config.rollout.rollout_batch_size:
        times = math.ceil(config.rollout.rollout_batch_size / report.kept)
        print(
            f"stage 1: train: fewer prompts than rollout.rollout_batch_size {config.rollout.rollout_batch_size}: each"
            f" is drawn up to {times} times an iteration",
            flush=True,
        )


def with_choice(row: "SourceRow | BadRow") -> "SourceRow | BadRow":
    """Return a row whose answer is one of its options; else what is wrong with it."""
    from megatron_papo.data.rows import BadRow
    from megatron_papo.rollout.choices import right_letters

    try:
        if not isinstance(row, BadRow):
            right_letters(row.answer, row.options)
    except UserError as error:
        return BadRow(row.place, str(error))
    return row


def grade(reward: RewardConfig, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Say of pairs (response, answer) whether the response is right, in the processes that grade responses."""
    from megatron_papo.rollout.rewards import Grader

    with Grader(reward) as grader:
        pending = [grader.submit(response, answer, cut_off=False) for response, answer in pairs]
        return [grader.result(submitted).accuracy == 1.0 for submitted in pending]


if __name__ == "__main__":
    run(main)

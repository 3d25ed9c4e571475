"""Stage 1: turn raw data into prompts that every later stage reads.

For each set (train, sft; every evaluation set is an output of its own): read its rows (JSONL, parquet, a Hugging Face
data set, or the synthetic counting task), check and store the pictures (and their saliency maps), render and tokenise
the chat prompt, leave out overlong ones. Without model.path the tiny model is made too. Maps that masked_image.strategy
semantic will need are asked for here, before anything costs an hour.

Reads:  the sources of the data section; the tokenizer of model.path.
Writes: prompts.jsonl, sft.jsonl, images/ and saliency/ (native pictures, named by content), tokenizer.sha256, model/
        (the tiny model). Of an evaluation set: prompts.jsonl, images/, saliency/, tokenizer.sha256.
"""

import hashlib
import json
import time
from pathlib import Path

from megatron_papo.config import Config, PromptSource
from megatron_papo.data.chat import TOKENIZER_FILES, tokenizer_hash
from megatron_papo.data.fingerprint import source_fingerprint
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import StageParser, Task, run
from megatron_papo.run.console import counted, progress_bar
from megatron_papo.run.stage_output import Input, StageOutput, file_hash

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
    if evaluation_set not in data.evaluation_sets:
        raise UserError(f"--evaluation-set {evaluation_set}: there is {', '.join(data.evaluation_sets)}")
    return {evaluation_set: data.evaluation_sets[evaluation_set]}


def inputs_from_outside(task: Task) -> dict[str, Input]:
    """Return the sources, by their content, and the tokenizer, by that of its files."""
    inputs: dict[str, Input] = {}
    for name, source in sources(task).items():
        if source.source == "synthetic":
            if source.count is None:
                raise UserError(f"data.{name}.count: missing: say how many rows of the synthetic task to make")
            continue
        inputs[name] = Input(Path(source.source), source_fingerprint(source, task.config.data), verify=False)
    directory = tokenizer_directory(task)
    if directory is not None:
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


def is_masked_later(config: Config, name: str) -> bool:
    """Say whether a later stage masks the pictures of a set by their saliency maps."""
    if config.masked_image.strategy != "semantic":
        return False
    return config.objective.uses_masked_image if name == "train" else name != "sft" and config.evaluation.masked_images


def require_saliency_of_prompts(task: Task, output: Path) -> None:
    """Check of an output what `prepare` checks of a new one: masked_image, which decides it, may have been another."""
    from megatron_papo.pictures.preprocess import require_saliency
    from megatron_papo.run.records import Prompt, read_jsonl

    for name in sources(task):
        file = output / FILES.get(name, "prompts.jsonl")
        prompts = read_jsonl(file, Prompt) if is_masked_later(task.config, name) else []
        for number, prompt in enumerate(prompts, 1):
            try:
                require_saliency(task.config.masked_image, prompt.images, prompt.saliency)
            except UserError as error:
                raise UserError(f"{file}:{number}: prompt {prompt.id}: {error}")


def prepare(task: Task, out: StageOutput) -> None:
    from megatron_papo.data.chat import ChatFormat
    from megatron_papo.data.prompts import PromptMaker
    from megatron_papo.data.rows import read_rows
    from megatron_papo.pictures.store import IMAGES, SALIENCY, ImageStore
    from megatron_papo.run.records import write_jsonl
    from megatron_papo.seeds import derive_seed
    from megatron_papo.synthetic.rows import synthetic_rows

    config, model = task.config, tokenizer_directory(task)
    if model is None:
        from megatron_papo.synthetic.tiny_model import make_tiny_model

        model = out.partial / "model"
        make_tiny_model(model, derive_seed(config.seed, "tiny_model"))
    chat = ChatFormat(model, config.data.prompt_template, config.data.system_prompt)
    store = ImageStore(out.partial)
    for name, source in sources(task).items():
        with_target = name == "sft"
        if source.source == "synthetic":
            rows = synthetic_rows(config.data.synthetic, config.seed, name, source.count or 0, with_target)
        else:
            rows = read_rows(source, config.data, with_target)
        maker = PromptMaker(config.data, chat, store, needs_saliency=is_masked_later(config, name))
        with progress_bar(source.count, f"stage 1: {name}", "rows") as bar:
            file = out.partial / FILES.get(name, "prompts.jsonl")
            write_jsonl(file, maker.prompts(counted(rows, bar)))
        if not maker.kept:
            raise UserError(
                f"data.{name}: no row left ({maker.dropped} overlong): raise data.max_prompt_tokens or add data"
            )
        out.counts |= {name: maker.kept, f"{name}_dropped_overlong": maker.dropped}
        overlong = f"{maker.dropped} dropped (over {config.data.max_prompt_tokens} tokens)"
        print(f"stage 1: {name}: {maker.kept} prompts, {overlong}", flush=True)
    out.counts["images"] = store.count(IMAGES)
    if store.count(SALIENCY):
        out.counts["saliency_maps"] = store.count(SALIENCY)
    (out.partial / "tokenizer.sha256").write_text(tokenizer_hash(model) + "\n")


if __name__ == "__main__":
    run(main)

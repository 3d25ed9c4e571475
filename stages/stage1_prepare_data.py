"""Stage 1: turn raw data into prompts that every later stage reads.

For each set (train, sft, evaluation): read its rows (JSONL, parquet, a Hugging Face data set, or the synthetic counting
task), check and store the pictures (and their saliency maps), render and tokenise the chat prompt, leave out overlong
ones. Without model.path the tiny model is made too. Maps that masked_image.strategy semantic will need are asked for
here, before anything costs an hour.

Reads:  the sources of the data section; the tokenizer of model.path.
Writes: prompts.jsonl, sft.jsonl, evaluation.jsonl, images/ and saliency/ (native pictures, named by content),
tokenizer.sha256, model/ (tiny model).
"""

from pathlib import Path

from megatron_papo.config import Config, PromptSource
from megatron_papo.config_files import load_config
from megatron_papo.data.chat import TOKENIZER_FILES, tokenizer_hash
from megatron_papo.data.rows import data_files
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run, stage_parser
from megatron_papo.run.stage_output import StageOutput, content_fingerprint, file_hash

FILES = {"train": "prompts.jsonl", "sft": "sft.jsonl", "evaluation": "evaluation.jsonl"}


def sources(config: Config) -> dict[str, PromptSource]:
    """The sets to make, by name."""
    found = {"train": config.data.train, "sft": config.data.sft, "evaluation": config.data.evaluation}
    return {name: source for name, source in found.items() if source is not None}


def input_fingerprints(config: Config) -> dict[str, str]:
    """Of the data files and of the tokenizer; a Hugging Face data set is identified by its name and split alone."""
    inputs = {}
    for name, source in sources(config).items():
        if source.source == "synthetic":
            if source.count is None:
                raise UserError(f"data.{name}.count: missing: say how many rows of the synthetic task to make")
            continue
        for file in data_files(source.source):
            inputs[f"{name}:{file}"] = content_fingerprint(file)
    if config.model.path is not None:
        tokenizer_hash(Path(config.model.path))
        present = [Path(config.model.path) / name for name in TOKENIZER_FILES]
        inputs["tokenizer"] = {file.name: file_hash(file) for file in present if file.is_file()}
    return inputs


def sets_with_masked_images(config: Config) -> set[str]:
    """The sets whose pictures a later stage will mask."""
    used = {"train": config.objective.uses_masked_image, "evaluation": config.evaluation.masked_images}
    return {name for name, masked in used.items() if masked}


def main() -> None:
    arguments = stage_parser(__doc__).parse_args()
    config = load_config(arguments.config, arguments.overrides)
    out = StageOutput(
        "stage1_prepare_data", arguments.output, config, ["seed", "data", "model.path"], input_fingerprints(config)
    )
    if out.done:
        require_saliency_of_prompts(config, out.output)
        out.announce_done()
        return
    with out:
        prepare(config, out)


def require_saliency_of_prompts(config: Config, output: Path) -> None:
    """The check of a new output, on one made when masked_image was another: that section is no part of the
    fingerprint."""
    from megatron_papo.pictures.preprocess import require_saliency
    from megatron_papo.run.records import Prompt, read_jsonl

    if config.masked_image.strategy != "semantic":
        return
    for name in sorted(sets_with_masked_images(config)):
        for number, prompt in enumerate(read_jsonl(output / FILES[name], Prompt), 1):
            try:
                require_saliency(config.masked_image, prompt.images, prompt.saliency)
            except UserError as error:
                raise UserError(f"{output / FILES[name]}:{number}: prompt {prompt.id}: {error}")


def prepare(config: Config, out: StageOutput) -> None:
    from tqdm import tqdm

    from megatron_papo.data.chat import ChatFormat
    from megatron_papo.data.prompts import PromptMaker
    from megatron_papo.data.rows import read_rows
    from megatron_papo.pictures.store import IMAGES, SALIENCY, ImageStore
    from megatron_papo.run.records import write_jsonl
    from megatron_papo.seeds import derive_seed
    from megatron_papo.synthetic.rows import synthetic_rows

    model = Path(config.model.path) if config.model.path is not None else out.partial / "model"
    if config.model.path is None:
        from megatron_papo.synthetic.tiny_model import make_tiny_model

        make_tiny_model(model, derive_seed(config.seed, "tiny_model"))
    chat = ChatFormat(model, config.data.prompt_template, config.data.system_prompt)
    store = ImageStore(out.partial)
    masked = sets_with_masked_images(config) if config.masked_image.strategy == "semantic" else set()
    for name, source in sources(config).items():
        with_target = name == "sft"
        if source.source == "synthetic":
            rows = synthetic_rows(config.data.synthetic, config.seed, name, source.count, with_target)
        else:
            rows = read_rows(source, config.data, with_target)
        maker = PromptMaker(config.data, chat, store, needs_saliency=name in masked)
        progress = tqdm(rows, desc=f"stage 1: {name}", total=source.count, unit=" rows", mininterval=1)
        write_jsonl(out.partial / FILES[name], maker.prompts(progress))
        if not maker.kept:
            raise UserError(
                f"data.{name}: no row left ({maker.dropped} overlong): raise data.max_prompt_tokens or add data"
            )
        out.counts |= {name: maker.kept, f"{name}_dropped_overlong": maker.dropped}
        print(
            f"stage 1: {name}: {maker.kept} prompts, {maker.dropped} dropped (over {config.data.max_prompt_tokens}"
            " tokens)",
            flush=True,
        )
    out.counts["images"] = store.count(IMAGES)
    if store.count(SALIENCY):
        out.counts["saliency_maps"] = store.count(SALIENCY)
    (out.partial / "tokenizer.sha256").write_text(tokenizer_hash(model) + "\n")


if __name__ == "__main__":
    run(main)

"""Stage 1: turn raw data into prompts that every later stage reads.

For each set (train, sft, evaluation): read its rows (JSONL, parquet, a Hugging Face data set, or the synthetic counting task), check
and store the pictures, render and tokenise the chat prompt, leave out overlong ones. Without model.path the tiny model is made too.

Reads:  the sources of the data section; the tokenizer of model.path.
Writes: prompts.jsonl, sft.jsonl, evaluation.jsonl, images/ (native pictures, named by content), tokenizer.sha256, model/ (tiny model).
"""

from pathlib import Path

from megatron_papo.command_line import run, stage_parser
from megatron_papo.config import Config, PromptSource, load_config
from megatron_papo.data.chat import TOKENIZER_FILES, tokenizer_hash
from megatron_papo.data.rows import data_files
from megatron_papo.errors import UserError
from megatron_papo.manifest import StageOutput, content_fingerprint, file_hash

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


def main() -> None:
    arguments = stage_parser(__doc__).parse_args()
    config = load_config(arguments.config, arguments.overrides)
    out = StageOutput("stage1_prepare_data", arguments.output, config, ["seed", "data", "model.path"], input_fingerprints(config))
    if out.done:
        out.announce_done()
        return
    with out:
        prepare(config, out)


def prepare(config: Config, out: StageOutput) -> None:
    from tqdm import tqdm

    from megatron_papo.data.chat import ChatFormat
    from megatron_papo.data.image_store import ImageStore
    from megatron_papo.data.prompts import PromptMaker
    from megatron_papo.data.rows import read_rows
    from megatron_papo.records import write_jsonl
    from megatron_papo.seeds import derive_seed
    from megatron_papo.synthetic.rows import synthetic_rows

    model = Path(config.model.path) if config.model.path is not None else out.partial / "model"
    if config.model.path is None:
        from megatron_papo.synthetic.tiny_model import make_tiny_model

        make_tiny_model(model, derive_seed(config.seed, "tiny_model"))
    chat = ChatFormat(model, config.data.prompt_template, config.data.system_prompt)
    store = ImageStore(out.partial)
    for name, source in sources(config).items():
        with_target = name == "sft"
        if source.source == "synthetic":
            rows = synthetic_rows(config.data.synthetic, config.seed, name, source.count, with_target)
        else:
            rows = read_rows(source, config.data, with_target)
        maker = PromptMaker(config.data, chat, store)
        progress = tqdm(rows, desc=f"stage 1: {name}", total=source.count, unit=" rows", mininterval=1)
        write_jsonl(out.partial / FILES[name], maker.prompts(progress))
        if not maker.kept:
            raise UserError(f"data.{name}: no row left ({maker.dropped} overlong): raise data.max_prompt_tokens or add data")
        out.counts |= {name: maker.kept, f"{name}_dropped_overlong": maker.dropped}
        print(f"stage 1: {name}: {maker.kept} prompts, {maker.dropped} dropped (over {config.data.max_prompt_tokens} tokens)", flush=True)
    out.counts["images"] = len(store.written)
    (out.partial / "tokenizer.sha256").write_text(tokenizer_hash(model) + "\n")


if __name__ == "__main__":
    run(main)

"""Stage 3: convert a Hugging Face checkpoint to a Megatron checkpoint.

    for each tensor of the name map:  read from safetensors -> permute -> append to the torch_dist file       (one in memory at a time)
    then read everything back through the inverse permutation and compare sha256 by tensor: proof.json

Any tensor-parallel and pipeline-parallel layout can load the result. One process, no process groups, no accelerator.
Reads: a Qwen2.5-VL checkpoint directory (safetensors).
Writes: torch_dist files, hf/ (configuration, tokenizer, processor: what stage 6 needs to go back), proof.json.
"""

from megatron_papo.command_line import run, stage_parser
from megatron_papo.config import load_config
from megatron_papo.manifest import StageOutput, input_fingerprint


def main() -> None:
    parser = stage_parser(__doc__, ("hf", "Hugging Face checkpoint directory"))
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    fingerprint = input_fingerprint(arguments.hf, "give --hf the directory of a Qwen2.5-VL checkpoint")
    out = StageOutput("stage3_convert_to_megatron", arguments.output, config, sections=[], inputs={"hf": fingerprint})
    if out.done:
        out.announce_done()
        return
    from megatron_papo.checkpoint.convert import HFCheckpoint, hf_to_megatron
    from megatron_papo.checkpoint.progress import byte_progress
    from megatron_papo.training.parallel import check_parallel_sizes

    source = HFCheckpoint(arguments.hf)
    check_parallel_sizes(source.hf, config.parallel)  # minutes of conversion before stage 5 would say so
    with out, byte_progress("convert to Megatron and verify", source) as progress:
        hf_to_megatron(source, out.partial, progress)
        out.counts["tensors"] = len(source.tensors)


if __name__ == "__main__":
    run(main)

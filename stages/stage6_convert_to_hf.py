"""Stage 6: convert a Megatron checkpoint back to a Hugging Face checkpoint.

    for each tensor of the name map:  read from torch_dist -> inverse permutation -> write into its safetensors file
    then read everything back and compare sha256 by tensor: proof.json

Files, tensor names and their order are those of the checkpoint that training started from; untrained, the files are the same bytes.
Reads: a Megatron checkpoint directory (stage 3 or 5; the optimizer state is left aside).
Writes: safetensors, config.json, tokenizer and processor files, proof.json.
"""

from megatron_papo.command_line import run, stage_parser
from megatron_papo.config import load_config
from megatron_papo.manifest import StageOutput, require_input

MADE_BY = ("stage3_convert_to_megatron", "stage5_train")


def main() -> None:
    parser = stage_parser(__doc__, ("megatron", "Megatron checkpoint directory"))
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    hint = "python -m stages.stage5_train or python -m stages.stage3_convert_to_megatron"
    fingerprint = require_input(arguments.megatron, MADE_BY, hint)
    out = StageOutput("stage6_convert_to_hf", arguments.output, config, sections=[], inputs={"megatron": fingerprint})
    if out.done:
        out.announce_done()
        return
    from megatron_papo.checkpoint.convert import MegatronCheckpoint, megatron_to_hf
    from megatron_papo.checkpoint.progress import byte_progress

    source = MegatronCheckpoint(arguments.megatron)
    with out, byte_progress("convert to Hugging Face and verify", source) as progress:
        megatron_to_hf(source, out.partial, progress)
        out.counts["tensors"] = len(source.tensors)


if __name__ == "__main__":
    run(main)

"""Stage 6: convert a Megatron checkpoint back to a Hugging Face checkpoint.

    for each tensor in the order of the files to write:  read from torch_dist -> check -> inverse permutation ->
                                                         append to its file
    then read everything back from disk and compare hashes by tensor: proof.json

Files, tensor names and their order are those of the checkpoint that training started from; untrained, the files are the
same bytes. Reads: a Megatron checkpoint directory (stage 3 or 5; the optimizer state is left aside). Writes:
safetensors, flat config.json, tokenizer and processor files, README.md (how it was trained), proof.json.
"""

from megatron_papo.checkpoint.conversion_output import to_hf
from megatron_papo.config_files import load_config
from megatron_papo.run.command_line import run, stage_parser
from megatron_papo.run.stage_output import require_input

MADE_BY = ("stage3_convert_to_megatron", "stage5_train")


def main() -> None:
    parser = stage_parser(__doc__, ("megatron", "Megatron checkpoint directory"))
    arguments = parser.parse_args()
    load_config(arguments.config, arguments.overrides)
    require_input(
        arguments.megatron, MADE_BY, "python -m stages.stage5_train or python -m stages.stage3_convert_to_megatron"
    )
    to_hf(arguments.megatron, arguments.output, {})


if __name__ == "__main__":
    run(main)

"""Stage 6: convert a Megatron checkpoint back to a Hugging Face checkpoint.

    for each tensor in the order of the files to write:
        read from torch_dist -> check -> inverse permutation -> append to its file
    then read everything back from disk and compare hashes by tensor: proof.json

Files, tensor names and their order are those of the checkpoint that training started from; untrained, the files are the
same bytes.
Reads: a Megatron checkpoint directory (stage 3 or 5; the optimizer state is left aside).
Writes: safetensors, flat config.json, tokenizer and processor files, README.md (how it was trained), proof.json.
Deletes: in a run, the weights of older iterations that keep_checkpoints and keep_exports do not keep.
"""

from megatron_papo.checkpoint.conversion_output import to_hf
from megatron_papo.checkpoint.keep import tidy
from megatron_papo.run.command_line import StageParser, run


def main() -> None:
    _, tasks = StageParser("stage6_convert_to_hf", __doc__ or "").parse()
    for task in tasks:
        task.input("megatron")  # is there, and a stage's
        to_hf(task.path("megatron"), task.output, {})
        if task.run is not None:
            tidy(task.run, task.iteration)


if __name__ == "__main__":
    run(main)

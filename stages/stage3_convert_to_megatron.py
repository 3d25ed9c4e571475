"""Stage 3: convert a Hugging Face checkpoint to a Megatron checkpoint.

    for each tensor in the order of the files:
        read -> hash -> permute with the others of its layer -> append to the torch_dist file
    then read everything back from disk through the inverse permutation and compare hashes by tensor: proof.json

Any tensor-parallel and pipeline-parallel layout can load the result. One process, no process groups, no accelerator.
Reads: a Qwen2.5-VL checkpoint directory (safetensors).
Writes: torch_dist files, hf/ (configuration, tokenizer, processor: what stage 6 needs to go back), proof.json.
"""

from functools import partial

from megatron_papo.checkpoint.conversion_output import to_megatron
from megatron_papo.data.chat import require_ids_in_vocabulary
from megatron_papo.model.hf_config import HFConfig
from megatron_papo.model.parallel_sizes import check_parallel_sizes
from megatron_papo.run.command_line import StageParser, Task, run


def main() -> None:
    _, tasks = StageParser("stage3_convert_to_megatron", __doc__ or "").parse()
    for task in tasks:
        to_megatron(task.require("hf"), task.output, {}, partial(check, task))


def check(task: Task, hf: HFConfig) -> None:
    """Refuse before minutes of conversion what stage 5 would refuse after them."""
    check_parallel_sizes(hf, task.config.parallel)
    if (task.path("hf") / "tokenizer.json").is_file():  # weights alone can be converted
        require_ids_in_vocabulary(task.path("hf"))


if __name__ == "__main__":
    run(main)

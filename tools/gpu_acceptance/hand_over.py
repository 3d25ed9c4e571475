"""Section hand_over: on GPUs that serve and train in turns, SGLang gives up its memory, a trainer gets it, and SGLang,
once it has it back, answers as before."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tools.gpu_acceptance.report import Line, passed_if
from tools.gpu_acceptance.server import with_server
from tools.gpu_acceptance.task import Task

if TYPE_CHECKING:
    from megatron_papo.config import Config

SERVER_SHARE = 0.7
LEFT_BEHIND = 0.15
"""Share of the GPU's memory that a server may keep: CUDA's own, captured graphs, the workspaces of its kernels."""


def run(task: Task) -> Iterator[Line]:
    shares = ["server.shares_gpus=true", f"server.memory_fraction={SERVER_SHARE}"]
    if task.device == "cuda":
        shares.append("server.max_total_tokens=null")  # all that the share allows
    yield from with_server(task, shares, checks)


def checks(task: Task, config: "Config", where: Path) -> Iterator[Line]:
    """Yield what happens to the memory, and whether the same requests give the same answers afterwards."""
    import torch

    from megatron_papo.sglang import server as sglang_server
    from tools.check_parity import Side, made_prompts

    hf_dir, _ = task.checkpoint()

    def find() -> list:
        return sglang_server.connect_or_start_all(where, hf_dir, config.server, config.model.dtype)

    with tempfile.TemporaryDirectory(prefix="acceptance_") as work:
        root, prompts = made_prompts(hf_dir, config, Path(work))
        servers = find()
        before = Side(hf_dir, servers, config, root, load=True).sample(prompts, 1.0, per_prompt=2)
        held = _free_bytes(task)
        sglang_server.release_memory(servers)
        free = _free_bytes(task)
        if task.device == "cpu":
            yield Line(
                "SGLang gives up its memory", "not possible", "no GPU memory with --device cpu; it took the call"
            )
        else:
            total = torch.cuda.get_device_properties(0).total_memory
            words = f"{held / 1e9:.1f} GB were free, then {free / 1e9:.1f} of {total / 1e9:.1f}"
            yield Line("SGLang gives up its memory", passed_if(free > (1 - LEFT_BEHIND) * total), words)
            block = torch.full((int(0.9 * free) // 4,), 1.0, device="cuda")
            right = bool(block[-1] == 1.0)
            yield Line("a trainer gets it", passed_if(right), f"{block.nbytes / 1e9:.1f} GB in one tensor")
            del block
            torch.cuda.empty_cache()
        again_servers = find()
        same_process = [server.url for server in again_servers] == [server.url for server in servers]
        yield Line("SGLang takes it back", passed_if(same_process), "the same process answers")
        again = Side(hf_dir, again_servers, config, root, load=False).sample(prompts, 1.0, per_prompt=2)
        tokens = [rollout.response_token_ids for rollout in before] == [rollout.response_token_ids for rollout in again]
        words = f"{sum(len(rollout.response_token_ids) for rollout in before)} tokens, same seeds"
        yield Line("it samples the same tokens as before", passed_if(tokens), words)


def _free_bytes(task: Task) -> int:
    """Return what is free on the first GPU, whoever holds the rest; 0 without one."""
    import torch

    return torch.cuda.mem_get_info(0)[0] if task.device == "cuda" else 0

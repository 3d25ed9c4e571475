"""Section kernels: which attention kernels torch chooses, forward and backward, by the profiler's names.

No kernel that keeps the scores of every pair of tokens (math), and not cuDNN's, which makes a plan for each new shape.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from tools.gpu_acceptance.report import Fact, Line, passed_if
from tools.gpu_acceptance.task import Shape, Task

if TYPE_CHECKING:
    from megatron_papo.config import Config
    from megatron_papo.training.rows import TrainingRollout

ATTENTION = "aten::_scaled_dot_product_"
KERNEL_WORDS = ("flash", "fmha", "attention")
UNWANTED = ("math", "cudnn", "fused_attention_overrideable")


def run(task: Task) -> Iterator[Line | Fact]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from megatron_papo.model.hf_config import read_hf_config

    hf_dir, _ = task.checkpoint()
    hf, pictures = read_hf_config(hf_dir), task.output / "pictures_kernels"
    shape = Shape(1, 60, 20) if task.device == "cpu" else Shape(2, 1000, 250)
    budget = shape.prompt_tokens + 8 * shape.response_tokens
    for layout in ("plain", "group"):
        changes = [f"training.layout={layout}", f"training.max_tokens_per_micro_batch={budget}"]
        config = task.config("bfloat16", [*shape.changes, *changes, "rollout.group_size=3"])
        rows = task.rows(hf, config, pictures, shape)
        operators, kernels = attention_of(task, config, rows, nullcontext())
        unwanted = [name for name in operators if any(word in name for word in UNWANTED)]
        found = ", ".join(operators) or "none seen"
        result = passed_if(bool(operators) and not unwanted)
        yield Line(f"attention of the {layout} layout and the vision tower", result, found)
        if kernels:
            yield Fact(f"kernels of the {layout} layout", ", ".join(kernels))
    operators, _ = attention_of(task, config, rows, sdpa_kernel(SDPBackend.MATH))
    noticed = any("math" in name for name in operators)
    yield Line("control: attention by matrix products is noticed", passed_if(noticed), ", ".join(operators))


def attention_of(
    task: Task, config: "Config", rows: "Sequence[TrainingRollout]", backend: AbstractContextManager
) -> tuple[list[str], list[str]]:
    """Return the attention operators of a forward and backward pass with their number of calls, and, on a GPU, the
    kernels whose names speak of attention."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from megatron_papo.model.hf_config import read_hf_config
    from tools.gpu_acceptance.parity import by_ours

    hf_dir, megatron_dir = task.checkpoint()
    pictures = task.output / "pictures_kernels"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if task.device == "cuda" else [])]
    with profile(activities=activities) as profiled, backend:
        by_ours(megatron_dir, read_hf_config(hf_dir), rows, pictures, config)
    averages = profiled.key_averages()
    counts = {event.key: event.count for event in averages if event.key.startswith(ATTENTION)}
    operators = [f"{key.removeprefix(ATTENTION)} x {count}" for key, count in sorted(counts.items())]
    on_gpu = sorted(event.key for event in averages if event.device_type == DeviceType.CUDA)
    return operators, [key[:60] for key in on_gpu if any(word in key.lower() for word in KERNEL_WORDS)]

"""Start the unmodified SGLang server (PyPI wheel 0.5.21) on a CPU, without compiled kernels.

    echo KEY | PYTHON_OF_SGLANG -P megatron_papo/sglang/cpu_launcher.py --model-path DIR --port 30000 [any flag of
    sglang.launch_server]

HTTP server, tokenizer manager, scheduler, radix cache, model code, sampler and weight loader are SGLang's own; only the
compiled kernels are replaced by PyTorch's. Everything below is glue for things a CPU has not: the sgl_kernel package,
triton, torchvision's CUDA library. It is applied when this file is the main module, in the launcher and again in the
scheduler and detokenizer, because multiprocessing imports the main module in each child.

Sampling is batch-invariant: a request with a seed gets the same tokens and the same log-prob bits whatever else the
server is doing, so that a run killed and resumed ends in the same checkpoint. What that takes on a CPU stands in
`enable_batch_invariance`.

The flags in DEFAULTS and SWITCHES are added unless given; `--without=NAME` leaves a switch out, e.g.
`--without=sleep-on-idle`. This file runs in SGLang's environment and imports nothing of megatron_papo.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import runpy
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",  # what SGLang's is_cpu() tests
    "OMP_NUM_THREADS": "1",  # more threads cut elementwise loops where the batch decides; slower, too, on tiny models
    "TORCHDYNAMO_DISABLE": "1",  # no C++ compiler needed, no 20 s of torch.compile in the first request
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "SGLANG_VLM_CACHE_SIZE_MB": "0",  # cached ViT outputs survive a weight update (sgl-project/sglang#36468)
    # Reserve max_new_tokens of every running request, so that none is ever retracted: its second prefill would round
    # differently.
    "SGLANG_INIT_NEW_TOKEN_RATIO": "1.0",
    "SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR": "1.0",
}
IS_MAIN = __name__ in ("__main__", "__mp_main__")
if IS_MAIN:  # before torch and sglang are imported
    for _name, _value in ENVIRONMENT.items():
        os.environ.setdefault(_name, _value)

import torch  # noqa: E402 after the environment that it reads
from torch import Tensor  # noqa: E402

DEFAULTS = {
    "--device": "cpu",
    "--host": "127.0.0.1",
    "--attention-backend": "torch_native",
    "--dtype": "float32",
    "--mem-fraction-static": "0.2",
    "--max-total-tokens": "16384",
    "--chunked-prefill-size": "-1",  # where a prompt is cut would depend on what else is in the batch
}
SWITCHES = (
    "--disable-overlap-schedule",
    "--sleep-on-idle",  # else the idle scheduler keeps a core busy
    "--enable-deterministic-inference",  # without it SGLang ignores sampling_seed
)
TILE_ROWS = 32


# --- sgl_kernel: names resolve, calls raise; the one kernel that seeded sampling needs is real
def _missing(name: str) -> Callable[..., NoReturn]:
    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: compiled SGLang kernels are not available on this CPU")

    missing.__name__ = name
    return missing


class _KernelModule(types.ModuleType):
    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(name)


_32_BITS = 0xFFFFFFFF


def _multiply_32(a: Tensor, constant: int) -> Tensor:
    """Return a * constant mod 2**32 for int64 tensors below 2**32, without overflow."""
    return ((a * (constant & 0xFFFF)) + (((a * (constant >> 16)) & 0xFFFF) << 16)) & _32_BITS


def _murmur_round(state: Tensor, word: Tensor) -> Tensor:
    word = _multiply_32(word, 0xCC9E2D51)
    word = ((word << 15) | (word >> 17)) & _32_BITS
    state = state ^ _multiply_32(word, 0x1B873593)
    state = ((state << 13) | (state >> 19)) & _32_BITS
    return (state * 5 + 0xE6546B64) & _32_BITS


def murmur_hash32(seed: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """Return MurmurHash3 of (seed, position, column), bit-equal to SGLang's Triton kernel.

    uint64 [B], int [B], int [V] -> uint32 [B, V].
    """
    seed = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.to(torch.int64)
    state = _murmur_round(torch.zeros_like(seed), seed & _32_BITS)
    state = _murmur_round(state, (seed >> 32) & _32_BITS)
    state = _murmur_round(state, positions.to(torch.int64) & _32_BITS)
    state = _murmur_round(state[:, None], (columns.to(torch.int64) & _32_BITS)[None, :]) ^ 16
    state = _multiply_32(state ^ (state >> 16), 0x85EBCA6B)
    state = _multiply_32(state ^ (state >> 13), 0xC2B2AE35)
    return (state ^ (state >> 16)).to(torch.uint32)


_libraries: list[torch.library.Library] = []  # torch.library registrations end when the object dies


def _install_sgl_kernel() -> None:
    if importlib.util.find_spec("sgl_kernel"):
        return
    for name in ("sgl_kernel", "sgl_kernel.mamba"):
        module = _KernelModule(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
    vars(sys.modules["sgl_kernel"])["__version__"] = "0+none"
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
    library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    _libraries.append(library)
    # bound at import by models that the Qwen-VL processor module imports; never called
    for name in (
        "fused_sigmoid_mul_cpu",
        "fused_qk_gemma_rmsnorm_cpu",
        "fused_qk_gemma_rmsnorm_with_gate_cpu",
        "fused_qkvzba_split_reshape_cat_contiguous_cpu",
        "fused_sigmoid_gating_delta_rule_update_cpu",
        "fused_gdn_gating_cpu",
    ):
        setattr(torch.ops.sgl_kernel, name, _missing(name))


# --- torchvision: the PyPI wheel's library needs CUDA; importing only needs these two operators to be declared
def _install_torchvision() -> None:
    if torch.version.cuda:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


# --- triton: kernels are defined at import all over SGLang and never launched on a CPU
class _Anything(types.ModuleType):
    """A module that has every attribute; one in CamelCase is a class. As a decorator it returns the function."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, _TritonFinder(), is_package=True)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value: object
        if name[0].isupper():
            value = type(name, (), {"__init__": lambda self, *args, **kwargs: None})
        else:
            value = _submodule(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: object, **kwargs: object) -> object:
        decorates = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if decorates else (lambda function: function)


class _TritonFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "triton" or name.startswith("triton."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _submodule(name: str) -> types.ModuleType:
    return sys.modules.setdefault(name, _Anything(name))


def _install_triton() -> None:
    if importlib.util.find_spec("triton"):
        return
    sys.meta_path.append(_TritonFinder())
    used_at_import = {
        "__version__": "3.0.0",
        "cdiv": lambda a, b: -(a // -b),
        "next_power_of_2": lambda n: 1 << (n - 1).bit_length() if n > 0 else 1,
    }
    vars(_submodule("triton")).update(used_at_import)


# --- log_softmax: torch's loses digits on long rows
LONG_ROW = 8192
"""Shorter rows are left to torch, whose error there is that of float32."""


def log_softmax(logits: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """Return log_softmax with an error of float32's last digits, however long the row.

    torch's own sum of exponentials on a CPU loses digits: over 151,936 words its log-probs are up to 2e-5 too high.
    """
    if logits.shape[dim] < LONG_ROW:
        return torch._log_softmax(logits, dim, half_to_float, out=torch.empty_like(logits))
    values = logits.float() if logits.itemsize < 4 else logits
    return (values - torch.logsumexp(values, dim, keepdim=True)).to(logits.dtype)


def _install_log_softmax() -> None:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced, in ten lines
        library.impl("_log_softmax", log_softmax, "CPU")
    _libraries.append(library)


# --- batch invariance
def tiled_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, [M, K], [K, N] -> [M, N], in which the bits of a row do not depend on M or on the other rows.

    BLAS picks its kernel, hence its order of summation, by the sizes. Here it always sees one tile of TILE_ROWS rows.
    """
    rows, inner = a.shape
    tiles = -(-rows // TILE_ROWS)
    padded = a.new_zeros(tiles * TILE_ROWS, inner)
    padded[:rows] = a
    padded = padded.view(tiles, 1, TILE_ROWS, inner)
    products = a.new_empty(tiles, TILE_ROWS, b.shape[1])
    for tile in range(tiles):
        torch.bmm(padded[tile], b[None], out=products[tile : tile + 1])
    return products.view(tiles * TILE_ROWS, b.shape[1])[:rows]


def _tiled_addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return tiled_mm(a, b).mul_(alpha).add_(bias, alpha=beta)


def enable_batch_invariance(model_runner: object = None) -> None:
    """Make the bits of a request's logits independent of its batch, in place of SGLang's batch-invariant CUDA mode.

    Matrix products go through fixed tiles. Attention needs nothing: torch_native attends one request at a time. The
    rest is elementwise or reduces within a row. Pictures are encoded one by one (`_encode_one_by_one`), prompts are
    never cut (--chunked-prefill-size -1), requests are never retracted (ENVIRONMENT).
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm", tiled_mm, "CPU")
    library.impl("addmm", _tiled_addmm, "CPU")
    _libraries.append(library)


def _encode_one_by_one(get_image_feature: Callable[..., Tensor], model: torch.nn.Module, items: list) -> Tensor:
    """Encode the pictures of a batch one after the other.

    SGLang would encode them as one sequence under one mask, whose length changes the rounding.
    """
    return torch.cat([get_image_feature(model, [item]) for item in items])


def _register_hooks() -> None:
    """Admit torch_native to deterministic inference, and make it so, through SGLang's own plugin interface."""
    from sglang.srt.arg_groups.choices import (
        add_deterministic_attention_backend_choices,
        add_radix_supported_deterministic_attention_backend_choices,
    )
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_deterministic_attention_backend_choices(["torch_native"])
    add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    deterministic = "--enable-deterministic-inference" in _arguments(sys.argv[1:])
    runner = "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode"
    HookRegistry.register(runner, enable_batch_invariance if deterministic else lambda runner: None, HookType.REPLACE)
    if deterministic:
        encoder = "sglang.srt.models.qwen2_5_vl.Qwen2_5_VLForConditionalGeneration.get_image_feature"
        HookRegistry.register(encoder, _encode_one_by_one, HookType.AROUND)


def _arguments(given: list[str]) -> list[str]:
    """Return the command line with DEFAULTS and SWITCHES added where it says nothing else."""
    without = {"--" + argument.partition("=")[2] for argument in given if argument.startswith("--without=")}
    arguments = [argument for argument in given if not argument.startswith("--without=")]
    named = {argument.partition("=")[0] for argument in arguments}
    for name, value in DEFAULTS.items():
        if name not in named:
            arguments += [name, value]
    return arguments + [switch for switch in SWITCHES if switch not in named and switch not in without]


def main() -> None:
    runpy.run_path(str(Path(__file__).with_name("launcher.py")))["serve"](_arguments(sys.argv[1:]))


if IS_MAIN:
    _install_sgl_kernel()
    _install_torchvision()
    _install_triton()
    _install_log_softmax()
    _register_hooks()

if __name__ == "__main__":
    main()

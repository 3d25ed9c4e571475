"""The environment of a server: made for it, not inherited.

What the caller's shell holds for other purposes would reach the server otherwise: proxies and certificates (its own
warm-up request would go to the proxy), the ranks of a launcher, another project's PYTHONPATH, keys of other services.
"""

from collections.abc import Mapping
from pathlib import Path

from megatron_papo.sglang.compilers import path_of_server

NAMES = {
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "CC", "CXX",
    "CUDA_HOME", "CUDA_PATH", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX",
}  # fmt: skip
PREFIXES = (
    "LC_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "HIP_", "ROCR_", "SGLANG_", "FLASHINFER_", "TRITON_", "TORCH_",
    "TORCHINDUCTOR_", "PYTORCH_", "ATEN_", "OMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "MALLOC_",
)  # fmt: skip
"""What hardware, compilers and SGLang itself are set up with."""
SECRETS = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")
ONE_MACHINE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""The processes of a server on one machine find each other over loopback."""
SEVERAL_MACHINES = ("--nnodes", "--dist-init-addr")
"""SGLang's arguments with which they do not."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Settings of torch's allocator; what gives up GPU memory and gets it back (--enable-memory-saver) refuses to start
with the expandable segments that are good for training."""


def server_environment(caller: Mapping[str, str], temporary: Path, arguments: list[str]) -> dict[str, str]:
    """Return the environment that a server is started with.

    Args:
        caller: the environment of this process.
        temporary: directory for the server's sockets and temporary files.
        arguments: the server's command line: its Python, and what follows.
    """
    kept = {
        name: value
        for name, value in caller.items()
        if (name in NAMES or name.startswith(PREFIXES)) and not name.endswith(SECRETS)
    }
    if "--enable-memory-saver" in arguments:
        kept = {name: value for name, value in kept.items() if name not in ALLOCATOR}
    made = {
        "PATH": path_of_server(Path(arguments[0]), caller),
        "TMPDIR": str(temporary),
        "SGLANG_VLM_CACHE_SIZE_MB": "0",  # ViT outputs survive an update (sgl-project/sglang#36468)
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not any(argument.startswith(SEVERAL_MACHINES) for argument in arguments):
        made |= {**ONE_MACHINE, "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{temporary}/processes"}
    return kept | made

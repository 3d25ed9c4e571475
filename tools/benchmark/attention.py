"""Our attention of a group against the public package prefix-grouper and against one row per response, on the same q, k
and v.

    .venv/bin/python -m tools.benchmark.attention [--group-sizes 5 8] [--prompt-tokens 1000] [--response-tokens 250]

One attention layer, forward and backward, for one prompt and its responses (Prefix Grouper, arXiv 2506.05433):

    ours              model/group_attention.py, one kernel call for the prompt and one per response, no padding
    prefix_grouper    PrefixGrouper.forward of the package (github.com/johncaged/PrefixGrouper): the prompt, then all
                      responses as one batch, padded to the longest
    plain             torch's causal attention of one row per response, the prompt repeated, padded to the longest

Responses have the spread of real ones (tools/benchmark/layout.py) and then, the best case of both that pad, all one
length. The package brings no adapter for torch's attention (its README lists one as planned): here it gets
scaled_dot_product_attention with the causal mask aligned to the lower right, exactly what ours gets; padding needs no
mask then, since it comes last. The package repeats the prompt's keys and values, as ours does. Dropout, rotary
positions and projections are left out: they are not attention's.

Outputs and gradients of the three are compared with each other first; the command fails where they differ by more than
rounding. Times are the best of --repeat, taken in turns (CPU seconds of the process, so that other work does not count;
wall seconds on a GPU or with more threads); peak memory includes q, k and v. The last line is one JSON object. CUDA
where there is a device.
"""

import argparse
import itertools
import json
import os
import random
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run
from tools.benchmark.layout import response_lengths
from tools.benchmark.measure import peak_bytes, seconds_in_turns, shared_machine_clock

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
"""Of a difference, relative to the largest number of its kind: rounding of sums in another order."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[5, 8], metavar="G")
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--response-tokens", type=int, default=250, help="on average")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch on a CPU (default: 1, as each rank trains with)"
    )
    parser.add_argument("--repeat", type=int, default=7, help="measurements of each, the best counts (default 7)")
    return parser.parse_args()


def ours(prompt: int, responses: list[int], heads: int, head_dim: int) -> Callable:
    """-> [s, 1, heads, d], [s, 1, kv heads, d] twice -> [s, heads * d]"""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_papo.model.group_attention import GroupAttention, GroupSegments

    layer = GroupAttention(TransformerConfig(num_layers=1, hidden_size=heads * head_dim, num_attention_heads=heads))
    segments = GroupSegments(qkv_format="sbhd", groups=[(prompt, responses)])
    return lambda query, key, value: layer(query, key, value, None, packed_seq_params=segments)[:, 0]


def prefix_grouper(prompt: int, responses: list[int], device: "torch.device") -> Callable:
    """As `ours`. Raises UserError where the package is missing."""
    import torch.nn.functional as F

    from megatron_papo.model.group_attention import lower_right_masks

    try:
        from prefix_grouper import PrefixGrouper
    except ImportError:
        raise UserError(
            "the package to compare with is missing: pip install --no-deps prefix-grouper==0.0.1.post1"
        ) from None

    grouper = PrefixGrouper([[prompt, *responses]], device=device, padding_mode="right")

    def attend(query: "Tensor", key: "Tensor", value: "Tensor", _padding: object) -> "Tensor":
        """[b, heads, rows, d], [b, kv heads, columns, d] twice -> [b, rows, heads, d], as the package wants it."""
        before = key.shape[2] - query.shape[2]
        mask = lower_right_masks(before, [query.shape[2]], query)[0] if before else None
        gqa = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=gqa)
        return out.transpose(1, 2)

    return lambda *qkv: grouper.forward(attend, *(x.permute(1, 2, 0, 3) for x in qkv))[0].flatten(1)


def plain(query: "Tensor", key: "Tensor", value: "Tensor") -> "Tensor":
    """[b, heads, s, d], [b, kv heads, s, d] twice -> [b, s, heads * d]"""
    import torch.nn.functional as F

    out = F.scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1], is_causal=True)
    return out.transpose(1, 2).flatten(2)


def plain_places(prompt: int, responses: list[int]) -> "Tensor":
    """Where each position of the padded rows of `plain` stands in the row of `ours`: [G, P + longest], -1 on
    padding."""
    import torch

    places = torch.full((len(responses), prompt + max(responses)), -1)
    start = prompt
    for row, length in zip(places, responses):
        row[:prompt] = torch.arange(prompt)
        row[prompt : prompt + length] = torch.arange(start, start + length)
        start += length
    return places


def measure_group(args: argparse.Namespace, responses: list[int], device: "torch.device") -> dict:
    """Differences, seconds and peak bytes of the three on one group."""
    import torch

    torch.manual_seed(0)
    dtype, prompt = getattr(torch, args.dtype), args.prompt_tokens
    tokens = prompt + sum(responses)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(tokens, 1, heads, args.head_dim).to(device, dtype).requires_grad_()

    row = [normal(args.heads), normal(args.kv_heads), normal(args.kv_heads)]
    upstream = torch.randn(tokens, args.heads * args.head_dim).to(device, dtype)
    places = plain_places(prompt, responses).to(device)
    real = places >= 0
    repeats = torch.ones(tokens, device=device)
    repeats[:prompt] = len(responses)  # the copies of a prompt position share its gradient
    rows = [x.detach()[places.clamp(min=0), 0].transpose(1, 2).requires_grad_() for x in row]
    rows_upstream = torch.where(real[..., None], (upstream / repeats[:, None])[places.clamp(min=0)], 0.0).to(dtype)

    def step(attention: Callable, inputs: list[torch.Tensor], gradient: torch.Tensor) -> Callable[[], torch.Tensor]:
        def forward_and_backward() -> torch.Tensor:
            for x in inputs:
                x.grad = None
            out = attention(*inputs)
            out.backward(gradient)
            return out.detach()

        return forward_and_backward

    steps = {
        "ours": step(ours(prompt, responses, args.heads, args.head_dim), row, upstream),
        "prefix_grouper": step(prefix_grouper(prompt, responses, device), row, upstream),
        "plain": step(plain, rows, rows_upstream),
    }
    outputs: dict[str, list[torch.Tensor]] = {}
    gradients: dict[str, list[torch.Tensor]] = {}

    def gradients_of(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [x.grad for x in inputs if x.grad is not None]

    for name, run_step in steps.items():
        out = run_step().float()
        if name == "plain":  # back into one row
            outputs[name] = [torch.zeros(tokens, out.shape[-1], device=device).index_copy_(0, places[real], out[real])]
            of_rows = [gradient.transpose(1, 2)[real].float() for gradient in gradients_of(rows)]
            gradients[name] = [
                torch.zeros(tokens, *x.shape[1:], device=device).index_add_(0, places[real], x) for x in of_rows
            ]
        else:
            outputs[name], gradients[name] = [out], [gradient[:, 0].float().clone() for gradient in gradients_of(row)]
    found: dict[str, Any] = {"group_size": len(responses), "response_tokens": responses}
    for kind, tensors in (("output", outputs), ("gradient", gradients)):
        largest, by_pair = max(x.abs().max().item() for x in tensors["plain"]), differences(tensors)
        found |= {f"max_abs_{kind}": largest, f"max_abs_{kind}_difference": by_pair}
        for names, difference in by_pair.items():
            if not difference <= TOLERANCE[args.dtype] * largest:
                raise UserError(
                    f"{kind}s, {names}: {difference:.1e} (largest {largest:.1e}): the times would compare different"
                    " things"
                )
    found["seconds"] = seconds_in_turns(steps, args.repeat, min, shared_machine_clock())
    found["peak_bytes"] = {}
    for name, run_step in steps.items():
        inputs = rows if name == "plain" else row
        for x in inputs:
            x.grad = None  # the peak must hold the new one
        found["peak_bytes"][name] = peak_bytes(run_step) + sum(x.nbytes for x in inputs)
    for other in ("prefix_grouper", "plain"):
        found[f"time_{other}_over_ours"] = found["seconds"][other] / found["seconds"]["ours"]
        found[f"memory_{other}_over_ours"] = found["peak_bytes"][other] / found["peak_bytes"]["ours"]
    return found


def differences(tensors: dict[str, list]) -> dict[str, float]:
    """The largest difference of each pair of names."""
    return {
        f"{a} - {b}": max((x - y).abs().max().item() for x, y in zip(tensors[a], tensors[b], strict=True))
        for a, b in itertools.combinations(tensors, 2)
    }


def show(found: dict) -> None:
    """Ratios first."""
    shortest, longest = min(found["response_tokens"]), max(found["response_tokens"])
    lengths = f"G {found['group_size']}, responses of {shortest} to {longest} tokens"
    times = ", ".join(f"{other} {found[f'time_{other}_over_ours']:.2f}" for other in ("prefix_grouper", "plain"))
    memory = ", ".join(f"{other} {found[f'memory_{other}_over_ours']:.2f}" for other in ("prefix_grouper", "plain"))
    print(f"{lengths}: time over ours: {times}; peak memory over ours: {memory}")
    seconds = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in found["seconds"].items())
    output, gradient = (max(found[f"max_abs_{kind}_difference"].values()) for kind in ("output", "gradient"))
    print(f"  ms: {seconds}; largest difference: outputs {output:.1e} of {found['max_abs_output']:.1e}, ", end="")
    print(f"gradients {gradient:.1e} of {found['max_abs_gradient']:.1e}", flush=True)


def main() -> None:
    args = parse()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler else announces itself on standard error
    import torch

    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = []
    for size in args.group_sizes:
        for responses in (
            response_lengths(random.Random(0), size, args.response_tokens),
            [args.response_tokens] * size,
        ):
            cases.append(measure_group(args, responses, device))
            show(cases[-1])
    report = {
        key: getattr(args, key)
        for key in ("prompt_tokens", "heads", "kv_heads", "head_dim", "dtype", "threads", "repeat")
    }
    report |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "torch": torch.__version__}
    print(json.dumps({**report, "prefix_grouper": version("prefix-grouper"), "cases": cases}))


if __name__ == "__main__":
    run(main)

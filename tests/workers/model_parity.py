"""Runs under torchrun with 4 processes: many layouts in one process group, each writing logits and gradients for the
test to judge.

    python -m torch.distributed.run --standalone --nproc-per-node 4 tests/workers/model_parity.py DIRECTORY

DIRECTORY holds batch.pt, batch_few.pt, batch_none.pt and, per case "tied"/"untied", a Megatron checkpoint; results go
to DIRECTORY/results.
"""

import dataclasses
import json
import sys
from pathlib import Path

from megatron_papo.run import command_line

LAYOUTS = {  # name -> (checkpoint, tp, pp, sequence parallel, recompute)
    "tp1": ("untied", 1, 1, False, "none"),
    "tp2": ("untied", 2, 1, False, "none"),
    "pp2": ("untied", 1, 2, False, "none"),
    "tp2_pp2": ("untied", 2, 2, False, "none"),
    "tp2_sp": ("untied", 2, 1, True, "none"),
    "tp2_pp2_sp": ("untied", 2, 2, True, "none"),
    "tp4_sp": ("untied", 4, 1, True, "none"),  # more ranks than key-value groups
    "tied_tp1": ("tied", 1, 1, False, "none"),
    "tied_pp2": ("tied", 1, 2, False, "none"),
    "tied_tp2_pp2_sp": ("tied", 2, 2, True, "none"),
    "tp2_pp2_sp_recompute": ("untied", 2, 2, True, "full"),
    "tp1_recompute": ("untied", 1, 1, False, "full"),
}
SPREAD = {  # the same, with the pictures spread over the tensor-parallel ranks; batch: all five of them, two, none
    "tp2_spread": ("untied", 2, 1, False, "none"),
    "tp2_sp_spread": ("untied", 2, 1, True, "none"),
    "tp2_pp2_spread": ("untied", 2, 2, False, "none"),
    "tied_tp2_pp2_sp_spread_recompute": ("tied", 2, 2, True, "full"),
    "tp4_sp_spread": ("untied", 4, 1, True, "none"),
    "tp4_spread_few": ("untied", 4, 1, False, "none"),  # two ranks without a picture
    "tp2_pp2_sp_spread_none": ("untied", 2, 2, True, "none"),
}
WRONG_SPREAD = ["tp2_spread_without_sum", "tp2_sp_spread_without_sum", "tp2_spread_counted_twice"]
"""Negative controls: gradients not summed over the ranks; the gradient norm taken as if every rank had weights of its
own."""
WRONG = ["no_windows", "positions", "swapped_groups"]
"""Negative controls: each must be far from the reference."""


def main() -> None:
    import optimizer_resume
    import torch

    from megatron_papo.distributed import process_groups

    directory = Path(sys.argv[1])
    data = torch.load(directory / "batch.pt")
    results = {}
    for name, (checkpoint, tp, pp, sequence_parallel, recompute) in LAYOUTS.items():
        results[name] = run_layout(directory, name, data, directory / checkpoint, tp, pp, sequence_parallel, recompute)
    for name, (checkpoint, tp, pp, sequence_parallel, recompute) in SPREAD.items():
        batch = torch.load(directory / f"batch_{name.split('_')[-1]}.pt") if name.endswith(("_few", "_none")) else data
        results[name] = run_layout(
            directory, name, batch, directory / checkpoint, tp, pp, sequence_parallel, recompute, "spread"
        )
    for name in WRONG:
        results[name] = run_layout(directory, name, data, directory / "untied", 2, 2, False, "none")
    for name in WRONG_SPREAD:
        results[name] = run_layout(directory, name, data, directory / "untied", 2, 1, "_sp_" in name, "none", "spread")
    for checkpoint in ("tied", "untied"):
        hashes = save_and_load(directory / checkpoint, directory / f"saved_{checkpoint}")
    save_and_load(directory / "untied", directory / "saved_spread", "spread")
    save_and_load(directory / "saved_spread", directory / "saved_after_spread")
    without_mode = tied_pipeline_without_cpu_backend(directory)
    refused = refusals(directory, data)
    resumed = optimizer_resume.run_all(directory, data)
    if process_groups.is_main_rank():
        everything = {
            "parity": results,
            "resume": resumed,
            "without_mode": without_mode,
            "refused": refused,
            "hashes": hashes,
        }
        (directory / "results.json").write_text(json.dumps(everything))
    torch.distributed.barrier()
    process_groups.shutdown()


def run_layout(directory, name, data, checkpoint, tp, pp, sequence_parallel, recompute, vision_tower="sharded") -> dict:
    """One layout: forward and backward of the whole batch in one micro-batch, and an optimizer step of size 0 for the
    gradient norm."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed import process_groups
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.model.qwen2_5_vl import build_model

    sizes = dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, data_parallel_size=4 // (tp * pp))
    process_groups.initialize(ParallelConfig(**sizes, sequence_parallel=sequence_parallel))
    hf = read_hf_config(checkpoint)
    if name == "no_windows":
        hf = dataclasses.replace(
            hf, vision=dataclasses.replace(hf.vision, full_attention_layers=tuple(range(hf.vision.depth)))
        )
    model = build_model(
        hf, dtype=torch.float32, sequence_parallel=sequence_parallel, recompute=recompute, vision_tower=vision_tower
    )
    megatron_files.load_weights(checkpoint, model)
    if name == "swapped_groups":
        swap_groups(model)
    if name.endswith("without_sum"):
        model.config.finalize_model_grads_func = finalize_model_grads
    if name.endswith("counted_twice"):
        for parameter in model.vision_model.parameters():
            parameter.tensor_model_parallel = True
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=0.0, weight_decay=0.0, clip_grad=1e9), [wrapped]
    )
    position_ids = torch.arange(data["input_ids"].shape[1]).expand_as(data["position_ids"])
    if name != "positions":
        position_ids = data["position_ids"]
    kept, calls = {}, []
    model.language_model.decoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def forward_step(_, module):
        logits = module(data["input_ids"], position_ids, data["pixel_values"], data["grids"])
        return logits, lambda output: loss_of(output, data, kept)

    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[wrapped],
        num_microbatches=1,
        seq_length=data["input_ids"].shape[1],
        micro_batch_size=data["input_ids"].shape[0],
        forward_only=False,
    )
    gradients = {key: parameter.main_grad.clone() for key, parameter in model.named_parameters()}
    _, gradient_norm, _ = optimizer.step()
    tower = (
        [value for key, value in gradients.items() if key.startswith("vision_model.")]
        if vision_tower == "spread"
        else []
    )
    all_alike = equal_on_tensor_parallel_ranks(tower)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(gradients[key])
    target = directory / "results" / name
    megatron_files.save(target, model)  # gradients travel home the way weights do
    if process_groups.is_main_rank():
        megatron_files.copy_hf_files(checkpoint, target)
    if (
        process_groups.is_last_stage()
        and process_groups.tp_group().rank() == 0
        and process_groups.dp_group().rank() == 0
    ):
        torch.save(kept, target / "kept.pt")
    torch.distributed.barrier()
    process_groups.destroy()
    return {"gradient_norm": float(gradient_norm), "layer_calls": len(calls), "replicas_equal": all_alike}


def equal_on_tensor_parallel_ranks(tensors) -> bool:
    """Bit for bit."""
    import torch

    from megatron_papo.distributed import process_groups

    flat = torch.cat([torch.zeros(1), *(tensor.flatten() for tensor in tensors)])
    everyone = [torch.empty_like(flat) for _ in range(process_groups.tp_group().size())]
    torch.distributed.all_gather(everyone, flat, group=process_groups.tp_group())
    return all(torch.equal(flat, other) for other in everyone)


def loss_of(logits, data, kept):
    from megatron.core import tensor_parallel

    kept["logits"] = tensor_parallel.gather_from_tensor_model_parallel_region(logits.detach()).clone()
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float().clone(), data["labels"])
    loss = (losses * data["weights"]).sum()
    kept["loss"] = float(loss)
    return loss, {}


def save_and_load(source, target, vision_tower="sharded") -> list:
    """Through TP2 x PP2: load what stage 3 wrote, or this function, save it as training does.

    Returns what save() returned on each rank.
    """
    import torch

    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed import process_groups
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.model.qwen2_5_vl import build_model

    process_groups.initialize(ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2))
    sizes = dict(dtype=torch.float32, sequence_parallel=False, recompute="none")
    model = build_model(read_hf_config(source), **sizes, vision_tower=vision_tower)
    megatron_files.load_weights(source, model)
    hashes = megatron_files.save(target, model)
    if process_groups.is_main_rank():
        megatron_files.copy_hf_files(source, target)
    parts = [None] * process_groups.world_size()
    torch.distributed.all_gather_object(parts, hashes)
    process_groups.destroy()
    return parts


def tied_pipeline_without_cpu_backend(directory) -> str:
    """What megatron-core does to tied embeddings over a pipeline when Tensor.cuda means CUDA."""
    import traceback

    import torch

    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed import cpu_backend, process_groups
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.model.qwen2_5_vl import build_model

    if cpu_backend._mode is None:
        return "not installed"
    process_groups.initialize(ParallelConfig(pipeline_model_parallel_size=2, data_parallel_size=2))
    cpu_backend._mode.__exit__(None, None, None)
    try:
        build_model(read_hf_config(directory / "tied"), dtype=torch.float32, sequence_parallel=False, recompute="none")
        return "ok"
    except (AssertionError, RuntimeError) as error:  # of a CPU build of torch; of a CUDA build without a driver
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        return f"{error} in {', '.join(frames)}"
    finally:
        cpu_backend._mode.__enter__()
        process_groups.destroy()


def refusals(directory, data) -> dict:
    """The messages of inputs that do not fit; and the logits of the text-only row without any pixels."""
    import torch
    from megatron.core import tensor_parallel

    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed import process_groups
    from megatron_papo.errors import UserError
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.model.qwen2_5_vl import build_model

    process_groups.initialize(ParallelConfig(tensor_model_parallel_size=2, data_parallel_size=2))
    hf = read_hf_config(directory / "tied")
    wider = dataclasses.replace(hf, text=dataclasses.replace(hf.text, intermediate_size=96))
    messages = {}
    for name, config, checkpoint in (("missing", hf, "untied"), ("shape", wider, "tied")):
        model = build_model(config, dtype=torch.float32, sequence_parallel=False, recompute="none")
        try:
            megatron_files.load_weights(directory / checkpoint, model)
        except UserError as error:
            messages[name] = str(error)
    try:
        megatron_files.load_optimizer(directory / "tied", model, None)
    except UserError as error:
        messages["no optimizer"] = str(error)
    ids = torch.tensor([[1, 2, hf.image_token_id, 3]])
    positions = torch.zeros(3, 1, 4, dtype=torch.long)
    inputs = {
        "tokens": (torch.zeros(16, 1176), [(1, 4, 4)]),
        "patches": (torch.zeros(3, 1176), [(1, 2, 2)]),
        "no pixels": (None, [(1, 2, 2)]),
    }
    model = build_model(hf, dtype=torch.float32, sequence_parallel=False, recompute="none")
    megatron_files.load_weights(directory / "tied", model)
    with torch.no_grad():
        logits = model(data["input_ids"][2:], data["position_ids"][:, 2:], None, [])
    messages["text only"] = tensor_parallel.gather_from_tensor_model_parallel_region(logits)[0].tolist()
    for name, (pixels, grids) in inputs.items():
        try:
            model(ids, positions, pixels, grids)
        except ValueError as error:
            messages[name] = str(error)
    process_groups.destroy()
    return messages


def swap_groups(model) -> None:
    """What a converter does that concatenates q, k, v instead of interleaving them by group."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model.decoder" in name and "linear_qkv" in name:
                parameter.copy_(parameter.roll(8, 0))


if __name__ == "__main__":
    command_line.run(main)

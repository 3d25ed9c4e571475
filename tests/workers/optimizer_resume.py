"""Part of model_parity.py's torchrun: train, save, train on; resume elsewhere and train as far. Losses go to the
test."""

import shutil

STEPS = 2
WHOLE = {"distrib_optim_sharding_type": "fully_reshardable"}
KINDS = {
    "fp32": ("float32", False, ["tp2_pp2"]),
    "distributed": ("float32", True, ["same", "tp1_pp2"]),
    "bf16": ("bfloat16", False, ["same"]),
    "bf16_distributed": ("bfloat16", True, ["tp1_pp2"]),
}
"""Name -> (dtype, DistributedOptimizer, layouts to resume in)."""
SAVED = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=1, data_parallel_size=2)
RESUMED = {
    "same": SAVED,
    "tp1_pp2": dict(tensor_model_parallel_size=1, pipeline_model_parallel_size=2, data_parallel_size=2),
    "tp2_pp2": dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, data_parallel_size=1),
    "tp1": dict(data_parallel_size=4),
    "pp4": dict(pipeline_model_parallel_size=4),
    "spread": dict(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=1, data_parallel_size=2, vision_tower="spread"
    ),
}
MOVED = {
    "fp32": ("float32", False, "tp2_pp2", ["tp1", "pp4", "tp1_pp2", "spread"]),
    "bf16_distributed": ("bfloat16", True, "tp2_pp2", ["tp1", "pp4", "tp1_pp2", "spread"]),
    "spread": ("float32", False, "spread", ["tp2_pp2"]),
    "spread_distributed": ("float32", True, "spread", ["tp1_pp2", "spread"]),
}
"""Name -> (dtype, DistributedOptimizer, layout saved in, layouts to resume in: with one, four and two times the
data-parallel size, ...)."""


def run_all(directory, data) -> dict:
    """Kind -> {"whole": losses of 2 * STEPS steps, layout: losses of the last STEPS after resuming, "fresh": without
    optimizer state}.

    moved_KIND: the same for the runs of MOVED; what each layout has loaded is saved again, before it steps, beside the
    first.
    """
    results = {}
    for kind, (dtype, distributed, layouts) in KINDS.items():
        path = directory / f"resume_{kind}"
        shutil.rmtree(path, ignore_errors=True)
        results[kind] = {"whole": whole_run(directory / "tied", path, data, SAVED, dtype, distributed)}
        for name in layouts:
            results[kind][name] = resumed_run(path, data, RESUMED[name], dtype, distributed, with_optimizer=True)
        if kind == "distributed":
            results[kind]["fresh"] = resumed_run(path, data, SAVED, dtype, distributed, with_optimizer=False)
    for kind, (dtype, distributed, saved_in, layouts) in MOVED.items():
        path = directory / f"moved_{kind}"
        results[path.name] = {"whole": whole_run(directory / "tied", path, data, RESUMED[saved_in], dtype, distributed)}
        for name in layouts:
            again = directory / f"moved_{kind}_{name}"
            results[path.name][name] = resumed_run(
                path, data, RESUMED[name], dtype, distributed, with_optimizer=True, save_to=again
            )
    results["megatron-core"] = against_megatron_core(directory / "tied", directory, data)
    return results


def whole_run(converted, path, data, layout, dtype, distributed) -> list[float]:
    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.distributed import process_groups

    model, wrapped, optimizer = build(converted, layout, dtype, distributed)
    optimizer.reload_model_params()
    losses = [step(wrapped, optimizer, data) for _ in range(STEPS)]
    megatron_files.save(path, model, optimizer, state={"step": STEPS, "order": [3, 1, 2]})
    if process_groups.is_main_rank():
        megatron_files.copy_hf_files(converted, path)
    losses += [step(wrapped, optimizer, data) for _ in range(STEPS)]
    process_groups.destroy()
    return losses


def resumed_run(path, data, layout, dtype, distributed, with_optimizer, save_to=None) -> list[float]:
    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.distributed import process_groups

    model, wrapped, optimizer = build(path, layout, dtype, distributed)
    if with_optimizer:
        state = megatron_files.load_optimizer(path, model, optimizer)
        if state != {"step": STEPS, "order": [3, 1, 2]}:
            raise RuntimeError(f"state came back as {state}")
        if save_to is not None:
            megatron_files.save(save_to, model, optimizer, state=state)
    else:
        optimizer.reload_model_params()
    losses = [step(wrapped, optimizer, data) for _ in range(STEPS)]
    process_groups.destroy()
    return losses


def against_megatron_core(converted, directory, data) -> dict:
    """DistributedOptimizer's state at TP2 x DP2 through megatron-core's own save and load, which gather it whole, and
    through ours.

    Returns which state came back bit for bit: ours read by megatron-core's loader in another layout, and what
    megatron-core wrote read by ours; and, as a control, whether the state before loading was the same already.
    """
    import torch
    from megatron.core import dist_checkpointing

    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.distributed import process_groups

    ours, theirs, equal = directory / "boxes_ours", directory / "boxes_theirs", {}
    model, wrapped, optimizer = build(converted, SAVED, "bfloat16", True)
    optimizer.reload_model_params()
    for _ in range(STEPS):
        step(wrapped, optimizer, data)
    megatron_files.save(ours, model, optimizer, state={"step": STEPS})
    equal |= from_a_thread(directory, ours, model, optimizer)
    tree = {"model": model.sharded_state_dict(metadata=_groups())}
    tree["optimizer"] = optimizer.sharded_state_dict(tree["model"], metadata=WHOLE)
    if process_groups.is_main_rank():
        theirs.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(tree, str(theirs), sharded_strategy=_plain_save())
    expected = _state(optimizer)
    process_groups.destroy()

    model, _, optimizer = build(converted, SAVED, "bfloat16", True)
    megatron_files.load_optimizer(theirs, model, optimizer)
    equal["theirs by ours"] = _equal(_state(optimizer), expected)
    process_groups.destroy()

    model, _, optimizer = build(converted, RESUMED["tp1_pp2"], "bfloat16", True)
    megatron_files.load_optimizer(ours, model, optimizer)
    expected = _state(optimizer)
    process_groups.destroy()
    model, wrapped, optimizer = build(converted, RESUMED["tp1_pp2"], "bfloat16", True)
    optimizer.reload_model_params()
    step(wrapped, optimizer, data)  # so that every state is there
    equal["before"] = _equal(_state(optimizer), expected)
    tree = optimizer.sharded_state_dict(model.sharded_state_dict(metadata=_groups()), is_loading=True, metadata=WHOLE)
    loaded = dist_checkpointing.load({"optimizer": tree}, str(ours))["optimizer"]["param_state"]
    [part] = optimizer.chained_optimizers
    steps = {parameter: state.pop("step") for parameter, state in part.optimizer.state.items()}
    part.load_parameter_state_from_fully_reshardable(loaded)
    for parameter, value in steps.items():
        part.optimizer.state[parameter]["step"] = value
    equal["ours by theirs"] = _equal(_state(optimizer), expected)
    process_groups.destroy()
    return equal


def from_a_thread(directory, expected, model, optimizer) -> dict:
    """Whether a save that is begun, and finished later, makes the same bytes; what it holds of the model meanwhile and
    afterwards; and what all ranks say where one cannot write."""
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.distributed import process_groups
    from megatron_papo.errors import UserError

    begun, refused = directory / "begun", directory / "refused"
    save = megatron_files.Save(begun, model, optimizer, {"step": STEPS})
    held = [sum(isinstance(value, ShardedTensor) for value in nested_values(vars(save)))]
    save.begin()
    save.finish()
    held.append(sum(isinstance(value, ShardedTensor) for value in nested_values(vars(save))))
    torch.distributed.barrier()
    names = sorted(path.name for path in expected.iterdir())
    same = names == sorted(path.name for path in begun.iterdir())
    same = same and all((expected / name).read_bytes() == (begun / name).read_bytes() for name in names)
    if process_groups.is_main_rank():
        (refused / "__1_0.distcp").mkdir(parents=True)  # where rank 1 wants to make a file
    torch.distributed.barrier()
    save, message = megatron_files.Save(refused, model, optimizer, {}), ""
    save.begin()
    try:
        save.finish()
    except UserError as error:
        message = str(error)
    messages = [message] * process_groups.world_size()
    torch.distributed.all_gather_object(messages, message)
    return {"begun": same, "held": held, "refused": messages}


def _groups() -> dict:
    from megatron.core import parallel_state

    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _plain_save():
    """megatron-core's format by PyTorch's own writer; megatron-core's starts processes."""
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from torch.distributed.checkpoint import FileSystemWriter, save

    class PlainSave(strategies.TorchDistSaveShardedStrategy):
        def save(self, sharded_state_dict, checkpoint_dir):
            flat, *_ = strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
            planner = strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
            tensors = strategies.mcore_to_pyt_state_dict(flat, False)
            save(tensors, storage_writer=FileSystemWriter(checkpoint_dir), planner=planner)

    return PlainSave("torch_dist", 1)


def _state(optimizer) -> list:
    """Main parameters and moments that this rank owns."""
    [part] = optimizer.chained_optimizers
    return [
        tensor.detach().clone()
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        for tensor in (parameter, *(part.optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")))
    ]


def _equal(state, expected) -> bool:
    """On all ranks."""
    import torch

    same = len(state) == len(expected) and all(torch.equal(a, b) for a, b in zip(state, expected))
    everywhere = torch.tensor(int(same and len(state) > 0))
    torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MIN)
    return bool(everywhere)


def build(checkpoint, layout, dtype, distributed):
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_papo.checkpoint import megatron_files
    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed import process_groups
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.model.qwen2_5_vl import build_model

    process_groups.initialize(ParallelConfig(**layout))
    options = dict(sequence_parallel=False, recompute="none", vision_tower=layout.get("vision_tower", "sharded"))
    model = build_model(read_hf_config(checkpoint), dtype=getattr(torch, dtype), **options)
    megatron_files.load_weights(checkpoint, model)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    wrapped = DistributedDataParallel(model.config, settings, model)
    options = dict(
        lr=3e-3, weight_decay=0.01, clip_grad=1.0, bf16=dtype == "bfloat16", params_dtype=getattr(torch, dtype)
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", use_distributed_optimizer=distributed, **options), [wrapped]
    )
    return model, wrapped, optimizer


def step(wrapped, optimizer, data) -> float:
    """One update; the loss before it, on every rank."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_papo.distributed import process_groups

    def loss_of(logits):
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float().clone(), data["labels"])
        loss = (losses * data["weights"]).sum()
        return loss, {"loss": loss.detach().clone()}

    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    done = get_forward_backward_func()(
        forward_step_func=lambda _, module: (
            module(data["input_ids"], data["position_ids"], data["pixel_values"], data["grids"]),
            loss_of,
        ),
        data_iterator=None,
        model=[wrapped],
        num_microbatches=1,
        seq_length=data["input_ids"].shape[1],
        micro_batch_size=data["input_ids"].shape[0],
        forward_only=False,
    )
    optimizer.step()
    loss = torch.tensor(float(done[0]["loss"]) if done else float("-inf"))
    torch.distributed.all_reduce(loss, op=torch.distributed.ReduceOp.MAX)
    assert process_groups.world_size() == 4
    return float(loss)

"""Run under torchrun: one PAPO optimizer step in many layouts; writes log-probs, metrics and the gradient (as a
Megatron checkpoint).

torchrun --nproc-per-node 4 training_worker.py WORK   (WORK/cases.json: see tests/training/test_papo_step.py)
"""

import json
import sys
from pathlib import Path

import torch

from megatron_papo.checkpoint import megatron_files
from megatron_papo.config_files import load_config
from megatron_papo.distributed import collectives, process_groups
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.model.qwen2_5_vl import build_model
from megatron_papo.objective.papo_loss import finish_metrics
from megatron_papo.run.command_line import run
from megatron_papo.run.records import Rollout, read_jsonl
from megatron_papo.training.collator import Collator
from megatron_papo.training.encoded_pictures import EncodedPictures
from megatron_papo.training.forward_step import PassSettings, papo_step, sweep
from megatron_papo.training.loss_recipe import loss_recipe
from megatron_papo.training.optimizer import build_optimizer
from megatron_papo.training.passes import split_into_steps
from megatron_papo.training.rows import make_rows
from megatron_papo.training.weighing import sensitivities, weigh


def run_case(work: Path, case: dict) -> None:
    config = load_config(work / "config.yaml", case["overrides"])
    process_groups.initialize(config.parallel)
    hf = read_hf_config(work / "policy")
    rollouts = read_jsonl(work / "rollouts.jsonl", Rollout)
    rows = make_rows(rollouts, case["advantages"], work / "data", config, hf, work / "rollouts.jsonl")
    ranks = process_groups.dp_group()
    [step] = split_into_steps(rows, config, ranks.rank(), ranks.size())
    mine = step.own
    layout = config.parallel
    model = build_model(
        hf,
        dtype=torch.float32,
        sequence_parallel=layout.sequence_parallel,
        recompute=config.model.recompute,
        vision_tower=layout.vision_tower,
        frozen=config.model.freeze,
    )
    encoded = None
    if "vision_tower" in config.model.freeze:
        encoded = EncodedPictures(lambda patches, grid: model.vision_model.encode(patches, grid), 1 << 20)
    collator = Collator(
        config,
        hf,
        work / "data",
        with_pixels=process_groups.is_first_stage(),
        device=process_groups.device(),
        dtype=torch.float32,
        encoded=encoded,
    )
    sweep_settings = PassSettings(config.training.log_prob_micro_batch_size, config.rollout.temperature)

    def load(name):
        megatron_files.load_weights(work / f"{name}_megatron", model)
        if encoded is not None:
            encoded.forget()

    def swept(name, kind="original"):
        load(name)
        return sweep(model, collator, mine, sweep_settings, [kind])[kind]

    cached = {"ref_log_probs": swept("reference").log_probs, "old_log_probs": swept("old").log_probs}
    if not config.objective.masked_rows_ride:
        masked = swept("old" if config.objective.masked_branch == "cached" else "policy", "masked")
        cached |= {"masked_image_log_probs": masked.log_probs, "masked_image_entropy": masked.entropy}
    if config.objective.weighs_tokens:
        policy = "old" if config.objective.sensitivity.weights == "old" else "policy"
        pairs = config.objective.sensitivity.needs_both_logits
        seen = {kind: swept(policy, kind) for kind in (["both"] if pairs else ["original", "masked"])}
        values = {"sensitivity": sensitivities(config.objective, mine, seen)}
        if config.objective.uses_step_entropy:
            values["entropy"] = swept("policy").entropy
        cached |= weigh(config.objective, step.all, step.places, values)
    if process_groups.is_last_stage():
        cached["rollout_log_probs"] = [torch.tensor(row.rollout.rollout_log_probs) for row in mine]
    load("policy")
    wrapped, optimizer = build_optimizer(model, config.optimizer, torch.float32)
    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    if case.get("one_step"):
        del cached["old_log_probs"]
    settings = PassSettings(config.training.micro_batch_size, config.rollout.temperature)
    recipe = loss_recipe(config.objective, case["step"])
    metrics, _ = papo_step(wrapped, collator, mine, cached, settings, recipe, step.denominators)
    metrics = finish_metrics(collectives.sum_from_last_stage(metrics))
    output = work / case["name"]
    output.mkdir(exist_ok=True)
    if process_groups.is_main_rank():
        (output / "metrics.json").write_text(json.dumps(metrics))
    if collectives.is_reporting_rank() and process_groups.dp_group().size() == 1:
        (output / "log_probs.json").write_text(
            json.dumps({name: [v.tolist() for v in values] for name, values in cached.items()})
        )
    gradients = [
        parameter.main_grad.clone() if parameter.requires_grad else torch.zeros_like(parameter)
        for parameter in model.parameters()
    ]
    if case.get("is_saved"):
        optimizer.step()
        megatron_files.save(output / "trained", wrapped, optimizer, {"step": 1})
        if process_groups.is_main_rank():
            megatron_files.copy_hf_files(work / "policy_megatron", output / "trained")
        collectives.barrier()
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.copy_(gradient)
    if process_groups.is_main_rank():
        (output / "gradient").mkdir()
    collectives.barrier()
    megatron_files.save(output / "gradient", model)
    if process_groups.is_main_rank():
        megatron_files.copy_hf_files(work / "policy_megatron", output / "gradient")
    collectives.barrier()
    process_groups.destroy()


def resume(work: Path, case: dict) -> None:
    """Load what another case has saved, and save it again."""
    config = load_config(work / "config.yaml", case["overrides"])
    process_groups.initialize(config.parallel)
    trained = work / case["resumes"] / "trained"
    model = build_model(
        read_hf_config(work / "policy"),
        dtype=torch.float32,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.model.recompute,
        frozen=config.model.freeze,
    )
    megatron_files.load_weights(trained, model)
    wrapped, optimizer = build_optimizer(model, config.optimizer, torch.float32)
    state = megatron_files.load_optimizer(trained, model, optimizer)
    megatron_files.save(work / case["name"], wrapped, optimizer, state)
    process_groups.destroy()


def main() -> None:
    work = Path(sys.argv[1])
    for case in json.loads((work / "cases.json").read_text()):
        if "resumes" in case:
            resume(work, case)
        else:
            run_case(work, case)
    process_groups.shutdown()


if __name__ == "__main__":
    run(main)

"""One optimizer step of PAPO through the product's batching, pipeline and loss against transformers in float64 and a loop over tokens.

One process group of four ranks runs every layout, micro-batch size and average. NOT covered here: bf16, more than one step.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_papo import images
from megatron_papo.checkpoint import convert
from megatron_papo.objective.advantages import ADVANTAGES
from megatron_papo.objective.image_masking import black_squares, blacken
from megatron_papo.records import Rewards, Rollout, write_jsonl
from megatron_papo.seeds import derive_seed
from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "objective"))
from naive import naive_papo_loss  # noqa: E402

GROUP, TEMPERATURE = 3, 0.7
PIXELS = dict(min_pixels=3136, max_pixels=50176)
PICTURES = {"a.png": (56, 56), "b.png": (100, 60), "c.png": (140, 112), "d.png": (75, 300)}
PROMPTS = [["a.png"], ["b.png", "c.png"], [], ["d.png"]]
LENGTHS = [3, 7, 1, 2, 5, 0, 4, 1, 6, 2, 2, 5]
LAYOUTS = {"dp4": (1, 1, 4, False), "tp2dp2": (2, 1, 2, True), "pp2dp2": (1, 2, 2, False), "tp2pp2": (2, 2, 1, False), "tp2pp2sp": (2, 2, 1, True), "pp4": (1, 4, 1, False)}
SIZES = TinySizes(hidden_size=48, intermediate_size=80, num_layers=4, num_heads=4, num_kv_heads=2, vision_hidden_size=32, vision_intermediate_size=72,
                  vision_depth=3, vision_heads=2, tied=False, initializer_range=0.15, random_biases_and_norms=True)  # fmt: skip


def perturb(source: Path, target: Path, seed: int, spread: float) -> None:
    """A neighbouring policy: the same files, weights moved a little."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    tensors = {k: v + spread * torch.randn(v.shape, generator=generator) for k, v in load_file(source / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def make_rollouts(config: dict) -> list[Rollout]:
    rng, records = random.Random(5), []
    for group, names in enumerate(PROMPTS):
        pads = [config["vision_start_token_id"], config["image_token_id"], config["vision_end_token_id"]]
        prompt = [rng.randrange(100) for _ in range(4)] + pads * len(names) + [rng.randrange(100) for _ in range(3 + group)]
        tokens = sum(images.num_image_tokens(images.grid_of(images.resize(Image.new("RGB", PICTURES[n]), **PIXELS))) for n in names)
        for sample in range(GROUP):
            length = LENGTHS[group * GROUP + sample]
            records.append(
                Rollout(
                    prompt_id=f"p{group}", iteration=1, epoch=0, group=group, sample=sample, answer="1", prompt_token_ids=prompt,
                    prompt_num_tokens=len(prompt) - len(names) + tokens, images=names,
                    response_token_ids=[rng.randrange(300) for _ in range(length)], rollout_log_probs=[0.0] * length, text="",
                    finish_reason="stop", rewards=Rewards(overall=rng.choice([0.0, 0.1, 0.9, 1.0]), accuracy=0, format=0),
                    temperature=TEMPERATURE, top_p=1.0, sampling_seed=0, masked_image_seed=derive_seed(7, group), weight_version="w",
                )  # fmt: skip
            )
    return records


def make_cases() -> list[dict]:
    cases = []
    for name, (tp, pp, dp, sequence) in LAYOUTS.items():
        layout = [f"parallel.{k}={v}" for k, v in zip(("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size"), (tp, pp, dp))]
        for micro, average in ((1, "token"), (5, "sequence")) if name in ("dp4", "tp2pp2sp") else ((3, "token"),):
            cases.append(
                {
                    "name": f"{name}-{micro}-{average}",
                    "average": average,
                    "overrides": [*layout, f"parallel.sequence_parallel={str(sequence).lower()}", f"training.micro_batch_size={micro}",
                                  f"training.log_prob_micro_batch_size={micro + 1}", f"objective.average={average}"],
                }  # fmt: skip
            )
    return cases


CASES = make_cases()
SETTINGS = [
    f"rollout.temperature={TEMPERATURE}", f"rollout.group_size={GROUP}", "rollout.rollout_batch_size=4", "training.global_batch_size=4",
    "objective.kl_ref_coef=0.3", "objective.kl_prcp_coef=0.2", "objective.entropy_coef=0.05", "objective.masked_image_entropy_coef=0.07",
]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Runs the worker once; -> its directory."""
    work = tmp_path_factory.mktemp("papo_step")
    make_tiny_model(work / "policy", seed=11, sizes=SIZES)
    perturb(work / "policy", work / "old", 1, 0.004)
    perturb(work / "policy", work / "reference", 2, 0.01)
    for name in ("policy", "old", "reference"):
        (work / f"{name}_megatron").mkdir()
        convert.hf_to_megatron(convert.HFCheckpoint(work / name), work / f"{name}_megatron")
    (work / "data").mkdir()
    rng = random.Random(3)
    for name, size in PICTURES.items():
        Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3)).save(work / "data" / name)
    rollouts = make_rollouts(json.loads((work / "policy" / "config.json").read_text()))
    write_jsonl(work / "rollouts.jsonl", rollouts)
    rewards = torch.tensor([r.rewards.overall for r in rollouts]).view(-1, GROUP)
    advantages = ADVANTAGES["grpo"](rewards).flatten().tolist()
    (work / "cases.json").write_text(json.dumps([case | {"advantages": advantages, "overrides": SETTINGS + case["overrides"]} for case in CASES]))
    (work / "config.yaml").write_text((ROOT / "configs" / "demo.yaml").read_text())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(ROOT / "tests/workers/training_worker.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, str(work)], env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-6000:]
    return work


def expected_log_probs(model, rollout: Rollout, data: Path, masked: bool) -> torch.Tensor:
    """Of one rollout by transformers in the model's dtype, one row at a time, its own positions from its own get_rope_index."""
    pictures = []
    for number, name in enumerate(rollout.images):
        picture = images.resize(images.open_image(data, name), **PIXELS)
        if masked:
            seed = derive_seed(rollout.masked_image_seed, number)
            picture = blacken(picture, black_squares(picture.size, strategy="random", ratio=0.6, square_pixels=14, seed=seed), 14)
        pictures.append(picture)
    ids, remaining = [], iter(pictures)
    for token in rollout.prompt_token_ids:
        repeat = images.num_image_tokens(images.grid_of(next(remaining))) if token == model.config.image_token_id else 1
        ids += [token] * repeat
    start = len(ids)
    ids = torch.tensor([ids + rollout.response_token_ids])
    vision = {}
    if pictures:
        vision["pixel_values"] = torch.cat([torch.from_numpy(images.to_patches(p)) for p in pictures]).to(model.dtype)
        vision["image_grid_thw"] = torch.tensor([images.grid_of(p) for p in pictures])
    kinds = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids), **vision).logits[0, start - 1 : -1]
    return torch.log_softmax(logits / TEMPERATURE, -1).gather(-1, ids[0, start:, None])[:, 0]


def load_double(directory: Path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).double().eval()


@pytest.fixture(scope="module")
def reference(work):
    """Per average: loss metrics and the gradient by official tensor name; and the cached log-probs."""
    from megatron_papo.checkpoint.name_map import disk_name
    from megatron_papo.records import read_jsonl

    rollouts = read_jsonl(work / "rollouts.jsonl", Rollout)
    advantages = json.loads((work / "cases.json").read_text())[0]["advantages"]
    with torch.no_grad():
        old_model, ref_model = load_double(work / "old"), load_double(work / "reference")
        old = [expected_log_probs(old_model, r, work / "data", False) for r in rollouts]
        masked = [expected_log_probs(old_model, r, work / "data", True) for r in rollouts]
        ref = [expected_log_probs(ref_model, r, work / "data", False) for r in rollouts]
    found = {"old_log_probs": old, "masked_image_log_probs": masked, "ref_log_probs": ref}
    model = load_double(work / "policy")
    for average in ("token", "sequence"):
        model.zero_grad()
        rows = [
            {"advantage": a, "log_probs": list(expected_log_probs(model, r, work / "data", False)), "old": o.tolist(), "ref": f.tolist(), "masked": m.tolist()}
            for r, a, o, f, m in zip(rollouts, advantages, old, ref, masked)
        ]  # fmt: skip
        loss, metrics = naive_papo_loss(rows, average=average, low=0.2, high=0.3, dual=3.0, beta=0.3, gamma=0.2, eta_1=0.05, eta_2=0.07)
        loss.backward()
        gradient = {disk_name(name): p.grad.clone() for name, p in model.named_parameters()}
        found[average] = {name: float(value) for name, value in metrics.items()}, gradient
        found[f"{average}_ratios"] = [float((lp - o).detach().exp()) for row, o in zip(rows, old) for lp, o in zip(row["log_probs"], o)]
        found[f"{average}_micro_batch_mean"] = sum(
            float(naive_papo_loss(rows[i : i + 2], average=average, low=0.2, high=0.3, dual=3.0, beta=0.3, gamma=0.2, eta_1=0.05, eta_2=0.07)[0])
            for i in range(0, len(rows), 2)
        ) / (len(rows) / 2)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_metrics_equal_the_loop_over_tokens(work, reference, case):
    metrics = json.loads((work / case["name"] / "metrics.json").read_text())
    expected = reference[case["average"]][0]
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name  # fp32 log-probs of ~20 layers' worth of sums


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_gradient_equals_transformers(work, reference, case, tmp_path):
    tmp_path.joinpath("hf").mkdir()
    convert.megatron_to_hf(convert.MegatronCheckpoint(work / case["name"] / "gradient"), tmp_path / "hf")
    got = load_file(tmp_path / "hf" / "model.safetensors")
    expected = reference[case["average"]][1]
    assert got.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    worst = {name: float((got[name].double() - expected[name]).abs().max()) / scale for name in expected}
    assert max(worst.values()) < 2e-5, sorted(worst.items(), key=lambda row: -row[1])[:5]
    other = reference["sequence" if case["average"] == "token" else "token"][1]
    assert max(float((got[name].double() - other[name]).abs().max()) / scale for name in expected) > 1e-2


@pytest.mark.parametrize("name", ["tp2pp2-3-token", "tp2pp2sp-5-sequence", "pp4-3-token"])
def test_cached_log_probs_equal_transformers(work, reference, name):
    got = json.loads((work / name / "log_probs.json").read_text())
    for kind in ("old_log_probs", "ref_log_probs", "masked_image_log_probs"):
        for ours, theirs in zip(got[kind], reference[kind], strict=True):
            torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs, rtol=0, atol=2e-5)
    spread = [float((m - o).abs().max()) for m, o in zip(reference["masked_image_log_probs"], reference["old_log_probs"]) if len(o)]
    assert max(spread) > 1e-2  # the masked picture matters, so a mask that masks nothing would be seen
    assert spread[5] < 1e-9 and spread[6] < 1e-9  # text-only group


def test_the_example_is_a_hard_one(reference):
    """Both clips are hit, and a mean of micro-batch means is far from the true mean: the invariance above can fail."""
    ratios = reference["token_ratios"]
    assert min(ratios) < 0.8 and max(ratios) > 1.3
    for average in ("token", "sequence"):
        assert abs(reference[f"{average}_micro_batch_mean"] - reference[average][0]["loss"]) > 1e-3

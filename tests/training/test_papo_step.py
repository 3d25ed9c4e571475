"""One optimizer step of PAPO through the product's batching, pipeline and loss against transformers in float64 and a
loop over tokens.

One process group of four ranks runs every layout, micro-batch size and average. NOT covered here: bf16, more than one
step.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_papo.checkpoint import convert
from megatron_papo.checkpoint.name_map import disk_name
from megatron_papo.checkpoint.torch_dist_files import TorchDistCheckpoint
from megatron_papo.objective.advantages import advantages_of
from megatron_papo.pictures import preprocess
from megatron_papo.pictures.masking import black_squares, blacken
from megatron_papo.run.records import Rewards, Rollout, read_jsonl, write_jsonl
from megatron_papo.seeds import derive_seed
from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model
from tests.objective import naive_weights
from tests.objective.naive import naive_papo_loss

ROOT = Path(__file__).parent.parent.parent

GROUP, TEMPERATURE = 3, 0.7
PIXELS = preprocess.PictureSettings(min_pixels=3136, max_pixels=50176)
PICTURES = {"a.png": (56, 56), "b.png": (100, 60), "c.png": (140, 112), "d.png": (75, 300)}
PROMPTS = [["a.png"], ["b.png", "c.png"], [], ["d.png"]]
LENGTHS = [3, 7, 1, 2, 5, 0, 4, 1, 6, 2, 2, 5]
LAYOUTS = {
    "dp4": (1, 1, 4, False),
    "tp2dp2": (2, 1, 2, True),
    "pp2dp2": (1, 2, 2, False),
    "tp2pp2": (2, 2, 1, False),
    "tp2pp2sp": (2, 2, 1, True),
    "pp4": (1, 4, 1, False),
}
SIZES = TinySizes(
    hidden_size=48,
    intermediate_size=80,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    vision_hidden_size=32,
    vision_intermediate_size=72,
    vision_depth=3,
    vision_heads=2,
    tied=False,
    initializer_range=0.15,
    random_biases_and_norms=True,
)


def perturb(source: Path, target: Path, seed: int, spread: float) -> None:
    """A neighbouring policy: the same files, weights moved a little."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        k: v + spread * torch.randn(v.shape, generator=generator)
        for k, v in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def make_rollouts(config: dict) -> list[Rollout]:
    rng, records = random.Random(5), []
    for group, names in enumerate(PROMPTS):
        pads = [config["vision_start_token_id"], config["image_token_id"], config["vision_end_token_id"]]
        prompt = (
            [rng.randrange(100) for _ in range(4)] + pads * len(names) + [rng.randrange(100) for _ in range(3 + group)]
        )
        tokens = sum(
            preprocess.num_image_tokens(preprocess.grid_of(preprocess.resize(Image.new("RGB", PICTURES[n]), PIXELS)))
            for n in names
        )
        for sample in range(GROUP):
            length = LENGTHS[group * GROUP + sample]
            records.append(
                Rollout(
                    prompt_id=f"p{group}",
                    iteration=1,
                    epoch=0,
                    group=group,
                    sample=sample,
                    answer="1",
                    prompt_token_ids=prompt,
                    prompt_num_tokens=len(prompt) - len(names) + tokens,
                    images=names,
                    response_token_ids=[rng.randrange(300) for _ in range(length)],
                    rollout_log_probs=[-6 + rng.random() for _ in range(length)],
                    text="",
                    finish_reason="length" if length == 6 else "stop",
                    rewards=Rewards(overall=rng.choice([0.0, 0.1, 0.9, 1.0]), accuracy=sample % 2, format=0),
                    temperature=TEMPERATURE,
                    top_p=1.0,
                    sampling_seed=0,
                    masked_image_seed=derive_seed(7, group),
                    weight_version="w",
                )  # fmt: skip
            )
    return records


@dataclass(frozen=True)
class Objective:
    """One objective: how the configuration says it, and how naive_papo_loss does."""

    overrides: list[str]
    options: dict
    masked: str = "cached"
    """Which policy the masked branch is of, and whether gradient flows: objective.masked_branch."""
    filtered: bool = False
    """Cut-off rollouts do not count."""
    one_step: bool = False
    """The policy is its own old policy, whose log-probs nobody computes."""
    weigh: Callable[[list[dict]], None] = lambda rows: None
    """Gives the rows of naive_papo_loss the weights of their tokens."""


def floats(row: dict, kind: str) -> list[float]:
    return [float(torch.as_tensor(x).detach()) for x in row[kind]]


def weigh_as_vppo(rows: list[dict]) -> None:
    """By the old policy: 40 % of each response, and the trajectory's factor."""
    s = [[naive_weights.k3(p, q) for p, q in zip(floats(row, "old"), floats(row, "masked"))] for row in rows]
    of_tokens = naive_weights.selection(s, None, (4, None))
    for row, weights, factor in zip(rows, of_tokens, naive_weights.trajectory(s, 0.8)):
        row["weights"] = [w * factor for w in weights]


def weigh_by_step(rows: list[dict]) -> None:
    """By the policy that is trained: the entropy gap and the entropy of all tokens of the step."""
    kinds = ("entropy", "masked_entropy")
    tokens = [[dict(zip(kinds, of_token)) for of_token in zip(*(floats(row, kind) for kind in kinds))] for row in rows]
    for of_row in tokens:
        for token in of_row:  # a text has no gap but rounding
            if abs(token["entropy"] - token["masked_entropy"]) < 1e-12:
                token["masked_entropy"] = token["entropy"]
            token |= {"log_probs": 0.0, "masked": 0.0}
    gaps = [naive_weights.sensitivities("entropy_gap", of_row) for of_row in tokens]
    entropy = [[token["entropy"] for token in of_row] for of_row in tokens]
    of_policy = naive_weights.selection(gaps, entropy, (3, 2), per="step", only=0.5, renormalise=True)
    of_kl = naive_weights.selection(gaps, None, (5, None))
    for row, weights, kl_weights in zip(rows, of_policy, of_kl):
        row |= {"weights": weights, "kl_weights": kl_weights}


def weigh_as_vepo(rows: list[dict]) -> None:
    """By the policy that is trained: 40 % of each response by VEPO's score; of a text the first ones."""
    scores = [
        [0.0] * len(row["jsd"])
        if row["is_text"]
        else naive_weights.vepo_scores(floats(row, "entropy"), floats(row, "masked_entropy"), floats(row, "jsd"))
        for row in rows
    ]
    for row, weights in zip(rows, naive_weights.selection(scores, None, (4, None), renormalise=True)):
        row["weights"] = weights


def weigh_as_cppo(rows: list[dict]) -> None:
    """The contrasted tokens: half of those with a gap, by the policy that is trained, of positive advantage."""
    for row in rows:
        entropies = zip(floats(row, "entropy"), floats(row, "masked_entropy"))
        gaps = [max(q - p, 0.0) / (q + 1e-6) if abs(q - p) > 1e-12 else 0.0 for p, q in entropies]
        row["contrasted"] = [x and row["advantage"] > 0 for x in naive_weights.detected(gaps, 5)]


COEFFICIENTS = dict(beta=0.3, gamma=0.2, eta_1=0.05, eta_2=0.07)
OBJECTIVES = {
    "token": Objective([], COEFFICIENTS),
    "sequence": Objective(["average=sequence"], COEFFICIENTS | dict(average="sequence")),
    "paper": Objective(
        [
            "masked_branch=recompute_with_grad",
            "kl_prcp_estimator=exact",
            "entropy_estimator=exact",
            "sft_coef=0.1",
            "overlong_filtering=true",
        ],
        COEFFICIENTS | dict(estimator="exact", exact_entropy=True, sft=0.1),
        "recompute_with_grad",
        filtered=True,
    ),
    "sampled through both": Objective(["masked_branch=recompute_with_grad"], COEFFICIENTS, "recompute_with_grad"),
    "recompute": Objective(
        [
            "masked_branch=recompute",
            "kl_prcp_estimator=k2",
            "ratio_level=sequence",
            "importance_sampling_cap=1.1",
            "kl_prcp_top_p=0.5",
        ],
        COEFFICIENTS | dict(estimator="k2", ratio_level="sequence", importance_cap=1.1, top_p=0.5),
        "recompute",
    ),
    "recompute exact": Objective(
        [
            "masked_branch=recompute",
            "kl_prcp_estimator=exact",
            "kl_prcp_clip=0.02",
            "kl_prcp_annealing={end: 0.1, steps: 4}",
        ],
        dict(beta=0.3, gamma=0.15, eta_1=0.05 * 0.75, eta_2=0.07 * 0.75, estimator="exact", kl_clip=0.02),
        "recompute",
    ),
    "vppo": Objective(
        ["policy_tokens={sensitivity_share: 0.4}", "trajectory_shaping={lowest: 0.8}"],
        COEFFICIENTS,
        weigh=weigh_as_vppo,
    ),
    "weighed by the step": Objective(
        [
            "sensitivity={formula: entropy_gap, weights: current}",
            "policy_tokens={sensitivity_share: 0.3, entropy_share: 0.2, per: step, sensitivity_only_weight: 0.5,"
            " average: selected}",
            "kl_prcp_tokens={sensitivity_share: 0.5}",
            "masked_branch=recompute",
            "overlong_filtering=true",
        ],
        COEFFICIENTS,
        "recompute",
        filtered=True,
        weigh=weigh_by_step,
    ),
    "vepo": Objective(
        [
            "sensitivity={formula: vepo, weights: current}",
            "policy_tokens={sensitivity_share: 0.4, average: selected}",
            "masked_branch=recompute",
        ],
        COEFFICIENTS,
        "recompute",
        weigh=weigh_as_vepo,
    ),
    "three views": Objective(
        [
            "masked_branch=recompute_with_grad",
            "kl_kept_coef=0.4",
            "sensitivity={formula: entropy_gap, weights: current}",
            "contrast={coefficient: 0.5, temperature: 0.3, share: 0.5}",
        ],
        COEFFICIENTS | dict(kl_kept=0.4, contrast=0.5, temperature=0.3),
        "recompute_with_grad",
        weigh=weigh_as_cppo,
    ),
    "one step": Objective(["importance_sampling_cap=1.1"], COEFFICIENTS | dict(importance_cap=1.1), one_step=True),
}
STEP = 2
"""Of the run: half way through the annealing from 0.2 to 0.1."""


def overrides_of(name: str) -> list[str]:
    kept = ["kept_image={strategy: random, ratio: 0.3, space: patch}"] if name == "three views" else []
    return [f"objective.{x}" for x in OBJECTIVES[name].overrides] + kept


def make_cases() -> list[dict]:
    """Every layout with the first objective; the layouts with most in them with all of them, and several micro-batch
    sizes."""
    cases = []
    for name, (tp, pp, dp, sequence) in LAYOUTS.items():
        layout = [
            f"parallel.{k}={v}"
            for k, v in zip(
                ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size"), (tp, pp, dp)
            )
        ]
        micros = {"dp4": (1, 2, 3, 1, 2, 1, 2, 3, 2, 4, 2), "tp2pp2sp": (5, 3, 4, 12, 5, 4, 5, 3, 5, 4, 5)}.get(
            name, (3,)
        )
        for micro, objective in zip(
            micros, OBJECTIVES if len(micros) > 1 else ["paper" if name in ("tp2dp2", "pp4") else "token"]
        ):
            cases.append(
                {
                    "name": f"{name}-{micro}-{objective}",
                    "objective": objective,
                    "one_step": OBJECTIVES[objective].one_step,
                    "step": STEP,
                    "overrides": [
                        *layout,
                        f"parallel.sequence_parallel={str(sequence).lower()}",
                        f"training.micro_batch_size={micro}",
                        f"training.log_prob_micro_batch_size={micro + 1}",
                        *overrides_of(objective),
                    ],
                }  # fmt: skip
            )
    return cases + group_cases() + dealt_cases() + spread_cases() + frozen_cases()[:-1]


def group_cases() -> list[dict]:
    """The group layout: several groups in a micro-batch, one that must be cut, and the twins; in every kind of
    parallelism."""
    cases = []
    for name, objective, budget in (
        ("pp2dp2", "token", 1000),
        ("dp4", "paper", 90),
        ("tp2dp2", "token", 60),
        ("tp2pp2", "recompute", 120),
        ("tp2dp2", "vppo", 100),
        ("pp2dp2", "weighed by the step", 120),
        ("tp2dp2", "vepo", 150),
        ("tp2pp2sp", "three views", 200),
        ("dp4", "three views", 1000),
        ("tp2pp2sp", "paper", 200),
        ("tp2pp2sp", "token", 40),
        ("pp4", "recompute exact", 100),
    ):
        tp, pp, dp, sequence = LAYOUTS[name]
        layout = [
            f"parallel.{k}={v}"
            for k, v in zip(
                ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size"), (tp, pp, dp)
            )
        ]
        overrides = [
            *layout,
            f"parallel.sequence_parallel={str(sequence).lower()}",
            "training.layout=group",
            f"training.max_tokens_per_micro_batch={budget}",
            *overrides_of(objective),
        ]
        cases.append(
            {"name": f"group-{name}-{budget}-{objective}", "objective": objective, "step": STEP, "overrides": overrides}
        )
    return cases


def spread_cases() -> list[dict]:
    """Pictures spread over the tensor-parallel ranks: micro-batches of none, one, two or all of the pictures, with and
    without twins.

    The tower has two heads: over four ranks it could not be sharded.
    """
    cases = []
    for (tp, pp, dp, sequence), training, objective in [
        ((2, 1, 2, False), ["micro_batch_size=3"], "token"),
        ((2, 2, 1, True), ["micro_batch_size=4"], "sampled through both"),
        ((4, 1, 1, True), ["micro_batch_size=3"], "paper"),
        ((2, 2, 1, True), ["layout=group", "max_tokens_per_micro_batch=200"], "paper"),
        ((4, 1, 1, False), ["layout=group", "max_tokens_per_micro_batch=120"], "recompute"),
    ]:
        layout = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "data_parallel_size": dp,
            "sequence_parallel": str(sequence).lower(),
            "vision_tower": "spread",
        }
        overrides = [
            *(f"parallel.{k}={v}" for k, v in layout.items()),
            "training.log_prob_micro_batch_size=4",
            *(f"training.{x}" for x in training),
            *overrides_of(objective),
        ]
        sizes = f"tp{tp}{'pp2' * (pp > 1)}{'dp2' * (dp > 1)}{'sp' * sequence}"
        name = f"spread-{sizes}-{'group-' * ('layout=group' in training)}{objective}"
        cases.append({"name": name, "objective": objective, "step": STEP, "overrides": overrides})
    return cases


DEALS = {"micro_batch": (2, 4), "micro_batch of five ranks": (5, 2)}
"""The authors' average: ranks that the rollouts are dealt out over, and rollouts in a micro-batch. The last micro-batch
of a rank is smaller; of five ranks two have one rollout more, and a micro-batch more, than the others."""


def dealt_cases() -> list[dict]:
    """The deal is the objective's: it holds whatever the ranks, micro-batches and layout that compute it."""
    cases = []
    for name, objective, training in [
        ("tp2dp2", "micro_batch", ["micro_batch_size=4"]),  # as the authors: computed as it is dealt
        ("dp4", "micro_batch", ["micro_batch_size=2"]),
        ("tp2dp2", "micro_batch", ["layout=group", "max_tokens_per_micro_batch=1000"]),
        ("tp2pp2sp", "micro_batch of five ranks", ["layout=group", "max_tokens_per_micro_batch=120"]),
    ]:
        tp, pp, dp, sequence = LAYOUTS[name]
        ranks, size = DEALS[objective]
        overrides = [
            f"parallel.tensor_model_parallel_size={tp}",
            f"parallel.pipeline_model_parallel_size={pp}",
            f"parallel.data_parallel_size={dp}",
            f"parallel.sequence_parallel={str(sequence).lower()}",
            *(f"training.{x}" for x in training),
            "training.log_prob_micro_batch_size=5",
            "objective.average=micro_batch",
            f"objective.average_ranks={ranks}",
            f"objective.average_micro_batch_size={size}",
            "objective.sft_coef=0.1",
        ]
        layout = "group-" * ("layout=group" in training)
        case = {"name": f"{layout}{name}-{objective}", "objective": objective, "step": STEP, "overrides": overrides}
        cases.append(case)
    return cases


FROZEN = {
    "vision_tower": ("visual.patch_embed.", "visual.blocks.", "visual.merger.ln_q."),
    "merger": ("visual.merger.mlp.",),
    "embeddings": ("model.embed_tokens.",),
}
"""Parts of model.freeze by the official names of their tensors."""


def frozen_cases() -> list[dict]:
    """What is frozen has no gradient, all else that of the whole network. The first is saved, the last resumes it."""
    cases = []
    for name, frozen, more, what in [
        (
            "tp2pp2sp",
            ["vision_tower", "embeddings"],
            ["training.layout=group", "training.max_tokens_per_micro_batch=120", "optimizer.distributed=true"],
            {"is_saved": True},
        ),
        ("tp2dp2", ["merger"], ["training.micro_batch_size=3", "model.recompute=full"], {}),
        ("tp2pp2", [*FROZEN], ["training.micro_batch_size=5", "model.recompute=full"], {}),
        ("tp2dp2", ["vision_tower", "merger"], ["training.micro_batch_size=4", "parallel.vision_tower=spread"], {}),
        (
            "pp2dp2",
            ["vision_tower", "embeddings"],
            ["optimizer.distributed=true"],
            {"resumes": "frozen-tp2pp2sp-vision_tower-embeddings"},
        ),
    ]:
        tp, pp, dp, sequence = LAYOUTS[name]
        overrides = [
            f"parallel.tensor_model_parallel_size={tp}",
            f"parallel.pipeline_model_parallel_size={pp}",
            f"parallel.data_parallel_size={dp}",
            f"parallel.sequence_parallel={str(sequence).lower()}",
            f"model.freeze={json.dumps(frozen)}",
            *more,
        ]
        case = {"name": "-".join(["frozen", name, *frozen]), "objective": "token", "step": STEP, "frozen": frozen}
        cases.append(case | {"overrides": overrides} | what)
    return cases


CASES = make_cases()
SETTINGS = [
    f"rollout.temperature={TEMPERATURE}",
    f"rollout.group_size={GROUP}",
    "rollout.rollout_batch_size=4",
    "training.global_batch_size=4",
    "objective.kl_ref_coef=0.3",
    "objective.kl_prcp_coef=0.2",
    "objective.entropy_coef=0.05",
    "objective.masked_image_entropy_coef=0.07",
]


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
    advantages = advantages_of("grpo", rewards, torch.ones_like(rewards)).flatten().tolist()
    (work / "cases.json").write_text(
        json.dumps(
            [
                case | {"advantages": advantages, "overrides": SETTINGS + case["overrides"]}
                for case in [*CASES, frozen_cases()[-1]]
            ]
        )
    )
    (work / "config.yaml").write_text((ROOT / "configs" / "demo.yaml").read_text())
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        str(ROOT / "tests/workers/training_worker.py"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, str(work)], env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-6000:]
    return work


def expected_tokens(
    model, rollout: Rollout, data: Path, masked: bool, kept: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] log-probs and [T, V] log-probs of all tokens of one rollout by transformers, in the model's dtype, one row at
    a time."""
    pictures = []
    for number, name in enumerate(rollout.images):
        picture = preprocess.resize(preprocess.open_image(data, name), PIXELS)
        if masked or kept:
            seed = rollout.masked_image_seed if masked else derive_seed(rollout.masked_image_seed, "kept")
            ratio = 0.6 if masked else 0.3
            squares = black_squares(
                picture.size, strategy="random", ratio=ratio, square_pixels=14, seed=derive_seed(seed, number)
            )
            picture = blacken(picture, squares, 14)
        pictures.append(picture)
    ids, remaining = [], iter(pictures)
    for token in rollout.prompt_token_ids:
        repeat = (
            preprocess.num_image_tokens(preprocess.grid_of(next(remaining)))
            if token == model.config.image_token_id
            else 1
        )
        ids += [token] * repeat
    start = len(ids)
    ids = torch.tensor([ids + rollout.response_token_ids])
    vision = {}
    if pictures:
        vision["pixel_values"] = torch.cat([torch.from_numpy(preprocess.to_patches(p)) for p in pictures]).to(
            model.dtype
        )
        vision["image_grid_thw"] = torch.tensor([preprocess.grid_of(p) for p in pictures])
    kinds = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids), **vision).logits[
        0, start - 1 : -1
    ]
    all_tokens = torch.log_softmax(logits / TEMPERATURE, -1)
    return all_tokens.gather(-1, ids[0, start:, None])[:, 0], all_tokens


def load_double(directory: Path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).double().eval()


def entropies(all_tokens):
    return list(-(all_tokens.exp() * all_tokens).sum(-1))


@pytest.fixture(scope="module")
def reference(work):
    """Per objective: loss and metrics, the gradient by official tensor name, the numbers of each rollout; and the
    cached log-probs."""
    rollouts = read_jsonl(work / "rollouts.jsonl", Rollout)
    advantages = json.loads((work / "cases.json").read_text())[0]["advantages"]
    data = work / "data"
    with torch.no_grad():
        old_model, ref_model = load_double(work / "old"), load_double(work / "reference")
        old = [expected_tokens(old_model, r, data, False)[0] for r in rollouts]
        masked = [expected_tokens(old_model, r, data, True) for r in rollouts]
        ref = [expected_tokens(ref_model, r, data, False)[0] for r in rollouts]
    found = {
        "old_log_probs": old,
        "masked_image_log_probs": [log_probs for log_probs, _ in masked],
        "ref_log_probs": ref,
    }
    model = load_double(work / "policy")

    def rows_of(objective: Objective) -> list[dict]:
        rows = []
        for i, rollout in enumerate(rollouts):
            if objective.filtered and rollout.finish_reason == "length":
                continue
            log_probs, all_tokens = expected_tokens(model, rollout, data, False)
            if objective.masked == "cached":
                masked_log_probs, masked_all = masked[i]
            else:
                with torch.set_grad_enabled(objective.masked == "recompute_with_grad"):
                    masked_log_probs, masked_all = expected_tokens(model, rollout, data, True)
            rows.append(
                {
                    "advantage": advantages[i],
                    "correct": rollout.rewards.accuracy == 1,
                    "log_probs": list(log_probs),
                    "old": list(log_probs.detach() if objective.one_step else old[i]),
                    "ref": list(ref[i]),
                    "masked": list(masked_log_probs),
                    "is_text": not rollout.images,
                    "jsd": [
                        naive_weights.divergences(p.exp().tolist(), q.exp().tolist())[1]
                        for p, q in zip(all_tokens.detach(), masked_all.detach())
                    ],
                    "kept": list(expected_tokens(model, rollout, data, False, kept=True)[0])
                    if "kl_kept" in objective.options
                    else [],
                    "rollout": rollout.rollout_log_probs,
                    "entropy": entropies(all_tokens),
                    "masked_entropy": entropies(masked_all),
                    "exact_kl": list((all_tokens.exp() * (all_tokens - masked_all)).sum(-1)),
                }  # fmt: skip
            )
        return rows

    def differentiate(loss, metrics):
        model.zero_grad()
        loss.backward()
        gradient = {disk_name(name): p.grad.clone() for name, p in model.named_parameters()}
        return {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}, gradient

    for name, objective in OBJECTIVES.items():
        rows = rows_of(objective)
        objective.weigh(rows)
        found[name] = differentiate(*naive_papo_loss(rows, **objective.options))
        found[f"{name} ratios"] = [
            float((lp - o).detach().exp()) for row in rows for lp, o in zip(row["log_probs"], row["old"])
        ]
        found[f"{name} micro-batch mean"] = sum(
            float(naive_papo_loss(rows[i : i + 2], **objective.options)[0].detach()) for i in range(0, len(rows), 2)
        ) / -(-len(rows) // 2)
    for name, (ranks, size) in DEALS.items():
        rows, of_ranks = rows_of(OBJECTIVES["token"]), []
        for rank in range(ranks):
            own = rows[rank::ranks]
            parts = [own[start : start + size] for start in range(0, len(own), size)]
            of_ranks.append(sum(naive_papo_loss(part, **COEFFICIENTS, sft=0.1)[0] for part in parts) / len(parts))
        loss = sum(of_ranks) / ranks
        found[name] = differentiate(loss, {"loss": loss})
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_metrics_equal_the_loop_over_tokens(work, reference, case):
    metrics = json.loads((work / case["name"] / "metrics.json").read_text())
    expected = reference[case["objective"]][0]
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-5, abs=2e-6), (
            name
        )  # fp32 log-probs of ~20 layers' worth of sums


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_gradient_equals_transformers(work, reference, case, tmp_path):
    tmp_path.joinpath("hf").mkdir()
    convert.megatron_to_hf(convert.MegatronCheckpoint(work / case["name"] / "gradient"), tmp_path / "hf")
    got = load_file(tmp_path / "hf" / "model.safetensors")
    expected = reference[case["objective"]][1]
    assert got.keys() == expected.keys()
    starts = tuple(start for part in case.get("frozen", []) for start in FROZEN[part])
    frozen = {name for name in expected if starts and name.startswith(starts)}
    assert all(got[name].count_nonzero() == 0 < expected[name].count_nonzero() for name in frozen)
    expected = {name: gradient for name, gradient in expected.items() if name not in frozen}
    scale = max(float(g.abs().max()) for g in expected.values())
    worst = {name: float((got[name].double() - expected[name]).abs().max()) / scale for name in expected}
    assert max(worst.values()) < 2e-5, sorted(worst.items(), key=lambda row: -row[1])[:5]
    others = [reference[other][1] for other in (*OBJECTIVES, *DEALS) if other != case["objective"]]
    for other in others:  # negative control: no other objective would have passed
        assert max(float((got[name].double() - other[name]).abs().max()) / scale for name in expected) > 1e-3


def test_a_frozen_part_has_no_state_and_moves_to_another_layout(work, tmp_path):
    """Saved at TP2 x PP2, loaded and saved again at PP2 x DP2: every bit; exported, it holds the frozen tensors as they
    were."""
    saving, resuming = frozen_cases()[0], frozen_cases()[-1]
    trained = TorchDistCheckpoint(work / saving["name"] / "trained")
    again = TorchDistCheckpoint(work / resuming["name"])
    assert trained.tensors == again.tensors
    assert all(torch.equal(trained.read(key, None), again.read(key, None)) for key in trained.tensors)
    moments = [key for key in trained.tensors if "exp_avg_sq" in key]
    assert any("merger_fc1" in key for key in moments) and any("output_layer" in key for key in moments)
    for part in ("vision_model.decoder", "patch_embed", "embedding"):
        assert any(part in key for key in trained.tensors) and not any(part in key for key in moments), part
    tmp_path.joinpath("hf").mkdir()
    convert.megatron_to_hf(convert.MegatronCheckpoint(trained.directory), tmp_path / "hf")
    after, before = (load_file(path / "model.safetensors") for path in (tmp_path / "hf", work / "policy"))
    starts = tuple(start for part in saving["frozen"] for start in FROZEN[part])
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if name.startswith(starts)
    }


@pytest.mark.parametrize(
    "name",
    [
        case["name"]
        for case in CASES
        if case["objective"] in ("token", "sequence")
        and "frozen" not in case
        and "dp" not in case["name"]
        and "group" not in case["name"]
    ],
)
def test_cached_log_probs_equal_transformers(work, reference, name):
    got = json.loads((work / name / "log_probs.json").read_text())
    for kind in ("old_log_probs", "ref_log_probs", "masked_image_log_probs"):
        for ours, theirs in zip(got[kind], reference[kind], strict=True):
            torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs, rtol=0, atol=2e-5)
    spread = [
        float((m - o).abs().max())
        for m, o in zip(reference["masked_image_log_probs"], reference["old_log_probs"])
        if len(o)
    ]
    assert max(spread) > 1e-2  # the masked picture matters, so a mask that masks nothing would be seen
    assert spread[5] < 1e-9 and spread[6] < 1e-9  # text-only group


def test_the_example_is_a_hard_one(reference):
    """Both clips are hit, and a mean of micro-batch means is far from the true mean: the invariance above can fail."""
    ratios = reference["token ratios"]
    assert min(ratios) < 0.8 and max(ratios) > 1.3
    for objective in ("token", "sequence", "paper"):
        assert abs(reference[f"{objective} micro-batch mean"] - reference[objective][0]["loss"]) > 1e-3

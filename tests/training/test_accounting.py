"""Token and FLOP counts of a training step against a count by hand, torch's FLOP counter on transformers and on our own
model, dense masks and real micro-batches.

NOT covered here: the peak memory of a GPU.
"""

import json
import os
import random
import subprocess
import sys
from functools import partial

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.run.records import Rewards, Rollout, write_jsonl
from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model
from megatron_papo.training import accounting
from megatron_papo.training.accounting import (
    attention_pairs,
    decoder_flops,
    peak_flops,
    step_accounting,
    vision_flops,
    window_pairs,
)
from megatron_papo.training.collator import Collator
from megatron_papo.training.layouts import layout_of
from megatron_papo.training.rows import make_rows
from tests.helpers import DEMO_CONFIG, ROOT

SIZES = TinySizes(
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    vision_hidden_size=32,
    vision_intermediate_size=72,
    vision_depth=3,
    vision_heads=2,
    full_attention_layers=(1,),
    tied=False,
)
PICTURES = {"a.png": (56, 56), "b.png": (112, 168), "c.png": (140, 252), "d.png": (84, 308)}
PROMPTS = [["a.png"], ["b.png", "c.png"], [], ["d.png"], ["a.png"], ["c.png"]]
"""The first and the last but one show the same picture."""
LENGTHS = [3, 7, 1, 2, 5, 0, 4, 1, 6, 2, 2, 5, 9, 1, 3, 8, 2, 2]
GROUP = 3
LIMITS = ["data.min_pixels=3136", "data.max_pixels=50176"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny checkpoint in model/ and the pictures."""
    work, rng = tmp_path_factory.mktemp("accounting"), random.Random(3)
    make_tiny_model(work / "model", seed=1, sizes=SIZES)
    for name, size in PICTURES.items():
        Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3)).save(work / name)
    return work


@pytest.fixture(scope="module")
def hf(work):
    return read_hf_config(work / "model")


def grid_of(name):
    width, height = PICTURES[name]
    return 1, height // 14, width // 14


def make_rollouts(hf) -> list[Rollout]:
    """No token is 0, which is what the Collator pads with."""
    rng, records = random.Random(5), []
    for number, length in enumerate(LENGTHS):
        group, sample = divmod(number, GROUP)
        names = PROMPTS[group]
        text = [1 + (group + i) % 90 for i in range(5 + group)]
        tokens = sum(grid_of(name)[1] * grid_of(name)[2] // 4 for name in names)
        records.append(
            Rollout(
                prompt_id=f"p{group}",
                iteration=1,
                epoch=0,
                group=group,
                sample=sample,
                answer="",
                prompt_token_ids=[*text, *[hf.image_token_id] * len(names)],
                prompt_num_tokens=len(text) + tokens,
                images=names,
                response_token_ids=[rng.randrange(1, 90) for _ in range(length)],
                rollout_log_probs=[-1.0] * length,
                text="",
                finish_reason="stop",
                rewards=Rewards(overall=1, accuracy=1, format=1),
                temperature=1.0,
                top_p=1.0,
                sampling_seed=0,
                masked_image_seed=group,
                weight_version="w",
            )  # fmt: skip
        )
    return records


def test_flops_equal_a_count_by_hand(hf):
    """Width 48, 4 heads and 2 key-value groups of 12, MLP 80, 448 words, 3 layers; 10 tokens of which 4 are
    responses."""
    products = [
        (10, 48, 48), (10, 48, 24), (10, 48, 24),  # queries, keys, values: (rows, summed, columns)
        (10, 48, 48), (10, 48, 80), (10, 48, 80), (10, 80, 48),  # output, gate, up, down
    ]  # fmt: skip
    layer = sum(2 * rows * summed * columns for rows, summed, columns in products)
    assert layer == 2 * 10 * 18432
    scores_and_values = 2 * (2 * 55 * 12) * 4  # 55 of 10 x 10 pairs are causal; 4 heads
    expected = 3 * (layer + scores_and_values) + 2 * 4 * 48 * 448
    assert decoder_flops(hf.text, 10, 55, 4) == expected
    assert decoder_flops(hf.text, 10, 100, 4) - expected == 3 * 2 * 2 * 45 * 48  # negative control: without the mask
    assert decoder_flops(hf.text, 10, 55, 10) - expected == 2 * 6 * 48 * 448  # negative control: logits everywhere


def test_vision_flops_equal_a_count_by_hand(hf):
    """Width 32, MLP 72, 2 heads of 16; 6 x 10 patches: windows of 8 x 8 patches, so 6 x 8 and 6 x 2."""
    layer = sum(2 * 60 * summed * columns for summed, columns in [(32, 96), (32, 32), (32, 72), (32, 72), (72, 32)])
    windowed, full = 48 * 48 + 12 * 12, 60 * 60
    attention = sum(2 * (2 * pairs * 16) * 2 for pairs in (windowed, full, windowed))
    merger = 2 * 15 * 128 * 128 + 2 * 15 * 128 * 48
    expected = 2 * 60 * 1176 * 32 + 3 * layer + attention + merger
    assert window_pairs(hf.vision, (1, 6, 10)) == windowed
    assert vision_flops(hf.vision, (1, 6, 10)) == expected
    assert (
        vision_flops(hf.vision, (1, 6, 8)) + vision_flops(hf.vision, (1, 6, 2)) < expected
    )  # negative control: two pictures are not one


@pytest.mark.parametrize("prompt, responses", [(6, [4]), (5, [3, 0, 7, 1]), (1, [2, 2]), (4, [0])])
def test_pairs_equal_a_dense_mask(prompt, responses):
    of = torch.tensor([-1] * prompt + [number for number, length in enumerate(responses) for _ in range(length)])
    place = torch.arange(len(of))
    causal = place[:, None] >= place[None, :]
    mask = causal & ((of[:, None] == of[None, :]) | (of[None, :] == -1))
    assert attention_pairs(prompt, responses) == int(mask.sum())
    if sum(length > 0 for length in responses) > 1:  # negative controls: responses that see each other; a row for each
        assert int(causal.sum()) > int(mask.sum())
        assert sum(attention_pairs(prompt, [length]) for length in responses) > int(mask.sum())


def counted_by_torch(work, hf, names, prompt, response, with_gradient) -> int:
    """FLOPs of one row through transformers, whose attention is products of whole matrices; without those that make
    rotary angles."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(work / "model", attn_implementation="eager")
    grids = [grid_of(name) for name in names]
    tokens = torch.full((1, prompt + response), 7)
    start = 1
    for _, rows, columns in grids:
        tokens[0, start : start + rows * columns // 4] = hf.image_token_id
        start += rows * columns // 4 + 1
    patches = sum(rows * columns for _, rows, columns in grids)
    vision = dict(pixel_values=torch.randn(patches, 1176), image_grid_thw=torch.tensor(grids)) if grids else {}
    keep = torch.arange(prompt - 1, prompt + response - 1)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(with_gradient):
        kinds = (tokens == hf.image_token_id).int()
        logits = model(input_ids=tokens, mm_token_type_ids=kinds, logits_to_keep=keep, use_cache=False, **vision).logits
        assert logits.shape[1] == response
        if with_gradient:
            logits.sum().backward()
    angles = [
        sum(flops.values())
        for name, flops in counter.get_flop_counts().items()
        if name.endswith("language_model.rotary_emb")
    ]
    assert len(angles) == 1
    return counter.get_total_flops() - angles[0]


@pytest.mark.parametrize("names, prompt, response", [(["b.png", "c.png"], 80, 9), (["d.png"], 50, 13), ([], 12, 5)])
def test_flops_equal_torchs_counter_on_transformers(work, hf, names, prompt, response):
    counted = partial(counted_by_torch, work, hf, names, prompt, response)
    length = prompt + response
    decoder = partial(decoder_flops, hf.text, length, responses=response)
    forward = decoder(pairs=length**2) + sum(vision_flops(hf.vision, grid_of(name)) for name in names)
    assert counted(with_gradient=False) == forward
    # of the backward pass torch leaves out the gradient of the pixels, which nobody wants; the convention counts it
    pixels = sum(2 * grid_of(name)[1] * grid_of(name)[2] * 1176 * SIZES.vision_hidden_size for name in names)
    assert counted(with_gradient=True) == (1 + accounting.BACKWARD) * forward - pixels
    # what they compute of attention and nobody needs, by its known factor
    causal = decoder(pairs=attention_pairs(prompt, [response]))
    assert decoder(pairs=length**2) - causal == SIZES.num_layers * 4 * SIZES.hidden_size * length * (length - 1) // 2
    # negative controls: what was equal above is not, with logits everywhere and without windows
    assert decoder_flops(hf.text, length, length**2, length) > decoder(pairs=length**2)
    if names:
        widened = type(hf.vision)(**vars(hf.vision) | {"full_attention_layers": (0, 1, 2)})
        assert sum(vision_flops(widened, grid_of(name)) for name in names) > sum(
            vision_flops(hf.vision, grid_of(name)) for name in names
        )


CASES = {
    "plain": ["training.layout=plain"],
    "plain, sequence parallel": [
        "training.layout=plain",
        "parallel.tensor_model_parallel_size=4",
        "parallel.sequence_parallel=true",
    ],
    "group": ["training.layout=group", "training.max_tokens_per_micro_batch=1000"],
    "groups cut": ["training.layout=group", "training.max_tokens_per_micro_batch=40"],
    "group, sequence parallel": [
        "training.layout=group",
        "training.max_tokens_per_micro_batch=150",
        "parallel.tensor_model_parallel_size=4",
        "parallel.sequence_parallel=true",
    ],
}
PASSES = {
    "sweep": accounting.Pass("original", 4),
    "masked sweep": accounting.Pass("masked", 4),
    "update": accounting.Pass("original", 2, ("original",)),
    "update with twins": accounting.Pass("both", 2, ("original", "masked")),
    "update with twins for their logits": accounting.Pass("both", 2, ("original",)),
}


def overrides_of(case, *more):
    parallel = [
        "parallel.tensor_model_parallel_size=1",
        "parallel.pipeline_model_parallel_size=1",
        "parallel.data_parallel_size=2",
    ]
    sizes = [
        f"rollout.group_size={GROUP}",
        "rollout.rollout_batch_size=6",
        "training.global_batch_size=6",
        "data.max_prompt_tokens=4096",
    ]
    return [
        *LIMITS,
        *parallel,
        "parallel.sequence_parallel=false",
        *sizes,
        "training.micro_batch_size=1",
        *CASES[case],
        *more,
    ]


def config_of(case, *more):
    return load_config(DEMO_CONFIG, overrides_of(case, *more))


def counted_over_micro_batches(rows, each, config, hf, work) -> dict[str, int]:
    """From the tensors that the model is given on each of two ranks: a token is not 0, an attention mask is dense."""
    found = dict(tokens_computed=0, padding_tokens=0, patches_computed=0, model_flops=0)
    collator = Collator(config, hf, work, with_pixels=True, device=torch.device("cpu"), dtype=torch.float32)
    for places in layout_of(config.training).split_over_ranks(rows, 2):
        share = [rows[place] for place in places]
        for part in collator.plan(share, each.micro_batch_size, each.pictures):
            batch = collator.collate(part, each.pictures)
            tokens = int((batch.input_ids != 0).sum())
            found["tokens_computed"] += tokens
            found["padding_tokens"] += batch.input_ids.numel() - tokens
            found["patches_computed"] += 0 if batch.pixel_values is None else len(batch.pixel_values)
            halves = 2 if batch.has_twins else 1
            pairs = int(dense_mask(batch, part).sum())
            decoder = decoder_flops(hf.text, tokens // halves, pairs, len(batch.response_tokens) // halves)
            shown = (
                torch.tensor(batch.pictures).chunk(halves) if batch.pictures else [torch.tensor([], dtype=int)] * halves
            )
            kinds = ("original", "masked") if halves == 2 else (each.pictures,)
            for kind, pictures in zip(kinds, shown):
                forward = decoder + sum(
                    vision_flops(hf.vision, batch.image_grids[picture]) for picture in set(pictures.tolist())
                )
                found["model_flops"] += forward * (3 if kind in each.with_gradient else 1)
    return found


def dense_mask(batch, part) -> torch.Tensor:
    """[rows, s, s] of the rows of the originals: which token needs which, from the tokens' own places."""
    ids = batch.input_ids[: batch.input_ids.shape[0] // (2 if batch.has_twins else 1)]
    of_prompt = torch.full_like(ids, -1)
    of_response = torch.full_like(ids, -1)
    if batch.groups is None:
        for i, row in enumerate(part):
            of_prompt[i, : len(row.prompt_token_ids) + row.response_length] = 0
    else:
        start = 0
        for number, (prompt, responses) in enumerate(batch.groups.groups):
            of_prompt[0, start : start + prompt + sum(responses)] = number
            start += prompt
            for sample, length in enumerate(responses):
                of_response[0, start : start + length] = sample
                start += length
    assert torch.equal(of_prompt >= 0, ids != 0)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    same_prompt = (of_prompt[:, :, None] == of_prompt[:, None, :]) & (of_prompt[:, :, None] >= 0)
    same_response = (of_response[:, :, None] == of_response[:, None, :]) | (of_response[:, None, :] == -1)
    return causal & same_prompt & same_response


def rows_of(config, hf, work):
    rollouts = make_rollouts(hf)
    return make_rows(rollouts, [1.0] * len(rollouts), work, config, hf, work)


@pytest.mark.parametrize("ids", [[-1], [448], [447, 10**9]])
def test_a_response_that_no_model_input_can_match_is_refused(work, hf, ids):
    """Control: the last word of the vocabulary is none."""
    config, rollouts = config_of(next(iter(CASES))), make_rollouts(hf)[:1]
    for found, refused in (([447], False), (ids, True)):
        wrong = rollouts[0].model_copy(update={"response_token_ids": found, "rollout_log_probs": [-1.0 for _ in found]})
        if refused:
            with pytest.raises(UserError, match="rollouts.jsonl:1: the response holds token .* the vocabulary has 448"):
                make_rows([wrong], [1.0], work, config, hf, work / "rollouts.jsonl")
        else:
            assert len(make_rows([wrong], [1.0], work, config, hf, work / "rollouts.jsonl")) == 1


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", CASES)
def test_counts_equal_the_real_micro_batches(work, hf, case, name):
    config, each = config_of(case), PASSES[name]
    rows = rows_of(config, hf, work)
    got = step_accounting([rows], config, hf, [each], seconds=2.0)
    expected = counted_over_micro_batches(rows, each, config, hf, work)
    assert {key: got[key] for key in expected} == expected
    halves = 2 if each.pictures == "both" else 1
    plain_tokens = sum(rollout.prompt_num_tokens + len(rollout.response_token_ids) for rollout in make_rollouts(hf))
    plain_patches = GROUP * sum(grid_of(name)[1] * grid_of(name)[2] for names in PROMPTS for name in names)
    assert (got["tokens_naive"], got["patches_naive"]) == (halves * plain_tokens, halves * plain_patches)
    assert got["tokens_per_second"] == plain_tokens / 2.0
    assert "mfu" not in got
    if config.training.layout == "group":  # negative control: the layout saves something
        assert got["tokens_computed"] < got["tokens_naive"]
    else:
        assert got["tokens_computed"] == got["tokens_naive"] and got["padding_tokens"] > 0
    other = step_accounting([rows], config_of("plain" if "group" in case else "group"), hf, [each], seconds=2.0)
    assert other["model_flops"] != got["model_flops"]


OWN_PASSES = {
    "cached": ([], "", PASSES["update"]),
    "through both": (["masked_branch=recompute_with_grad"], "", PASSES["update with twins"]),
    "exact": (["masked_branch=recompute", "kl_prcp_estimator=exact"], "", PASSES["update with twins for their logits"]),
    "masked sweep": ([], "masked", PASSES["masked sweep"]),
}
"""Settings of the objective, pictures of a sweep, and the pass that they are."""
OWN_CASES = [(layout, name) for layout in ("group", "groups cut") for name in OWN_PASSES]


def own_overrides(name):
    return ["parallel.data_parallel_size=1", *(f"objective.{setting}" for setting in OWN_PASSES[name][0])]


@pytest.fixture(scope="module")
def counted_on_our_model(work, hf):
    """{case: FLOPs}, by torch's counter."""
    write_jsonl(work / "rollouts.jsonl", make_rollouts(hf))
    (work / "config.yaml").write_text(DEMO_CONFIG.read_text())
    cases = [
        {"overrides": overrides_of(layout, *own_overrides(name)), "sweep": OWN_PASSES[name][1]}
        for layout, name in OWN_CASES
    ]
    (work / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, str(ROOT / "tests/workers/count_flops.py"), str(work)]
    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(zip(OWN_CASES, json.loads((work / "counted.json").read_text()), strict=True))


@pytest.mark.parametrize("case", OWN_CASES, ids=" ".join)
def test_flops_equal_torchs_counter_on_our_model(work, hf, counted_on_our_model, case):
    """What the counter sees and model FLOPs leave out: the other triangle of attention, backward of twins that nobody
    wants. And the other way round: the gradient of the pixels."""
    layout, name = case
    each = OWN_PASSES[name][2]
    config = config_of(layout, *own_overrides(name))
    rows = rows_of(config, hf, work)
    model_flops = step_accounting([rows], config, hf, [each], 1.0)["model_flops"]
    collator = Collator(config, hf, work, with_pixels=True, device=torch.device("cpu"), dtype=torch.float32)
    times, expected = (3 if each.with_gradient else 1), model_flops
    for part in collator.plan(rows, each.micro_batch_size, each.pictures):
        batch = collator.collate(part, each.pictures)
        lengths = [length for prompt, responses in batch.groups.groups for length in (prompt, *responses)]
        unseen = sum(length * (length - 1) // 2 for length in lengths)
        expected += times * (2 if batch.has_twins else 1) * SIZES.num_layers * 4 * SIZES.hidden_size * unseen
        if each.with_gradient and batch.pixel_values is not None:
            expected -= 2 * len(batch.pixel_values) * 1176 * SIZES.vision_hidden_size
    if name == "exact":
        masked = step_accounting(
            [rows], config, hf, [accounting.Pass("both", each.micro_batch_size, ("original", "masked"))], 1.0
        )
        expected += masked["model_flops"] - model_flops
        assert masked["model_flops"] > 1.2 * model_flops  # negative control: there is something to leave out
    assert counted_on_our_model[case] == expected
    assert counted_on_our_model[case] != model_flops  # negative control: the corrections matter


def test_passes_add_up(work, hf):
    config = config_of("group")
    rows = rows_of(config, hf, work)
    first, second = (step_accounting([rows], config, hf, [PASSES[name]], 1.0) for name in ("masked sweep", "update"))
    both = step_accounting([rows], config, hf, [PASSES["masked sweep"], PASSES["update"]], 1.0)
    assert {name: first[name] + second[name] for name in both if name != "tokens_per_second"} == {
        name: value for name, value in both.items() if name != "tokens_per_second"
    }
    assert both["tokens_per_second"] == first["tokens_per_second"]


def test_a_sweep_over_several_steps_is_planned_as_one(work, hf):
    config = config_of("plain")
    rows = rows_of(config, hf, work)
    steps, each = [rows[:9], rows[9:]], PASSES["sweep"]
    mine = [[row for step in steps for row in step[rank::2]] for rank in range(2)]
    patches = 0
    for share in mine:
        for start in range(0, len(share), each.micro_batch_size):
            shown = {tuple(row.rollout.images) for row in share[start : start + each.micro_batch_size]}
            patches += sum(grid_of(name)[1] * grid_of(name)[2] for names in shown for name in names)
    assert step_accounting(steps, config, hf, [each], 1.0)["patches_computed"] == patches
    assert (
        sum(step_accounting([step], config, hf, [each], 1.0)["patches_computed"] for step in steps) != patches
    )  # negative control


@pytest.mark.parametrize(
    "objective, expected",
    [
        (["kl_prcp_coef=0", "masked_image_entropy_coef=0"], PASSES["update"]),
        (["masked_branch=cached"], PASSES["update"]),
        (["masked_branch=recompute"], PASSES["update"]),
        (["masked_branch=recompute", "kl_prcp_estimator=exact"], PASSES["update with twins for their logits"]),
        (["masked_branch=recompute_with_grad"], PASSES["update with twins"]),
    ],
)
def test_update_follows_the_objective(objective, expected):
    config = config_of("plain", "training.micro_batch_size=2", *(f"objective.{setting}" for setting in objective))
    assert accounting.update(config.objective, config.training) == expected


def test_mfu(work, hf):
    config = config_of("group", "model.dtype=bfloat16", "parallel.tensor_model_parallel_size=2")
    rows = rows_of(config, hf, work)
    got = step_accounting([rows], config, hf, [PASSES["update"]], 4.0, device="NVIDIA H100 80GB HBM3")
    assert got["mfu"] == pytest.approx(got["model_flops"] / 4.0 / (2 * 2) / 989.4e12, rel=1e-12)
    assert "mfu" not in step_accounting([rows], config, hf, [PASSES["update"]], 4.0, device="NVIDIA GeForce GTX 1080")
    in_float32 = config_of("group")
    assert "mfu" not in step_accounting([rows], in_float32, hf, [PASSES["update"]], 4.0, device="NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
    ],
)
def test_peak_flops_equal_the_data_sheets(name, flops):
    assert peak_flops(name) == pytest.approx(flops, rel=1e-3)


@pytest.mark.parametrize(
    "name", [None, "NVIDIA RTX A1000 Laptop GPU", "NVIDIA H20", "Tesla V100", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"]
)
def test_a_device_that_is_not_known_has_no_peak(name):
    assert peak_flops(name) is None

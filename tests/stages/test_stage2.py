"""Stage 2 against a plain torch loop over transformers' own model: any ZeRO stage, micro-batch size and process count
learns the same.

The data mix several pictures per row, text-only rows and targets of unequal length, so that some micro-batches hold no
picture and a mean of micro-batch means would differ from the mean over tokens.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_papo.config_files import load_config
from megatron_papo.data.chat import ChatFormat, RenderSettings
from megatron_papo.data.prompts import PromptMaker
from megatron_papo.data.rows import SourceRow
from megatron_papo.pictures.preprocess import PictureSettings
from megatron_papo.pictures.store import ImageStore
from megatron_papo.run.records import write_jsonl
from megatron_papo.run.stage_output import read_manifest
from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model
from tests.helpers import DEMO_CONFIG, ROOT, command_of, run_module, settings

SIZES = TinySizes(
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    vision_hidden_size=40,
    vision_intermediate_size=56,
    vision_depth=2,
    vision_heads=5,
    full_attention_layers=(1,),
    tied=True,
    random_biases_and_norms=True,
)
SEED = 3
SFT = dict(
    steps=4,
    global_batch_size=8,
    learning_rate=1e-3,
    warmup_steps=2,
    weight_decay=0.1,
    adam_beta1=0.8,
    adam_beta2=0.95,
    clip_grad=0.5,
)
LAYOUTS = {
    "zero1": dict(zero_stage=1, micro_batch_size=1),
    "zero2": dict(zero_stage=2, micro_batch_size=4),
    "zero2 offload": dict(zero_stage=2, micro_batch_size=2, offload_optimizer=True),
    "zero3": dict(zero_stage=3, micro_batch_size=2),
    "zero3 again": dict(zero_stage=3, micro_batch_size=2),
    "zero2 bfloat16": dict(zero_stage=2, micro_batch_size=2, dtype="bfloat16"),
    "zero3 bfloat16": dict(zero_stage=3, micro_batch_size=2, dtype="bfloat16"),
}


def rows():
    """22 rows: 8 and 8 and 8 are not whole epochs, so the order of a second epoch counts too. Rows 0 .. 9 have no
    picture."""
    rng = np.random.default_rng(0)
    for number in range(22):
        images = []
        for _ in range(0 if number < 10 else 1 + number % 2):
            stream = io.BytesIO()
            size = rng.integers(30, 150, 2)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(stream, "PNG")
            images.append(stream.getvalue())
        target = f"<think>{'I count ' * (number % 5)}{number}</think>\\boxed{{{number}}}"
        yield SourceRow(
            place=f"row {number}",
            id=str(number),
            problem=f"{'<image>' * len(images)}How many in {number}?",
            answer=str(number),
            images=images,
            image_root=None,
            target=target,
        )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Directory with sft.jsonl, images/ and model/, and the data section they were made with."""
    root = tmp_path_factory.mktemp("mixed")
    make_tiny_model(root / "model", 7, SIZES)
    config = load_config(DEMO_CONFIG).data
    maker = PromptMaker(
        config, ChatFormat(root / "model", RenderSettings("{problem}")), ImageStore(root), PictureSettings.of(config)
    )
    assert write_jsonl(root / "sft.jsonl", maker.prompts(rows())) == 22
    return root, config


@pytest.fixture(scope="module")
def trained(mixed, tmp_path_factory):
    """Layout name -> (history, tensors), all from one start of two processes."""
    root, config = mixed
    output = tmp_path_factory.mktemp("trained")
    layouts = LAYOUTS | {
        "nested": LAYOUTS["zero2"] | {"hf": str(nested_like_transformers_4(root / "model", root / "nested"))}
    }
    job = dict(
        data=str(root), hf=str(root / "model"), output=str(output), sft=SFT, seed=SEED, layouts=layouts,
        data_config=config.model_dump(mode="json"), recompute={"zero2": "full", "zero3": "full", "zero3 again": "full"},
    )  # fmt: skip
    (output / "job.json").write_text(json.dumps(job))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "tests/workers/sft_worker.py",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, str(output / "job.json")], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return output, {
        name: (json.loads((output / name / "history.json").read_text()), load_file(output / name / "model.safetensors"))
        for name in layouts
    }


def nested_like_transformers_4(source, target):
    """The same checkpoint with the config.json that transformers 4.57 writes: the tie flag stands only inside
    text_config."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    top = (
        "architectures",
        "model_type",
        "vision_config",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    )
    text = {key: value for key, value in config.items() if key not in top} | {"model_type": "qwen2_5_vl_text"}
    (target / "config.json").write_text(json.dumps({key: config[key] for key in top} | {"text_config": text}))
    return target


@pytest.fixture(scope="module")
def reference(mixed):
    """The same training without DeepSpeed, batching, or any of our code but the data order: one sample at a time
    through transformers."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from megatron_papo.sft.batches import batch_indices

    torch.set_num_threads(1)
    root, config = mixed
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(root / "model").train()
    processor = Qwen2VLImageProcessorPil(min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    lines = [json.loads(line) for line in (root / "sft.jsonl").read_text().splitlines()]
    pad = model.config.image_token_id

    def target_losses(line):
        inputs, ids = {}, line["token_ids"]
        if line["images"]:
            pictures = processor(images=[Image.open(root / name) for name in line["images"]], return_tensors="pt")
            counts = iter((pictures["image_grid_thw"].prod(-1) // 4).tolist())
            ids = [token for each in ids for token in ([each] * next(counts) if each == pad else [each])]
            inputs = dict(pictures)
        ids = torch.tensor([ids + line["target_token_ids"]])
        logits = model(input_ids=ids, mm_token_type_ids=(ids == pad).int(), **inputs).logits[
            0, -len(line["target_token_ids"]) - 1 : -1
        ]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(line["target_token_ids"]), reduction="none")

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.8, 0.95), weight_decay=0.1)
    history, mean_of_means = [], []
    for step in range(SFT["steps"]):
        indices = batch_indices(len(lines), step, 8, SEED)
        losses = [target_losses(lines[index]) for index in indices]
        mean_of_means.append(torch.stack([loss.mean() for loss in losses]).mean().item())
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 2)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history, mean_of_means, {name: parameter.detach() for name, parameter in model.named_parameters()}


def in_memory(name):
    return (
        name.replace("visual.", "model.visual.", 1)
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1)
    )


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "bfloat16" not in name])
def test_loss_gradient_and_weights_equal_the_plain_loop(name, trained, reference):
    """Loss and gradient norm to 2e-5 (float32 sums in other orders; Adam's first steps amplify them where a gradient is
    about 0).

    Weights: four steps move them by up to 4e-3, the difference may be 1e-4 where a gradient is at noise level, 1e-6 on
    average.
    """
    history, tensors = trained[1][name]
    expected_history, _, expected = reference
    np.testing.assert_allclose(history, expected_history, rtol=2e-5)
    assert len(tensors) == len(expected)
    differences = {key: (tensor - expected[in_memory(key)]).abs() for key, tensor in tensors.items()}
    assert max(float(each.max()) for each in differences.values()) < 1e-4
    assert max(float(each.mean()) for each in differences.values()) < 1e-6


def test_the_mean_of_means_is_another_number(trained, reference):
    """Negative control: what a mean per micro-batch would give is told apart by the test above."""
    history, mean_of_means, _ = trained[1]["zero1"][0], *reference[1:]
    assert min(abs(loss - other) for (loss, _), other in zip(history, mean_of_means)) > 1e-3


def test_clipping_and_warm_up_were_at_work(reference):
    assert min(norm for _, norm in reference[0]) > SFT["clip_grad"]


def test_same_bits_on_repeat(trained):
    output, _ = trained
    first, second = ((output / name / "model.safetensors").read_bytes() for name in ("zero3", "zero3 again"))
    assert first == second
    assert first != (output / "zero1" / "model.safetensors").read_bytes(), "negative control: other sums, other bits"


def test_a_tie_flag_inside_text_config_is_seen(trained, mixed):
    """transformers 5.12 alone overlooks it and makes a random head (the negative control): what we write loads tied
    everywhere."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    output, results = trained
    np.testing.assert_allclose(results["nested"][0], results["zero1"][0], rtol=2e-5)
    overlooked = Qwen2_5_VLForConditionalGeneration.from_pretrained(mixed[0] / "nested")
    assert overlooked.lm_head.weight is not overlooked.get_input_embeddings().weight
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(output / "nested")
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["zero2 bfloat16", "zero3 bfloat16"])
def test_bfloat16(name, trained, reference):
    """bfloat16 has 8 bits: losses of about 6 agree to 1 %. The files say what they hold."""
    from transformers import AutoConfig

    history, tensors = trained[1][name]
    np.testing.assert_allclose([loss for loss, _ in history], [loss for loss, _ in reference[0]], rtol=0.01)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(trained[0] / name).dtype == torch.bfloat16


def test_checkpoint_is_one_that_transformers_loads(trained, mixed):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    for name in ("zero2", "zero3"):
        model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(trained[0] / name, output_loading_info=True)
        assert not any(report.values()), report
        assert model.lm_head.weight is model.get_input_embeddings().weight
        stored = load_file(trained[0] / name / "model.safetensors")
        assert all(torch.equal(model.get_parameter(in_memory(key)), tensor) for key, tensor in stored.items())
        source = mixed[0] / "model"
        for file in (file.name for file in source.iterdir() if file.suffix != ".safetensors"):
            assert (trained[0] / name / file).read_bytes() == (source / file).read_bytes()
        assert len(AutoTokenizer.from_pretrained(trained[0] / name)) == len(AutoTokenizer.from_pretrained(source))


def test_order_is_a_permutation_per_epoch():
    from megatron_papo.sft.batches import batch_indices

    drawn = [index for step in range(11) for index in batch_indices(22, step, 8, SEED)]
    assert [sorted(drawn[start : start + 22]) for start in range(0, 88, 22)] == [list(range(22))] * 4
    assert drawn[:22] != drawn[22:44] != list(range(22))
    assert batch_indices(22, 0, 8, SEED) == drawn[:8] != batch_indices(22, 0, 8, SEED + 1)
    assert len(batch_indices(3, 0, 8, SEED)) == 8


SHORT = settings("sft.steps=12", "sft.global_batch_size=32", "sft.micro_batch_size=8", "sft.warmup_steps=4")
FIRST_OF_TWO = {
    "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
"""As a launcher sets it."""


def stage2_arguments(data, output, *overrides):
    return ["--config", DEMO_CONFIG, "--data", data, "--hf", data / "model", "--output", output, *overrides]


@pytest.fixture(scope="module")
def finished(demo_data, tmp_path_factory):
    """The stage through the command line: killed half-way, then started again."""
    output = tmp_path_factory.mktemp("sft") / "hf"
    arguments = stage2_arguments(demo_data, output, *SHORT)
    partial = output.with_name("hf.partial")
    process = subprocess.Popen(
        command_of("stages.stage2_sft", *arguments, processes=2),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not ((partial / "metrics.jsonl").is_file() and (partial / "metrics.jsonl").read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
    finally:
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        orphans = psutil.wait_procs(workers, timeout=10)[1]
        for each in orphans:
            each.kill()
    assert len(workers) >= 2 and not orphans, "workers that outlive their launcher would disturb the next attempt"
    killed = output.exists(), (partial / "model.safetensors").exists()
    result = run_module("stages.stage2_sft", *arguments, processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    return output, killed, result


def test_killed_half_way_leaves_no_output(finished):
    assert finished[1] == (False, False)
    assert not finished[0].with_name("hf.partial").exists()


def test_the_loss_falls_and_is_logged(finished, demo_data):
    output, _, result = finished
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[0]["loss"] > 5 and rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    assert [row["learning_rate"] for row in rows[:5]] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3])
    assert all(row["grad_norm"] > 0 and row["seconds"] > 0 for row in rows)
    manifest = read_manifest(output)
    assert manifest.stage == "stage2_sft" and manifest.counts["final_loss"] == rows[-1]["loss"]
    assert manifest.recipe.inputs["data"] == read_manifest(demo_data).fingerprint
    assert "12/12" in result.stderr and f"loss {rows[-1]['loss']:.4f}" in result.stdout


def test_done_is_skipped_quickly(finished, demo_data):
    started = time.monotonic()
    result = run_module("stages.stage2_sft", *stage2_arguments(demo_data, finished[0], *SHORT), env=FIRST_OF_TWO)
    assert result.returncode == 0 and "nothing to do" in result.stdout
    assert time.monotonic() - started < 8, "torch and deepspeed are not imported for that"


def test_single_process_without_a_launcher_and_a_diverging_run(demo_data, tmp_path):
    overrides = settings(
        "sft.processes=1", "sft.learning_rate=1.0e+30", "sft.steps=6", "sft.warmup_steps=0", "sft.zero_stage=1"
    )
    result = run_module("stages.stage2_sft", *stage2_arguments(demo_data, tmp_path / "hf", *overrides))
    assert result.returncode == 2
    assert "error: step 2: loss nan" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "overrides, env, message",
    [
        (["sft.processes=1"], FIRST_OF_TWO, "2 processes were started, sft.processes is 1"),
        ([], {}, "1 processes were started, sft.processes is 2: start with torchrun --nproc-per-node 2"),
        (["sft=null", "data.sft=null"], {}, "sft is null"),
    ],
)
def test_bad_starts(overrides, env, message, demo_data, tmp_path):
    result = run_module(
        "stages.stage2_sft", *stage2_arguments(demo_data, tmp_path / "hf", *settings(*overrides)), env=env
    )
    assert result.returncode == 2 and result.stderr.startswith("error: ") and message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_refused(demo_data, tmp_path):
    make_tiny_model(tmp_path / "other", 1, TinySizes(vocab_size=384))
    arguments = ["--config", DEMO_CONFIG, "--data", demo_data, "--hf", tmp_path / "other", "--output", tmp_path / "hf"]
    result = run_module("stages.stage2_sft", *arguments, *settings("sft.processes=1"))
    assert result.returncode == 2 and "its tokenizer.json is not the one" in result.stderr

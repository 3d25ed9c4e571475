"""--fit by arithmetic and with traces made by hand; machine files; disk, servers and host memory by hand.

That least_bytes is below what a trace finds: test_plan.py, which traces.
"""

from dataclasses import replace

import pytest
import yaml

from megatron_papo.config_files import load_config, resolve_config
from megatron_papo.errors import UserError
from megatron_papo.plan import estimates
from megatron_papo.plan.fit import candidates, check_gpus, fitting, least_bytes
from megatron_papo.plan.machine_file import Traced, machine_file
from megatron_papo.plan.memory import host_bytes
from megatron_papo.plan.plan import Question, problems_of_server
from megatron_papo.plan.seconds import seconds_of
from megatron_papo.plan.workload import usual
from tests.helpers import ROOT, run_module
from tests.workers.plan_worker import model_of

PUBLISHED = ROOT / "configs" / "papo_g_3b.yaml"
MACHINES = {
    # file: (size, GB of a GPU, what was asked beside the preset and the size)
    "3b_8x80gb": ("3b", 80, "--fit --gpus 8 --top 1"),
    "7b_8x80gb": ("7b", 80, "--fit --gpus 8 --top 1"),
    "3b_8x40gb": ("3b", 40, "--fit --gpus 8 --top 1 --gpu-memory 40GB"),
    "3b_4x80gb": ("3b", 80, "--fit --gpus 4 --top 1"),
    "7b_4x80gb": ("7b", 80, "--fit --gpus 4 --top 1"),
    "32b_24x80gb": ("32b", 80, "--rank 0"),
    "72b_40x80gb": ("72b", 80, "--rank 0"),
}


def question_of(config, gigabytes=80):
    return Question(usual(config, 1000, 250, 900), gigabytes * 10**9, [0], exact=False, mfu=0.25, gpu="H100")


def traces_of(needs):
    """Traces whose peak is needs(config) bytes, whatever the layers; and what was asked for."""
    calls = []

    def traces(asked):
        calls.append([each.config for each in asked])
        phases = ("build", "resident", "update", "optimizer")
        return [
            {"parameters": 9, "pinned": 0}
            | {f"{phase}/all/{kind}": needs(each.config) for phase in phases for kind in ("peak", "live")}
            for each in asked
        ]

    return traces, calls


@pytest.fixture(scope="module")
def config():
    return load_config(PUBLISHED)


def test_the_fastest_that_fits_is_found_and_what_is_slower_is_not_traced(config):
    """A GPU holds what has at most two pipeline stages' worth of replicas: 4 data-parallel ranks, no whole activations,
    and at most 16384 tokens."""

    def needs(of):
        large = of.parallel.data_parallel_size > 4 or of.model.recompute == "none"
        return 10**11 if large or of.training.max_tokens_per_micro_batch > 16384 else 10**9

    hf, question = model_of("3b"), question_of(config)
    could = candidates(config, hf, 8, question)
    seconds = [each.seconds.iteration for each in could]
    assert seconds == sorted(seconds) and len({(each.kind, each.size) for each in could}) == len(could)
    expected = [each for each in could if needs(each.config) < 10**10][0]
    traces, calls = traces_of(needs)
    found = list(fitting(could, hf, question, traces, count=1, at_once=1))
    assert [plan.fits for _, plan in found] == [False] * (len(found) - 1) + [True]
    assert found[-1][0] == expected
    traced = [call[0] for call in calls]
    assert all(could[0].seconds.iteration <= each[0].seconds.iteration <= expected.seconds.iteration for each in found)
    assert (
        len(traced)
        == len(found)
        < len([each for each in could if each.seconds.iteration < expected.seconds.iteration]) + 2
    )
    several = list(fitting(could, hf, question, traces, count=3, at_once=2))
    kinds = [candidate.kind for candidate, plan in several if plan.fits]
    assert len(kinds) == len(set(kinds)) == 3


def test_every_candidate_uses_all_gpus_and_goes_together(config):
    """Of one node shared or divided; of several the first one samples."""
    hf = model_of("7b")
    for gpus in (4, 8, 24):
        for each in candidates(config, hf, gpus, question_of(config)):
            of, server = each.config, each.config.server
            serving = server.replicas * server.tensor_parallel_size
            assert of.parallel.world_size + (0 if server.shares_gpus else serving) == gpus
            assert of.parallel.tensor_model_parallel_size in (1, 2, 4)  # 8 does not divide 28 heads
            assert not server.shares_gpus or (gpus <= 8 and of.checkpoint_every == 1)
        assert type(of).model_validate(of.model_dump()) == of  # of the last of them: its keys go together


def test_nothing_fits_where_the_state_alone_is_too_large(config):
    """72 G parameters x 18 bytes over 8 GPUs are 165 GB each."""
    hf = model_of("72b")
    assert candidates(config, hf, 8, question_of(config)) == []
    one = load_config(PUBLISHED, ["parallel.tensor_model_parallel_size=8", "parallel.data_parallel_size=1"])
    assert least_bytes(one, hf) >= 18 * 73_410_777_344 / 8


@pytest.mark.parametrize("gpus, said", [(0, "give the number of GPUs"), (-2, "at least 1"), (12, "a multiple of 8")])
def test_no_number_of_gpus(gpus, said):
    with pytest.raises(UserError, match=said):
        check_gpus(gpus)


def test_the_slower_way_is_estimated_slower(config):
    """Each change costs time for a reason that the estimate knows; a lower MFU does in proportion."""
    hf, question = model_of("3b"), question_of(config)

    def seconds(*changes, mfu=0.25):
        changed = load_config(PUBLISHED, ["parallel.data_parallel_size=4", *changes])
        flops = estimates.work_of_iteration(changed, hf, question.usual)[1]
        return seconds_of(changed, hf, question.usual, flops, question.gpu_bytes, mfu, "H100")

    two = ["parallel.tensor_model_parallel_size=2", "parallel.data_parallel_size=2"]
    parallel = [*two, "parallel.sequence_parallel=true"]
    plain = seconds("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false")
    assert seconds(*parallel).training > plain.training  # all-reduces
    assert seconds(*parallel, "parallel.vision_tower=spread").training < seconds(*parallel).training
    assert seconds(*parallel, "model.recompute=none").training < seconds(*parallel).training
    stages = ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]
    piped = seconds(*stages, "parallel.pipeline_model_parallel_size=2", "parallel.data_parallel_size=2")
    assert piped.training > plain.training  # bubble
    shared = seconds(*stages, "server.shares_gpus=true", "checkpoint_every=1")
    assert shared.saving > 4 * seconds(*stages, "server.shares_gpus=false", "checkpoint_every=10").saving
    half = seconds(*stages, mfu=0.125).training
    assert 1.9 * plain.training < half <= 2 * plain.training


def test_disk_by_the_cadence(config):
    """14 + 2 bytes a parameter in a whole iteration, 2 + 2 in those between, nothing where exports are in memory."""
    hf = model_of("3b")
    for changes, per_parameter in (
        (["checkpoint_every=1"], 16),
        (["checkpoint_every=10"], (16 + 9 * 4) / 10),
        (["checkpoint_every=10", "export_directory=/dev/shm"], 1.6),
        (["checkpoint_every=10", "save_while_sampling=true"], (18 + 9 * 4) / 10),
    ):
        changed = load_config(PUBLISHED, ["server.shares_gpus=false", *changes])
        assert estimates.disk_bytes(changed, hf).iteration == int(3_754_622_976 * per_parameter)


def test_servers_and_host_memory(config):
    """Weights and cache in the model's dtype; weights of servers that wait, exports, and what a frozen tower says."""
    hf, parameters = model_of("3b"), 3_754_622_976
    half = estimates.server_share(config, hf, 80 * 10**9)
    whole = estimates.server_share(load_config(PUBLISHED, ["model.dtype=float32"]), hf, 80 * 10**9)
    assert (half.weights, whole.weights) == (2 * parameters, 4 * parameters)
    assert half.cache_tokens == (64 * 10**9 - 2 * parameters) // (2 * 2 * 36 * 2 * 128)
    assert whole.cache_tokens == (64 * 10**9 - 4 * parameters) // (4 * 2 * 36 * 2 * 128)

    base = ["server.shares_gpus=false", "checkpoint_every=10"]
    numbers = {"pinned": 0}

    def host(*changes):
        return host_bytes(numbers, load_config(PUBLISHED, [*base, *changes]), parameters)

    shared = host("server.shares_gpus=true", "checkpoint_every=1", "server.replicas=8")
    assert shared.servers == 8 * 2 * parameters and host().servers == 0
    assert host("export_directory=/dev/shm").exports == 3 * 2 * parameters
    frozen = host("model.freeze=[vision_tower]", "training.encoded_picture_gigabytes=3")
    assert frozen.pictures - host().pictures == frozen.processes_on_node * 3 * 10**9


def test_a_server_must_leave_the_trainers_context(config):
    """0.8 of 40 GB are 32; 3 GB beside and 2 GB of a trainer that waits are left, of 20 GB they are not."""
    hf = model_of("3b")
    shared = load_config(PUBLISHED, ["server.shares_gpus=true", "checkpoint_every=1"])
    assert problems_of_server(estimates.server_share(shared, hf, 40 * 10**9), shared, 40 * 10**9) == []
    (problem,) = problems_of_server(estimates.server_share(shared, hf, 20 * 10**9), shared, 20 * 10**9)
    assert problem.startswith("server.memory_fraction 0.8 leaves 4.0 GB") and "memory_fraction=0.75" in problem


def test_a_frozen_tower_encodes_each_picture_once(config):
    """384 pictures and their masked ones; trained, it does so in every pass, forward and backward."""
    hf, lengths = model_of("3b"), usual(config, 1000, 250, 900)
    frozen = load_config(PUBLISHED, ["model.freeze=[vision_tower]"])
    other = replace(lengths, picture=(1, 0, 0))
    with_pictures = estimates.work_of_iteration(frozen, hf, lengths)[1]
    without = estimates.work_of_iteration(frozen, hf, other)[1]
    from megatron_papo.training.accounting import merger_flops, tower_flops

    more = with_pictures.sweeps - without.sweeps
    passes = 128 * (1 + 1) + 256 * (1 + 2)  # reference; masked; of later steps the old policy, too
    assert more == 768 * tower_flops(hf.vision, lengths.picture) + passes * sum(
        merger_flops(hf.vision, lengths.picture)
    )


def written(name, **changes):
    """What the command would write now, with the traced numbers that the file has; and the file."""
    size, gigabytes, asked = MACHINES[name]
    file = ROOT / "configs" / f"{name}.yaml"
    text = file.read_text()
    config = resolve_config(file, below=ROOT / "configs" / "published.yaml").config.model_copy(update=changes)
    base = load_config(ROOT / "configs" / "published.yaml", [f"model.path={config.model.path}"])
    preset = f"configs/papo_g_{size}.yaml"
    command = f".venv/bin/python -m tools.plan_memory --config {preset} --geometry {size} {asked}".strip()
    question = question_of(config, gigabytes)
    return machine_file(config, base, model_of(size), question, Traced.read(text), preset, command), text


@pytest.mark.parametrize("name", MACHINES)
def test_machine_files_are_what_the_command_writes(name):
    """All but the five numbers that need a trace: those are compared nightly."""
    now, text = written(name)
    assert now == text
    assert written(name, keep_exports=50)[0] != text  # control
    assert yaml.safe_load(text)["model"]["path"] == f"Qwen2.5-VL-{MACHINES[name][0].upper()}-Instruct"


@pytest.mark.parametrize("name", MACHINES)
def test_machine_files_state_what_a_trace_finds(name, tmp_path):
    size, gigabytes, _ = MACHINES[name]
    (tmp_path / "preset.yaml").write_text(f"extends: [{ROOT}/configs/published.yaml, {ROOT}/configs/{name}.yaml]\n")
    arguments = ["--config", tmp_path / "preset.yaml", "--geometry", size, "--gpu-memory", f"{gigabytes}GB"]
    file = tmp_path / "written.yaml"
    done = run_module("tools.plan_memory", *arguments, "--write", file, timeout=3000)
    assert done.returncode == 0, done.stderr
    assert Traced.read(file.read_text()) == Traced.read((ROOT / "configs" / f"{name}.yaml").read_text())


def test_another_comment_is_refused():
    with pytest.raises(UserError, match="write the file again"):
        Traced.read("# 37 GB before activations")

"""Plans against real steps on a CPU, counted by torch's profiler; few layers against all; the cache; what does not fit.

NOT covered here: a GPU, where a plan has not been compared with peak_memory_bytes yet.
"""

import json
from dataclasses import asdict

import pytest

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.plan import cache
from megatron_papo.plan.layers import Layers, Place, told
from megatron_papo.plan.memory import rank_plan
from megatron_papo.plan.plan import changes, first_ranks, needed, problems_of_training
from megatron_papo.plan.workload import Lengths, longest, picture_of, rows_of, usual
from tests.helpers import DEMO_CONFIG, ROOT, run_module
from tests.workers.plan_worker import model_of


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What tests/workers/plan_worker.py measured and planned."""
    file = tmp_path_factory.mktemp("plan") / "found.json"
    done = run_module("tests.workers.plan_worker", file, "first stage", timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def within(planned: int, measured: int, share: float) -> bool:
    return abs(planned - measured) <= share * measured


@pytest.mark.parametrize("phase", ["sweep_policy", "update"])
def test_a_real_step_holds_as_much(found, phase):
    """Of what comes on top of the resident state; a fiftieth of a percent was measured: small tensors of the host."""
    planned, measured = found["planned"][phase], found["measured"][phase]
    assert within(planned, measured, 0.005)
    assert not within(planned + planned // 50, measured, 0.005)  # negative control


@pytest.mark.parametrize("phase", ["sweep_policy", "update"])
def test_a_real_step_of_true_width_holds_as_much(tmp_path, phase):
    done = run_module("tests.workers.plan_worker", tmp_path / "found.json", "true_width", timeout=3000)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert within(found["planned"][phase], found["measured"][phase], 0.05)


def test_the_resident_state_is_what_the_recipe_says(found):
    """bfloat16 weights 2, fp32 gradients 4, main parameters and two moments 12; 512 bytes a tensor of rounding."""
    bytes_of = 18 * found["parameters"]
    assert bytes_of <= found["resident"] <= bytes_of + 512 * 4 * 200


def differences(case: dict) -> dict:
    """What few layers tell otherwise than all, beyond the padding of buckets and the rounding of the allocator."""
    exact, few = case["exact"], case["told"]
    bytes_of = [key for key in exact if key.endswith(("/peak", "/live", "pinned")) or "communication" in key]
    return {key: (few[key], exact[key]) for key in bytes_of if abs(few[key] - exact[key]) > 4096}


def test_few_layers_tell_all(found):
    case = found["cases"]["first stage"]
    assert case["told"]["parameters"] == case["exact"]["parameters"] and differences(case) == {}
    assert differences({**case, "told": {key: 2 * value for key, value in case["told"].items()}})  # negative control


def test_few_layers_tell_all_of_other_layouts(tmp_path):
    names = ["plain", "group", "no recompute", "last stage", "spread", "two replicas"]
    done = run_module("tests.workers.plan_worker", tmp_path / "found.json", *names, timeout=3000)
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert {name: differences(case) for name, case in cases.items()} == dict.fromkeys(names, {})


# -- without torch's fake tensors --------------------------------------------------------------------------------------


def trace_of_sizes(config, hf, rank, lengths):
    """A trace whose numbers grow evenly, by hand."""
    numbers = {"parameters": 100 + 10 * hf.text.num_layers, "main_parameters": 5, "pinned": 200}
    whole = len(hf.vision.full_attention_layers)
    held = 1000 + 7 * hf.text.num_layers + 3 * (hf.vision.depth - whole) + 2 * whole
    for phase in ("build", "resident", "update", "optimizer"):
        numbers |= {f"{phase}/all/peak": held + 50, f"{phase}/all/live": held}
    return numbers


@pytest.fixture
def config():
    return load_config(DEMO_CONFIG, ["parallel.tensor_model_parallel_size=2", "parallel.data_parallel_size=2"])


def test_told_by_hand(config):
    """36 / 2 decoder layers a stage, 28 windowed, 4 whole: each kind once more, and no other."""
    hf, calls = model_of("3b"), []

    def trace(config, hf, rank, lengths):
        calls.append((hf.text.num_layers, hf.vision.depth, hf.vision.full_attention_layers))
        return trace_of_sizes(config, hf, rank, lengths)

    assert told(trace, config, hf, 0, longest(config)) == trace_of_sizes(config, hf, 0, longest(config))
    assert calls == [(4, 3, (2,)), (6, 3, (2,)), (4, 4, (3,)), (4, 4, (2, 3))]
    calls.clear()
    told(trace, config, hf, 4, longest(config))  # the second stage has no tower
    assert calls == [(4, 3, (2,)), (6, 3, (2,))]


def test_a_tower_that_ends_with_windows_keeps_its_last_kind():
    hf = model_of("3b", fullatt_block_indexes=[3, 7])
    assert Layers(2, 2, 1).of_model(hf, 1).vision.full_attention_layers == (0,)


def test_places_are_megatron_cores(config):
    """Tensor ranks side by side, then data, then pipeline: parallel_state's default order."""
    assert Place.of(6, config.parallel) == Place(6, tensor=0, pipeline=1, data=1)
    assert first_ranks(config) == [0, 4]


def test_traces_are_kept_and_a_damaged_one_is_made_again(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hf, calls = model_of("tiny"), []

    def trace(*of):
        calls.append(of)
        return trace_of_sizes(*of)

    remembered = cache.cached(trace)
    with pytest.raises(LookupError):
        cache.cached(trace, only_there=True)(config, hf, 0, longest(config))
    first = remembered(config, hf, 0, longest(config))
    assert remembered(config, hf, 0, longest(config)) == first and len(calls) == 1
    other = load_config(DEMO_CONFIG, ["training.micro_batch_size=3"])
    for of in ((config, hf, 1), (other, hf, 0), (config, model_of("tiny", num_hidden_layers=8), 0)):
        remembered(*of, longest(config))
    assert len(calls) == 4
    for file in cache.directory().glob("*.json"):
        file.write_text("{")
    assert remembered(config, hf, 0, longest(config)) == first and len(calls) == 5


def test_what_does_not_fit_says_where_and_what_to_change(config):
    plan = rank_plan(trace_of_sizes(config, model_of("tiny"), 7, None), Place.of(7, config.parallel))
    assert list(plan.phases) == ["build", "resident", "update", "optimizer", "save", "export"]
    assert problems_of_training(plan, needed(plan, config), config, 10**10) == []
    (problem,) = problems_of_training(plan, needed(plan, config), config, 10**9)
    assert problem.startswith("rank 7 (tensor 1, pipeline 1, data 1) needs 2.0 GB in phase ")
    assert "1.0 GB more than a GPU has: --set " in problem
    settings = changes(load_config(DEMO_CONFIG, ["model.recompute=none"]), "update")
    assert settings[0] == "model.recompute=full"
    assert changes(config, "resident")[0].startswith("parallel.tensor_model_parallel_size=4")


def test_lengths(config):
    """The largest picture of 1280 tokens is 32 x 40 of them; nothing longer than the configuration admits."""
    assert picture_of(1280) == (1, 64, 80) and picture_of(0) == (1, 0, 0)
    published = load_config(ROOT / "configs" / "papo_g_3b.yaml")
    assert asdict(longest(published)) == {"prompt_tokens": 4096, "response_tokens": 2048, "picture": (1, 64, 80)}
    assert usual(published, 9999, 9999, 9999) == longest(published)
    rows = rows_of(model_of("tiny"), config, Lengths(20, 7, (1, 4, 6)), 3)
    assert len(rows) == 3 * config.rollout.group_size
    assert rows[0].prompt_token_ids.count(model_of("tiny").image_token_id) == 6
    assert (len(rows[0].prompt_token_ids), rows[0].response_length) == (20, 7)
    with pytest.raises(UserError, match="cannot hold a picture of 6"):
        rows_of(model_of("tiny"), config, Lengths(6, 7, (1, 4, 6)), 3)

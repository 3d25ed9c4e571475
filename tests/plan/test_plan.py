"""Plans against real steps on a CPU, counted by torch's profiler; few layers against all; the cache; what does not fit.

NOT covered here: a GPU, where a plan has not been compared with peak_memory_bytes yet.
"""

import json
from random import Random

import pytest

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.plan import cache
from megatron_papo.plan.fake_device import Place
from megatron_papo.plan.layers import Asked, Layers, told
from megatron_papo.plan.memory import rank_plan
from megatron_papo.plan.plan import changes, first_ranks, needed, problems_of_training
from megatron_papo.plan.workload import Lengths, fullest, longest, picture_of, rows_of, usual
from megatron_papo.training.layouts import layout_of
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
    """Of what comes on top of the resident state. A sweep with several pictures in a prompt was 2.8 % off, not
    explained yet: the host's own tensors are in what is measured on a CPU, and not in the plan."""
    planned, measured = found["planned"][phase], found["measured"][phase]
    share, control = {"sweep_policy": (0.035, 10), "update": (0.005, 50)}[phase]
    assert within(planned, measured, share)
    assert not within(planned + planned // control, measured, share)  # negative control


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


def test_what_is_not_traced_would_not_fit(found):
    """--fit leaves out what arithmetic shows to be too large: never more than a trace finds."""
    case = found["cases"]["first stage"]
    peak = max(value for name, value in case["exact"].items() if name.endswith("/peak"))
    assert 0.05 * peak < case["least"] <= peak


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
    for case in cases.values():
        assert case["least"] <= max(value for name, value in case["exact"].items() if name.endswith("/peak"))


# -- without torch's fake tensors --------------------------------------------------------------------------------------


def trace_of_sizes(config, hf, rank):
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
    """36 / 2 decoder layers a stage, 28 windowed, 4 whole: each kind once more, and no other; the second stage has no
    tower."""
    hf, calls = model_of("3b"), []

    def traces(asked):
        calls.extend((each.rank, each.hf.text.num_layers, each.hf.vision.full_attention_layers) for each in asked)
        return [trace_of_sizes(*each) for each in asked]

    assert told(traces, config, hf, [0, 4])[0] == trace_of_sizes(config, hf, 0)
    assert calls == [(0, 4, (2,)), (0, 6, (2,)), (0, 4, (3,)), (0, 4, (2, 3)), (4, 4, (2,)), (4, 6, (2,))]
    calls.clear()
    told(traces, config, hf, [0], exact=True)
    assert calls == [(0, 36, (7, 15, 23, 31))]


def test_a_tower_that_ends_with_windows_keeps_its_last_kind():
    hf = model_of("3b", fullatt_block_indexes=[3, 7])
    assert Layers(2, 2, 1).of_model(hf, 1).vision.full_attention_layers == (0,)


def test_places_are_megatron_cores(config):
    """Tensor ranks side by side, then data, then pipeline: parallel_state's default order."""
    assert Place.of(6, config.parallel) == Place(6, tensor=0, pipeline=1, data=1)
    assert first_ranks(config) == [0, 4]
    many = load_config(DEMO_CONFIG, ["parallel.pipeline_model_parallel_size=4", "parallel.data_parallel_size=2"])
    assert first_ranks(many) == [0, 4, 12]  # the third has fewer micro-batches under way than the second


def test_traces_are_kept_and_a_damaged_one_is_made_again(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hf, calls = model_of("tiny"), []

    def traces(asked):
        calls.extend(asked)
        return [trace_of_sizes(*each) for each in asked]

    remembered, own = cache.cached(traces), Asked(config, hf, 0)
    with pytest.raises(LookupError):
        cache.cached(cache.nothing)([own])
    first = remembered([own, own])
    assert first[0] == first[1] and len(calls) == 1
    assert remembered([own]) == first[:1] == cache.cached(cache.nothing)([own]) and len(calls) == 1
    settings = ["training.micro_batch_size=3", "data.max_pixels=99999", "rollout.max_response_tokens=7"]
    others = [Asked(load_config(DEMO_CONFIG, [setting]), hf, 0) for setting in settings]
    remembered([own, Asked(config, hf, 1), Asked(config, model_of("tiny", num_hidden_layers=8), 0), *others])
    assert len(calls) == 6
    for file in cache.directory().glob("*.json"):
        file.write_text("{")
    assert remembered([own]) == first[:1] and len(calls) == 7


def test_what_does_not_fit_says_where_and_what_to_change(config):
    plan = rank_plan(trace_of_sizes(config, model_of("tiny"), 7), Place.of(7, config.parallel))
    assert list(plan.phases) == ["build", "resident", "update", "optimizer", "save", "export"]
    assert problems_of_training(plan, needed(plan, config), config, 10**10) == []
    (problem,) = problems_of_training(plan, needed(plan, config), config, 10**9)
    assert problem.startswith("rank 7 (tensor 1, pipeline 1, data 1) needs 2.0 GB in phase ")
    assert "1.0 GB more than a GPU has: --set " in problem
    settings = changes(load_config(DEMO_CONFIG, ["model.recompute=none"]), "update")
    assert settings[0] == "model.recompute=full"
    assert changes(config, "resident")[0].startswith("parallel.tensor_model_parallel_size=4")


def test_lengths(config):
    """The largest picture of 1280 tokens is 32 x 40 of them, and a prompt of 4096 holds four of 1023: 31 x 33."""
    assert picture_of(1280) == (1, 64, 80) and picture_of(0) == (1, 0, 0)
    published = load_config(ROOT / "configs" / "papo_g_3b.yaml")
    assert longest(published) == Lengths(4096, 2048, (1, 62, 66), 4)
    assert usual(published, 9999, 9999, 9999) == Lengths(4096, 2048, (1, 64, 80), 1)
    none = load_config(DEMO_CONFIG, ["data.min_pixels=784", "data.max_pixels=784", "data.max_prompt_tokens=1"])
    assert longest(none).image_tokens == 0
    rows = rows_of(model_of("tiny"), config, Lengths(20, 7, (1, 4, 6), 2), range(5, 8))
    assert len(rows) == 3 * config.rollout.group_size and rows[0].rollout.group == 5
    assert rows[0].prompt_token_ids.count(model_of("tiny").image_token_id) == 12 and len(rows[0].grids) == 2
    assert (len(rows[0].prompt_token_ids), rows[0].response_length) == (20, 7)
    with pytest.raises(UserError, match="cannot hold pictures of 6"):
        rows_of(model_of("tiny"), config, Lengths(6, 7, (1, 4, 6)), range(3))


def most_of_micro_batches(config, hf, lengths_of_groups, copies):
    """The most tokens, response tokens and image tokens of micro-batches, as the layout cuts these groups."""
    rows = [
        row
        for group, lengths in enumerate(lengths_of_groups)
        for row in rows_of(hf, config, lengths, range(group, group + 1))
    ]
    most = (0, 0, 0)
    layout = layout_of(config.training)
    for part in layout.plan(rows, config.training.micro_batch_size, copies):
        prompts = [of_prompt[0] for of_prompt in layout.by_prompt(part)]
        images = sum(row.prompt_token_ids.count(hf.image_token_id) for row in prompts)
        counts = (sum(layout.row_lengths(part)), sum(row.response_length for row in part), images)
        most = tuple(map(max, most, counts))
    return most


@pytest.mark.parametrize("layout", ["group", "plain"])
@pytest.mark.parametrize("copies", [1, 2])
def test_no_admitted_rollouts_make_fuller_micro_batches(layout, copies):
    """Random groups within the limits, cut by the layout itself: a picture's sides are whole tokens, so up to a
    fiftieth of the image tokens is left to them."""
    config = load_config(ROOT / "configs" / "papo_g_3b.yaml", [f"training.layout={layout}"])
    hf, random = model_of("tiny"), Random(3)
    kinds = fullest(config, copies)
    assert len(kinds) == (2 if layout == "group" else 1)
    of_kinds = [most_of_micro_batches(config, hf, [lengths] * 16, copies) for lengths in kinds]
    tokens, responses, images = (max(numbers) for numbers in zip(*of_kinds, strict=True))
    if layout == "group":
        assert 16384 // copies - 20 <= tokens <= 16384 // copies
        of_longest = most_of_micro_batches(config, hf, [longest(config)] * 16, copies)
        assert of_longest[2] < 0.6 * images and of_longest[1] < responses  # control: others are fuller
    for _ in range(60):
        groups = []
        for _ in range(24):
            count, size = random.randint(0, 4), random.choice([256, 700, 1023, 1280])
            picture = picture_of(min(size, 4000 // max(count, 1)))
            used = count * picture[1] * picture[2] // 4
            prompt = used + random.choice([2, 16, 4096 - used if used else 50])
            response = random.choice([1, 20, random.randint(1, 2048), 2048])
            groups.append(Lengths(prompt, response, picture if count else (1, 0, 0), max(count, 1)))
        found = most_of_micro_batches(config, hf, groups, copies)
        assert found[0] <= 16384 // copies if layout == "group" else found[0] <= tokens
        assert found[1] <= responses + 20 and found[2] <= 1.02 * images

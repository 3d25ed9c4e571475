"""Configuration files: extending others, where a value comes from, writing a configuration, and files that are none."""

from pathlib import Path

import pytest
import yaml

from megatron_papo.config import Config, changes, value_of
from megatron_papo.config_files import dump_config, load_config, resolve_config
from megatron_papo.errors import UserError
from tests.helpers import DEMO_CONFIG, ROOT

PRESETS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if "extends:" in path.read_text())


def write(directory: Path, **texts: str) -> Path:
    """Files in a directory, each with the content given; returns that of the name `top`."""
    for name, text in texts.items():
        (directory / f"{name}.yaml").write_text(text)
    return directory / "top.yaml"


@pytest.fixture
def base(tmp_path) -> Path:
    """A directory with base.yaml, which is the demo."""
    (tmp_path / "base.yaml").write_text(DEMO_CONFIG.read_text())
    return tmp_path


def refused(path: Path, *overrides: str) -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parts_override_the_base_the_file_overrides_the_parts_and_set_overrides_all(base):
    top = write(
        base,
        a="optimizer: {learning_rate: 2.0e-3, clip_grad: 2.0}\nseed: 5",
        b="reward: {workers: 3}\nrollout: {top_p: 0.5}",
        top="extends: [base.yaml, a.yaml, b.yaml]\nseed: 6\nrollout: {top_p: 0.6}",
    )
    resolved = resolve_config(top, ["rollout.top_p=0.7"])
    config = resolved.config
    assert (config.optimizer.learning_rate, config.optimizer.clip_grad, config.reward.workers) == (2e-3, 2.0, 3)
    assert (config.seed, config.rollout.top_p) == (6, 0.7)
    assert config.optimizer.warmup_steps == 16 and config.rollout.group_size == 8  # the base's
    assert {change.key for change in changes(load_config(base / "base.yaml"), config)} == {
        "seed",
        "optimizer.learning_rate",
        "optimizer.clip_grad",
        "reward.workers",
        "rollout.top_p",
    }
    assert resolved.base == str(base / "base.yaml")
    for key, source in {
        "seed": str(top),
        "optimizer.clip_grad": str(base / "a.yaml"),
        "reward.workers": str(base / "b.yaml"),
        "optimizer.warmup_steps": str(base / "base.yaml"),
        "rollout.top_p": "--set rollout.top_p=0.7",
        "optimizer.adam_epsilon": "default",
        "server.port": "default",
    }.items():
        assert resolved.source_of(key) == source, key


def test_the_order_of_the_parts_does_not_matter_and_of_the_base_it_does(base):
    write(base, a="seed: 5", b="iterations: 3", first="extends: [base.yaml, a.yaml, b.yaml]")
    assert load_config(base / "first.yaml") == load_config(write(base, top="extends: [base.yaml, b.yaml, a.yaml]"))
    assert load_config(write(base, top="extends: [a.yaml, base.yaml]")).seed == 1


def test_a_section_becomes_null_and_null_becomes_a_section(base):
    top = write(base, a="sft: null\ndata: {sft: null}", top="extends: [base.yaml, a.yaml]")
    resolved = resolve_config(top)
    assert resolved.config.sft is None and resolved.source_of("sft.steps") == str(base / "a.yaml")
    top = write(
        base,
        base2=DEMO_CONFIG.read_text().replace("group_size: 8", "group_size: 8\n  dynamic_sampling: null"),
        top="extends: [base2.yaml]\nrollout: {dynamic_sampling: {max_rounds: 7}}",
    )
    resolved = resolve_config(top)
    assert resolved.config.rollout.dynamic_sampling.max_rounds == 7
    assert resolved.source_of("rollout.dynamic_sampling.max_rounds") == str(top)
    assert resolved.source_of("rollout.dynamic_sampling.highest_accuracy") == "default"
    assert resolve_config(top, ["rollout.dynamic_sampling=null"]).config.rollout.dynamic_sampling is None


def test_set_replaces_a_section_and_fills_one_that_is_null():
    resolved = resolve_config(DEMO_CONFIG, ["data.train={source: synthetic, count: 9}", "data.train.count=8"])
    assert resolved.config.data.train.count == 8
    assert resolved.source_of("data.train.split") == "default"
    with pytest.raises(UserError, match="missing key data.train.source"):
        load_config(DEMO_CONFIG, ["data.train={count: 9}"])
    assert load_config(DEMO_CONFIG, ["objective.kl_prcp_annealing.steps=5"]).objective.kl_prcp_annealing.steps == 5


@pytest.mark.parametrize(
    "one, two, key",
    [
        ("seed: 5", "seed: 5", "seed"),
        ("rollout: {top_p: 0.5}", "rollout: {top_p: 0.6}", "rollout.top_p"),
        ("rollout: {dynamic_sampling: null}", "rollout: {dynamic_sampling: {max_rounds: 3}}",
         "rollout.dynamic_sampling.max_rounds"),
        ("rollout: {dynamic_sampling: {max_rounds: 3}}", "rollout: {dynamic_sampling: {}}",
         "rollout.dynamic_sampling"),
    ],
)  # fmt: skip
def test_two_parts_may_not_set_the_same_key(base, one, two, key):
    """The negative control: in different keys of the same section they may."""
    line = refused(write(base, a=one, b=two, top="extends: [base.yaml, a.yaml, b.yaml]"))
    assert f"both {base / 'a.yaml'} and {base / 'b.yaml'} set {key}" in line
    assert load_config(write(base, a="rollout: {top_p: 0.5}", b="rollout: {temperature: 0.9}")).rollout.top_p == 0.5


@pytest.mark.parametrize("name", ["base", "a"])
def test_what_is_extended_extends_nothing(base, name):
    top = write(base, a="seed: 3", top="extends: [base.yaml, a.yaml]")
    load_config(top)
    path = base / f"{name}.yaml"
    path.write_text("extends: [other.yaml]\n" + path.read_text())
    assert refused(top).startswith(f"{path}: extends another file, and {top} extends it")


@pytest.mark.parametrize("value", ["base.yaml", "[]", "[1]", "{a: 1}"])
def test_extends_is_a_list_of_names(base, value):
    assert "extends: expected a list of file names" in refused(write(base, top=f"extends: {value}"))


def test_a_mistake_is_reported_with_what_made_it(base):
    top = write(
        base, a="optimizer: {learning_rte: 1}", b="rollout: {top_p: 3}", top="extends: [base.yaml, a.yaml, b.yaml]"
    )
    with pytest.raises(UserError) as caught:
        load_config(top, ["reward.workers=many"])
    assert sorted(str(caught.value).splitlines()) == sorted(
        [
            f"{base / 'b.yaml'}: rollout.top_p: Input should be less than or equal to 1 (got 3)",
            "--set reward.workers=many: reward.workers: Input should be a valid integer (got 'many')",
            f"{base / 'a.yaml'}: unknown key optimizer.learning_rte: did you mean learning_rate?",
        ]
    )
    assert refused(write(base, top="extend: [base.yaml]\n" + DEMO_CONFIG.read_text())).endswith(
        "unknown key extend: did you mean extends?"
    )
    assert "only a configuration file can extend others" in refused(DEMO_CONFIG, "extends=[base.yaml]")
    assert "none.yaml: cannot be read" in refused(write(base, top="extends: [base.yaml, none.yaml]"))


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00\xd8", b"\x00", b"seed: \xc3", b"[" * 3000, b"seed: " + b"9" * 5000,
     b"{[1]: 2}", b"<<: 3", b"? !!python/object:os.x"],
    ids=["utf-16", "zero", "utf-8", "deep", "digits", "list as key", "merge", "object"],
)  # fmt: skip
def test_files_that_are_no_configuration_are_one_line(tmp_path, content):
    path = tmp_path / "top.yaml"
    path.write_bytes(content)
    assert str(path) in refused(path)


@pytest.mark.parametrize("key", ["1", "null", "1.5", "2024-01-01", "true"])
def test_a_key_that_is_no_name_is_one_line(tmp_path, key):
    path = tmp_path / "top.yaml"
    path.write_text(f"{DEMO_CONFIG.read_text()}\n{key}: 2\n")
    assert str(path) in refused(path)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", ["reward.accuracy_weight", "optimizer.learning_rate"])
def test_numbers_are_finite(key, value):
    refused(DEMO_CONFIG, f"{key}={value}")
    load_config(DEMO_CONFIG, [f"{key}=2.5"])


@pytest.mark.parametrize("path", [DEMO_CONFIG, *PRESETS], ids=lambda path: path.stem)
def test_what_is_written_is_read_again(tmp_path, path):
    config = load_config(path)
    text = dump_config(config)
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load(text).keys() == Config.model_fields.keys()
    changed = load_config(tmp_path / "config.yaml", ["seed=77"])
    assert [change.key for change in changes(config, changed)] == ["seed"]


@pytest.mark.parametrize(
    "text",
    ["1e-6", "1.5", "null", "true", "", " a", "a ", "a: b", "# no", "{problem}", "é 日本", "a\nb", "a \nb\n", "\n",
     "\ta", "'", '"', "~", "2024-01-01", "- a", "a\u2028b", "\x07", "=", "<<", "0x1f", "1_000", "x" * 300,
     "words " * 60],
)  # fmt: skip
def test_any_text_is_written_and_read_again(tmp_path, text):
    config = load_config(DEMO_CONFIG)
    config = config.model_copy(update={"data": config.data.model_copy(update={"answer_key": text})})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("number", [1e-6, 1e-8, 5e-324, 1e22, 0.1, 1 / 3, 3.0, 1.7976931348623157e308])
def test_numbers_are_written_exactly(tmp_path, number):
    config = load_config(DEMO_CONFIG)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"learning_rate": number})})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_long_text_stays_readable():
    text = dump_config(load_config(ROOT / "configs" / "papo_g_7b.yaml"))
    assert "  prompt_template: |-\n    {problem}\n\n    You first think through" in text
    assert "1.0e-06" in text


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(
        ROOT / "configs" / "papo_g_3b.yaml", ["model.path=~/models/3b", "data.train.source=~/rows.jsonl"]
    )
    assert (config.model.path, config.data.train.source) == ("/home/somebody/models/3b", "/home/somebody/rows.jsonl")


@pytest.mark.parametrize(
    "key", ["model.path", "data.train.source", "data.evaluation.source", "data.image_root", "server.python"]
)
def test_a_home_that_there_is_not_is_one_line(key):
    assert f"{key}: ~nobody_here: no such home directory" in refused(DEMO_CONFIG, f"{key}=~nobody_here/x")
    assert "NUL character" in refused(DEMO_CONFIG, f'{key}="/a\\0b"')


@pytest.mark.parametrize("override", ["=3", ".seed=3", "rollout.=3", "rollout..top_p=3", " =3", "seed"])
def test_a_set_without_a_key_says_what_is_expected(override):
    assert "expected section.key=value" in refused(DEMO_CONFIG, override)


@pytest.mark.parametrize(
    "text, value",
    [("off", "off"), ("Answer: {problem}", "Answer: {problem}"), ("{problem} # 1", "{problem} # 1"),
     ("{problem}", "{problem}"), ('"{problem}\\n"', "{problem}\n"), ("'{problem}'", "{problem}")],
)  # fmt: skip
def test_text_is_taken_as_it_stands(tmp_path, text, value):
    key = "hacking_guard.action" if value == "off" else "data.prompt_template"
    assert value_of(load_config(DEMO_CONFIG, [f"{key}={text}"]), key) == value


@pytest.mark.parametrize("word", ["off", "on", "yes", "no", "1", "1.5", "2024-01-01", "010", "1:30", "0x1f"])
def test_words_that_yaml_has_another_meaning_for_are_text_where_text_is_wanted(tmp_path, word):
    assert load_config(DEMO_CONFIG, [f"data.answer_key={word}"]).data.answer_key == word
    assert load_config(DEMO_CONFIG, [f"server.extra_arguments=[a, {word}]"]).server.extra_arguments == ["a", word]
    (tmp_path / "base.yaml").write_text(DEMO_CONFIG.read_text())
    (tmp_path / "top.yaml").write_text(f"extends: [base.yaml]\ndata: {{answer_key: {word}}}")
    assert load_config(tmp_path / "top.yaml").data.answer_key == word


def test_null_where_a_key_may_be_null():
    assert load_config(DEMO_CONFIG, ["data.system_prompt=null", "data.image_root="]).data.system_prompt is None
    assert load_config(DEMO_CONFIG, ["data.answer_key=null"]).data.answer_key == "null"  # text, where it may not


def test_whole_numbers():
    assert load_config(DEMO_CONFIG, ["seed=1e3"]).seed == 1000 == load_config(DEMO_CONFIG, ["seed=1_000"]).seed
    for text in ("010", "1:30", "1.5", "1e400", "off"):
        refused(DEMO_CONFIG, f"seed={text}")


@pytest.mark.parametrize(
    "override",
    ["seed=!!int x", "seed=" + "[" * 1200, "seed=!!python/object:os.system", "seed==", "seed=*a", "seed=\x00",
     "\udcff=1", "a" * 100_000 + "=1", "seed=" + "9" * 5000, "=", "seed.x=1", "iterations=100000000", "seed={a: 1}"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_overrides_that_are_none_are_one_line(override):
    assert len(refused(DEMO_CONFIG, override)) < 1000


def test_a_small_file_that_holds_a_large_one(tmp_path):
    bomb = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 60))
    (tmp_path / "top.yaml").write_text(bomb)
    assert "*a0 stands for another value: write that out" in refused(tmp_path / "top.yaml")


def test_contradictions_are_said_at_once_each_with_a_set():
    batches = ["rollout.rollout_batch_size=16", "training.global_batch_size=7"]
    with pytest.raises(UserError) as said:
        load_config(DEMO_CONFIG, ["sft=null", *batches, "keep_best=1", "evaluate_every=null"])
    assert len(said.value.lines) == 3 and all(" --set " in line for line in said.value.lines)

"""The ablation rows: each loads and differs from its preset by what it says; the page is up to date; an array has a row
and a seed per task."""

import pytest

from megatron_papo.config import changes
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from tests.helpers import ROOT
from tools.ablations import PAGE, ROWS, ROWS_OF, page, write_array

DIFFERENCES = {
    "gamma_0005_3b": ("papo_g_3b", {"objective.kl_prcp_coef": 0.005}),
    "gamma_001_3b": ("papo_g_3b", {"objective.kl_prcp_coef": 0.01}),
    "gamma_002_3b": ("papo_g_3b", {}),
    "gamma_004_3b": ("papo_g_3b", {"objective.kl_prcp_coef": 0.04}),
    "ratio_04_3b": ("papo_g_3b", {"objective.kl_prcp_coef": 0.01, "masked_image.ratio": 0.4}),
    "ratio_06_3b": ("papo_g_3b", {"objective.kl_prcp_coef": 0.01}),
    "ratio_08_3b": ("papo_g_3b", {"objective.kl_prcp_coef": 0.01, "masked_image.ratio": 0.8}),
    "ratio_10_3b": ("papo_g_3b", {"objective.kl_prcp_coef": 0.01, "masked_image.ratio": 1.0}),
    "semantic_06_3b": ("papo_g_3b", {"objective.kl_prcp_coef": 0.01, "masked_image.strategy": "semantic"}),
    "random_06_7b": ("papo_g_7b", {"objective.entropy_coef": 0.0, "objective.masked_image_entropy_coef": 0.0}),
    "semantic_06_7b": (
        "papo_g_7b",
        {
            "objective.entropy_coef": 0.0,
            "objective.masked_image_entropy_coef": 0.0,
            "masked_image.strategy": "semantic",
        },
    ),
    "no_kl_ref_grpo_3b": ("grpo_3b", {"objective.kl_ref_coef": 0.0}),
    "no_kl_ref_papo_3b": ("papo_g_no_kl_ref_3b", {}),
    "no_kl_ref_grpo_7b": ("grpo_7b", {"objective.kl_ref_coef": 0.0}),
    "no_kl_ref_papo_7b": ("papo_g_no_kl_ref_7b", {}),
    "high_gamma_kl_ref_7b": (
        "papo_g_7b",
        {
            "objective.entropy_coef": 0.0,
            "objective.masked_image_entropy_coef": 0.0,
            "objective.kl_ref_coef": 0.1,
        },
    ),
    "high_gamma_single_entropy_7b": ("papo_g_7b", {"objective.masked_image_entropy_coef": 0.0}),
    "high_gamma_double_entropy_7b": ("papo_g_7b", {}),
    "dapo_7b": ("dapo_7b", {}),
    "dapo_entropy_7b": ("dapo_7b", {"objective.entropy_coef": 0.03}),
    "papo_d_7b": ("papo_d_7b", {}),
}


def test_every_file_is_a_row_and_every_row_a_file():
    assert sorted(path.stem for path in ROWS_OF.glob("*")) == sorted(ROWS) == sorted(DIFFERENCES)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_row_differs_from_its_preset_by_what_it_says(name):
    preset, differences = DIFFERENCES[name]
    row, published = load_config(ROWS_OF / f"{name}.yaml"), load_config(ROOT / "configs" / f"{preset}.yaml")
    assert {change.key: change.new for change in changes(published, row)} == differences


def test_the_page_is_up_to_date_and_marks_what_is_unknown():
    assert PAGE.read_text() == page()
    assert page().count("| not run |") == len(ROWS) and "beta (0.1)" in page()


def test_an_array_has_a_row_and_a_seed_per_task(tmp_path):
    directory = tmp_path / "sweep"
    submit, compare = write_array(directory, ["gamma_0005_3b", "ratio_08_3b"], [4, 5])
    assert "--array 1-4 " in submit and f"--config {directory}/%a.yaml --name sweep_%a" in submit
    assert "gamma_0005_3b=runs/sweep_1,runs/sweep_2 ratio_08_3b=runs/sweep_3,runs/sweep_4" in compare
    configs = [load_config(directory / f"{number}.yaml") for number in (1, 2, 3, 4)]
    assert [config.seed for config in configs] == [4, 5, 4, 5]
    assert [config.objective.kl_prcp_coef for config in configs] == [0.005, 0.005, 0.01, 0.01]
    with pytest.raises(UserError, match="is there already"):
        write_array(directory, ["gamma_0005_3b"], [1])
    with pytest.raises(UserError, match="there is gamma_0005_3b"):
        write_array(tmp_path / "other", ["gamma_1_3b"], [1])
    assert not (tmp_path / "other").exists()

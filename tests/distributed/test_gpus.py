"""Which device a run computes on, and what is said where the GPUs of a machine cannot be used.

A stand-in for nvidia-smi makes a machine with GPUs of this one."""

import os
import re

import pytest
import torch

from megatron_papo.config_files import load_config
from megatron_papo.distributed import gpus, process_groups
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import StageParser
from tests.helpers import DEMO_CONFIG, ROOT
from tools import check_gpu

PRESET = ROOT / "configs" / "papo_g_3b.yaml"
SMI = """#!/bin/sh
case "$*" in
  -L) for number in $(seq {count}); do echo "GPU $number: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"; done ;;
  *driver_version*) for number in $(seq {count}); do echo {driver}; done ;;
  *) exit 1 ;;
esac
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make a machine with so many GPUs and such a driver of this one."""

    def make(count: int, driver: str = "580.65.06", visible: str | None = None, device: str | None = None):
        (tmp_path / "nvidia-smi").write_text(SMI.format(count=count, driver=driver))
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("DEVICE", device)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize(
    "visible, count", [(None, 8), ("", 0), ("-1", 0), ("0,3", 2), ("GPU-1, GPU-2,GPU-3", 3), ("0,-1", 1)]
)
def test_gpus_are_counted(machine, visible, count):
    machine(8, visible=visible)
    assert gpus.count_gpus() == count


def test_no_gpus(machine, monkeypatch, tmp_path):
    machine(0)
    assert gpus.count_gpus() == 0 and gpus.driver_version() is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpus.count_gpus() == 0 and gpus.driver_version() is None and gpus.driver_problem("13.0") is None


@pytest.mark.parametrize(
    "driver, cuda, too_old",
    [
        ("535.183.01", "13.0", True),
        ("575.57.08", "13.1", True),
        ("580.65.06", "13.0", False),
        ("535.183.01", "12.8", False),
        ("470.256.02", "12.8", True),
        ("[N/A]", "13.0", False),
        ("535.183.01", "99.0", False),
    ],
)
def test_drivers(machine, driver, cuda, too_old):
    machine(1, driver)
    problem = gpus.driver_problem(cuda)
    assert (problem is not None) == too_old
    if problem is not None:
        needed = {"13": 580, "12": 525}[cuda[:2]]
        assert f"NVIDIA driver {driver}" in problem and f"needs driver {needed} or newer" in problem
        assert f"cuda-compat-{cuda.replace('.', '-')} " in problem


@pytest.mark.parametrize(
    "config, count, device, expected",
    [
        (PRESET, 8, None, "cuda"),
        (DEMO_CONFIG, 8, None, "cpu"),
        (DEMO_CONFIG, 8, "cuda", "cuda"),
        (PRESET, 8, "cpu", "cpu"),
        (PRESET, 0, None, "cpu"),
        (PRESET, 0, "cuda", "cuda"),
    ],
)
def test_the_device_of_a_run(machine, config, count, device, expected):
    machine(count, device=device)
    config = load_config(config)
    assert gpus.device_of(config) == expected
    said = gpus.hide_unused_gpus(config)
    is_hidden = count > 0 and expected == "cpu"
    assert (said is not None) == is_hidden == (gpus.count_gpus() == 0 and count > 0)
    assert said is None or said.startswith("on the CPUs of this machine") and "DEVICE=" in said
    assert gpus.hide_unused_gpus(config) is None, "said once"


def test_another_device_is_refused(machine):
    machine(1, device="mps")
    with pytest.raises(UserError, match="^DEVICE=mps: expected cpu or cuda: "):
        gpus.device_of(load_config(DEMO_CONFIG))


@pytest.mark.parametrize("config, is_hidden", [(DEMO_CONFIG, True), (PRESET, False)])
def test_a_stage_says_so_and_hides_them(machine, tmp_path, capsys, config, is_hidden):
    machine(8)
    arguments = ["--config", str(config), "--hf", str(tmp_path), "--output", str(tmp_path / "output")]
    StageParser("stage3_convert_to_megatron", "").parse(arguments)
    assert ("on the CPUs of this machine: the tiny model" in capsys.readouterr().out) == is_hidden
    assert gpus.count_gpus() == (0 if is_hidden else 8)


@pytest.mark.parametrize(
    "built_for, driver, message",
    [
        (None, "580.65.06", "8 NVIDIA GPUs here, but torch .* is a build for CPUs: run DEVICE=cuda bash tools/setup"),
        ("13.0", "535.183.01", "NVIDIA driver 535.183.01: torch is built for CUDA 13.0, which needs driver 580"),
        ("13.0", "580.65.06", "8 NVIDIA GPUs here, but torch .*, built for CUDA 13.0, cannot use them"),
    ],
)
def test_gpus_that_torch_cannot_use_end_a_training(machine, monkeypatch, built_for, driver, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    machine(8, driver)
    with pytest.raises(UserError, match=f"^{message}.*CUDA_VISIBLE_DEVICES= ") as caught:
        process_groups.connect()
    assert len(caught.value.lines) == 1
    machine(8, driver, visible="")  # the CPUs are asked for
    gpus.require_usable_gpus()
    machine(0)
    gpus.require_usable_gpus()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    machine(8, driver)
    gpus.require_usable_gpus()


def test_the_check_of_set_up(machine, monkeypatch, capsys):
    machine(8, "535.183.01")
    with pytest.raises(SystemExit) as ended:
        check_gpu.main([])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: NVIDIA driver 535") and error.endswith("set DEVICE=cpu\n")
    machine(8)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, "/gone")
    check_gpu.main([])  # what is missing is no error here
    assert re.search("^warning: no nvcc .*/gone/bin/nvcc.*$", capsys.readouterr().err, re.MULTILINE)
    machine(0)
    check_gpu.main([])
    assert "(needed on the machine with the GPUs, not on this one)" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit):
        check_gpu.main(["--torch"])
    assert re.fullmatch("error: torch .* is a build for CPUs: .*\n", capsys.readouterr().err)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check_gpu.main(["--torch"])  # a login node


@pytest.mark.parametrize("given", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_unless_told_otherwise(monkeypatch, given):
    settings: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append, raising=False)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    process_groups.expand_segments()
    assert settings == (["expandable_segments:True"] if given is None else [])

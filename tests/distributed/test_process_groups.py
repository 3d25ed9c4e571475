"""Impossible parallel sizes are refused in one line before anything heavy is imported."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from megatron_papo.config import ParallelConfig
from megatron_papo.distributed import process_groups
from megatron_papo.errors import UserError
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.model.parallel_sizes import check_parallel_sizes
from tests.model.test_hf_config import OFFICIAL_3B, OFFICIAL_7B


@pytest.fixture
def hf_3b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL_3B))
    return read_hf_config(tmp_path)


@pytest.fixture
def hf_7b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL_7B))
    return read_hf_config(tmp_path)


def sizes(tp=1, pp=1):
    return ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)


def test_published_models_can_be_cut(hf_3b, hf_7b):
    for tp, pp in ((1, 1), (2, 2), (4, 1), (2, 9), (1, 36)):
        check_parallel_sizes(hf_3b, sizes(tp, pp))
    for tp, pp in ((1, 1), (2, 2), (4, 7)):
        check_parallel_sizes(hf_7b, sizes(tp, pp))


@pytest.mark.parametrize(
    "tp, pp, change, message",
    [
        (3, 1, {}, "text attention heads 16"),
        (8, 1, {}, "vision MLP width 3420"),
        (1, 5, {}, "36 text layers"),
        (4, 1, {"text": {"intermediate_size": 11006}}, "text MLP width 11006"),
        (2, 1, {"text": {"vocab_size": 151935}}, "vocabulary 151935"),
        (4, 1, {"vision": {"num_heads": 10}}, "vision attention heads 10"),
        (
            2,
            1,
            {"text": {"num_kv_groups": 3, "num_heads": 18}},
            "neither a divisor nor a multiple of the 3 key-value groups",
        ),
    ],
)
def test_impossible_sizes_name_the_number(hf_3b, tp, pp, change, message):
    parts = {name: dataclasses.replace(getattr(hf_3b, name), **values) for name, values in change.items()}
    with pytest.raises(UserError, match=message) as error:
        check_parallel_sizes(dataclasses.replace(hf_3b, **parts), sizes(tp, pp))
    assert all("model_parallel_size" in line and "--set " in line for line in error.value.lines)


def test_a_spread_tower_need_not_be_cut(hf_3b):
    with pytest.raises(UserError, match="or --set parallel.vision_tower=spread"):
        check_parallel_sizes(hf_3b, sizes(8))
    check_parallel_sizes(hf_3b, ParallelConfig(tensor_model_parallel_size=8, vision_tower="spread"))
    with pytest.raises(UserError, match="text attention heads 16: choose a divisor"):
        check_parallel_sizes(hf_3b, ParallelConfig(tensor_model_parallel_size=3, vision_tower="spread"))


def test_a_wrong_number_of_processes_is_refused_with_the_command(monkeypatch):
    launched = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="3 processes were started.* asks for 4 .*torchrun --nproc-per-node 4"):
        process_groups.initialize(sizes(2, 2))


ALL_OF_THEM = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment, launched",
    [
        (ALL_OF_THEM, True),
        ({"RANK": "1", "WORLD_SIZE": "1"}, False),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, False),
        ({"RANK": "", "WORLD_SIZE": ""}, False),
        ({**ALL_OF_THEM, "RANK": "x"}, False),
        ({**ALL_OF_THEM, "RANK": "-1"}, False),
        ({**ALL_OF_THEM, "RANK": "2"}, False),
        ({**ALL_OF_THEM, "RANK": "²"}, False),
        ({**ALL_OF_THEM, "MASTER_ADDR": ""}, False),
        ({"TORCHELASTIC_RUN_ID": "gone", "GROUP_RANK": "3"}, False),
    ],
)
def test_what_is_left_of_another_launcher_does_not_count(monkeypatch, environment, launched):
    for name in (*process_groups.LAUNCHED, *process_groups.OF_TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (process_groups.rank(), process_groups.world_size()) == ((1, 2) if launched else (0, 1))
    process_groups.forget_left_over()
    assert {name: os.environ[name] for name in environment if name in os.environ} == (environment if launched else {})


@pytest.mark.parametrize("off, status", [(0, 0), (1, 1)])
def test_a_process_whose_launcher_has_ended_already_ends(off, status):
    program = "from megatron_papo.distributed import process_groups as groups; groups.die_with_launcher()"
    launched = {**ALL_OF_THEM, "TORCHELASTIC_RUN_ID": "r", process_groups.LAUNCHER_PID: str(os.getpid() + off)}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **launched}, capture_output=True, text=True
    )
    assert done.returncode == status
    assert done.stderr == "error: the launcher that started this process has ended\n" * status


def test_the_checks_need_no_torch():
    modules = "megatron_papo.distributed.process_groups, megatron_papo.model.hf_config"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_ranks_wait_as_long_in_every_group_and_cudnn_makes_no_plans():
    """A rank may wait for the first one, which hashes, in a group of megatron-core, whose own limit is 30 minutes."""
    import torch

    assert torch.backends.cuda.cudnn_sdp_enabled()  # control: as torch has it
    process_groups.initialize(ParallelConfig())
    try:
        groups = [process_groups.tp_group(), process_groups.dp_group(), torch.distributed.group.WORLD]
        waits = [group._get_backend(process_groups.device()).options._timeout for group in groups]
        assert waits == [process_groups.PATIENCE] * 3
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        process_groups.shutdown()
        torch.backends.cuda.enable_cudnn_sdp(True)

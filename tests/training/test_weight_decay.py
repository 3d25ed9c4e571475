"""Weight decay reaches every parameter, as in the authors' code."""

import pytest
import torch

from megatron_papo.config import OptimizerConfig, ParallelConfig
from megatron_papo.training.optimizer import build_optimizer
from tests.workers import random_model


@pytest.fixture
def one_process():
    from megatron_papo.distributed import process_groups

    process_groups.initialize(ParallelConfig())
    yield
    process_groups.destroy()


def test_biases_and_norms_decay_too(tmp_path, one_process):
    """Without a gradient Adam moves nothing: with learning rate 1 and decay 0.5 each weight is halved, exactly."""
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.model.qwen2_5_vl import build_model

    random_model.hf_config(tied=False).save_pretrained(tmp_path)
    model = build_model(
        read_hf_config(tmp_path), dtype=torch.float32, sequence_parallel=False, recompute="none", vision_tower="sharded"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    wrapped, optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1.0, weight_decay=0.5), torch.float32)
    wrapped.zero_grad_buffer()
    assert optimizer.step()[0]
    left = {name: parameter.unique().tolist() for name, parameter in model.named_parameters()}
    assert left == dict.fromkeys(left, [0.5])
    one_dimensional = [name for name, parameter in model.named_parameters() if parameter.dim() == 1]
    assert any("bias" in name for name in one_dimensional) and any("norm" in name for name in one_dimensional)

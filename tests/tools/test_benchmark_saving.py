"""tools.benchmark.saving, small: a save and a load need a part of the shard, however it is cut; gathering needs it
several times over."""

import json

from tests.helpers import run_module


def test_report():
    result = run_module("tools.benchmark.saving", "--dp", "2", "--hidden", "512")
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    parameters = found["parameters_of_a_rank"]
    assert 8 * parameters <= found["shard_bytes"] < 8.01 * parameters  # weights in bfloat16, half of the rest
    assert 14 * parameters < found["file_bytes"] < 14.1 * parameters
    assert found["gathered"]["tensors"] > 3  # what it was; the control of the measurement
    for name in ("saved", "loaded"):
        assert found[name]["tensors"] < 0.1, name
        assert found[name]["resident"] < 0.7, name  # with four blocks of 16 MiB of the file that is written

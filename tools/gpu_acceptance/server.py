"""Section server: SGLang starts, its log-probs are Megatron's and transformers', and its pictures follow an update."""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tools.gpu_acceptance.report import Line, passed_if
from tools.gpu_acceptance.task import Task

if TYPE_CHECKING:
    from megatron_papo.config import Config

START_SECONDS = 420
"""What SGLang compiles at its first start on a machine may take longer: it is kept, so the next try is faster."""


def run(task: Task) -> Iterator[Line]:
    yield from with_server(task, [], checks)


def server_config(task: Task, changes: list[str]) -> "Config":
    """Return the configuration of a server beside which small models find room."""
    dtype = "float32" if task.device == "cpu" else "bfloat16"
    wanted = [f"server.start_timeout_seconds={START_SECONDS}", "rollout.max_response_tokens=48"]
    return task.config(dtype, [*wanted, *changes])


def with_server(
    task: Task, changes: list[str], checks: "Callable[[Task, Config, Path], Iterator[Line]]"
) -> Iterator[Line]:
    """Start a server, yield what `checks` finds, and stop it.

    Args:
        task: what the section is given.
        changes: settings of the server.
        checks: takes the task, the configuration and the server's directory.
    """
    from megatron_papo.errors import UserError
    from megatron_papo.sglang import server as sglang_server
    from megatron_papo.sglang.server_start import sglang_python

    config, where = server_config(task, changes), task.output / "server"
    try:
        sglang_python(config.server)
    except UserError as error:
        yield Line("SGLang's server", "not possible", str(error))
        return
    hf_dir, _ = task.checkpoint()
    started = time.perf_counter()
    try:
        try:
            sglang_server.connect_or_start_all(where, hf_dir, config.server, config.model.dtype)
        except UserError as error:
            yield Line("SGLang's server starts", "fail", f"{error}; the whole log: {where}/server.log")
            return
        yield Line("SGLang's server starts", "pass", f"{time.perf_counter() - started:.0f} s, {config.model.dtype}")
        yield from checks(task, config, where)
    finally:
        sglang_server.stop_all(where)


def checks(task: Task, config: "Config", where: Path) -> Iterator[Line]:
    """Yield the comparison with Megatron, with its four faults made on purpose, and the one with transformers."""
    yield from with_megatron(task, config, where)
    yield from with_transformers(task, where)


def with_megatron(task: Task, config: "Config", where: Path) -> Iterator[Line]:
    """Yield what tools.check_parity finds."""
    from tools.check_parity import LIMITS, check

    hf_dir, megatron_dir = task.checkpoint()
    arguments = Namespace(
        hf=hf_dir, megatron=megatron_dir, server=str(where), prompts=None, load=False, controls=not task.quick
    )
    with tempfile.TemporaryDirectory(prefix="acceptance_") as work:
        answer = check(arguments, config, LIMITS[config.model.dtype], Path(work))
    mean, largest = answer["limits"]["mean"], answer["limits"]["max"]
    found = f"{answer['tokens']} tokens, mean {answer['mean_abs_difference']:.2g} nats (limit {mean:g}),"
    found += f" largest {answer['max_abs_difference']:.2g} (limit {largest:g})"
    right = answer["mean_abs_difference"] <= mean and answer["max_abs_difference"] <= largest
    yield Line("SGLang's log-probs are Megatron's, with pictures", passed_if(right), found)
    bias, error = answer["sampling_bias"], answer["sampling_bias_error"]
    right = bias >= -5 * error
    yield Line("its tokens are samples of the policy", passed_if(right), f"bias {bias:.4f} +- {error:.4f} nats")
    for name, control in answer.get("controls", {}).items():
        found = f"mean {control['mean_abs_difference']:.2g} nats, bias {control['sampling_bias']:.3f}"
        yield Line(f"control: {name} is noticed", passed_if(control["noticed"]), found)


def with_transformers(task: Task, where: Path) -> Iterator[Line]:
    """Yield what tools.check_server finds, its probe of pictures after a weight update included."""
    from megatron_papo.sglang.server_record import read_record
    from tools.check_server import check

    hf_dir, _ = task.checkpoint()
    record = read_record(where)
    assert record is not None  # it has just been started
    key = where / "key"
    key.touch(0o600)
    key.write_text(record.api_key)
    try:
        arguments = Namespace(
            server=record.url, hf=hf_dir, key_file=key, probe_update=True, scratch=task.output, device=task.device
        )
        answers = check(arguments)
    finally:
        key.unlink()
    outcome, limits = answers.log_probs, answers.limits
    right = outcome["mean"] <= limits["mean"] and outcome["maximum"] <= limits["max"]
    found = f"{outcome['tokens']} tokens, mean {outcome['mean']:.2g} nats, largest {outcome['maximum']:.2g}"
    yield Line("they are transformers' in float32", passed_if(right), found)
    assert answers.probe is not None
    probe = answers.probe
    found = f"{probe['from_new_weights']:.2g} nats from the new weights, {probe['from_old_weights']:.2g} from the old"
    yield Line("its pictures follow a weight update", passed_if(probe["verdict"] == "follow"), found)
    yield Line("the former weights were put back", passed_if(probe["restored"]), "the same log-probs as before")

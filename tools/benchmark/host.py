"""What the thread that launches kernels does in an iteration of stage 5, in the group layout and in the plain one.

    .venv/bin/python -m tools.benchmark_host [--json]

Counted, not timed: the package's own code runs on a fake GPU (megatron_papo/plan) as rank 0 of --config, for a model of
--geometry with all its layers (few are traced, the others told from them), on rollouts of --prompt-tokens,
--response-tokens and one picture of --picture-tokens a prompt. Per rollout, over the sweeps and the update that the
configuration makes (without the optimizer's own step, which is one for hundreds of rollouts):

kernels     operations that launch one; collectives count as one
attention   calls of an attention kernel among them
waits       places where the thread waits for the GPU: a value that it reads of a tensor there, a copy to it that is not
            asynchronous, a tensor of Python numbers that is made there

Timed on this machine's CPUs: host_seconds, CPU seconds of a model of tiny width and so many layers on short rollouts,
where nearly all of it is launching; iteration_seconds, a whole iteration of three steps (pictures from their files,
sweeps, updates) of a tiny model, at --prompt-tokens and --response-tokens. Both layouts in turns, the fastest counts.
pictures: how often a picture is opened, resized and masked in that iteration, for how many distinct ones.
The last line of the output is one JSON object; with --json it is all.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from megatron_papo.config import Config
from megatron_papo.config_files import load_config
from megatron_papo.distributed import process_groups
from megatron_papo.model.hf_config import HFConfig, read_hf_config
from megatron_papo.pictures import preprocess
from megatron_papo.pictures.decode import Transparency
from megatron_papo.plan.fake_device import DEVICE, FakeDevice
from megatron_papo.plan.layers import Asked, told
from megatron_papo.plan.ledger import Ledger
from megatron_papo.plan.plan import as_on_gpus
from megatron_papo.plan.trace import PlannedCollator, constants_of
from megatron_papo.plan.workload import Lengths, picture_of, rows_of
from megatron_papo.run.command_line import run
from megatron_papo.training.forward_step import PassSettings, papo_step, sweep
from megatron_papo.training.loss_recipe import counts_of, denominators_of, loss_recipe
from megatron_papo.training.passes import Passes, PassPlan, split_into_steps
from megatron_papo.training.policy import Policy
from tools.benchmark.measure import seconds_in_turns, shared_machine_clock
from tools.convert.geometry import NAMES, config_tree
from tools.gpu_acceptance.task import DEMO_CONFIG, ONE_PROCESS, Shape, Task

if TYPE_CHECKING:
    from megatron_papo.training.rows import TrainingRollout

PRESET = Path(__file__).resolve().parents[2] / "configs" / "papo_g_3b.yaml"
LAYOUTS = ("plain", "group")
GROUPS, STEPS, GROUPS_OF_STEP = 7, 3, 2
"""Counted: as many groups as a micro-batch of the preset holds at the published lengths. Timed: optimizer steps, and
groups in each."""
ATTENTION = ("_scaled_dot_product", "_flash_attention", "_varlen_attn")
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select")
Counts = dict[str, int]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, default=PRESET, metavar="FILE", help="YAML configuration (default papo_g_3b's)")
    add("--geometry", choices=NAMES, default="3b", help="of the model that is counted (default %(default)s)")
    add("--prompt-tokens", type=int, default=1000, metavar="N", help="of a prompt, picture included (%(default)s)")
    add("--response-tokens", type=int, default=250, metavar="N", help="of a response (%(default)s)")
    add("--picture-tokens", type=int, default=900, metavar="N", help="of a picture, 28 x 28 px each (%(default)s)")
    add("--groups", type=int, default=GROUPS, metavar="N", help="of rollouts that are counted (%(default)s)")
    add("--repeat", type=int, default=3, metavar="N", help="measurements of each time (%(default)s); 0: count only")
    add("--json", action="store_true", help="one JSON object alone")
    return parser.parse_args()


class HostLedger(Ledger):
    """Counts attention calls and waits besides, each once however often it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name()
        self.attention += self._times * any(word in name for word in ATTENTION)
        reads = name in READS and any(isinstance(arg, FakeTensor) for arg in args)
        to_host = name == "aten::copy_" and isinstance(args[1], FakeTensor) and not isinstance(args[0], FakeTensor)
        self.waits += self._times * (reads or to_host)
        return super().__torch_dispatch__(func, types, args, kwargs)


class Copies(TorchFunctionMode):
    """Counts what the ledger cannot see: values that go to the device while the thread waits for it."""

    def __init__(self, ledger: HostLedger):
        super().__init__()
        self.ledger = ledger

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to and not isinstance(args[0], FakeTensor):
            moved = any(place is DEVICE for place in (*args[1:], kwargs.get("device")))
            self.ledger.waits += moved and not kwargs.get("non_blocking", False)
        self.ledger.waits += func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is DEVICE
        return func(*args, **kwargs)


def counts(config: Config, hf: HFConfig, rank: int, lengths: Lengths, groups: int) -> Counts:
    """Return kernels, attention calls and waits of one sweep over some groups of rollouts, and of their update."""
    ledger = HostLedger()
    found: Counts = {}
    with FakeDevice(rank, config.parallel, ledger) as device:
        policy = Policy(config, hf)
        policy.make_random()
        rows = rows_of(hf, config, lengths, range(groups))
        plan, collator = PassPlan.of(config.objective), PlannedCollator(config, hf, device)
        constants = constants_of(config, plan, True, rows)
        training, temperature = config.training, config.rollout.temperature
        denominators = denominators_of([counts_of(row) for row in rows], config.objective)
        recipe = loss_recipe(config.objective, 0)
        of_sweep = PassSettings(training.log_prob_micro_batch_size, temperature)
        of_update = PassSettings(training.micro_batch_size, temperature)
        passes: dict[str, Callable[[], object]] = {
            "sweep": lambda: sweep(policy.model, collator, rows, of_sweep),
            "update": lambda: papo_step(policy.model, collator, rows, constants, of_update, recipe, denominators),
        }
        with Copies(ledger):
            for name, one_pass in passes.items():
                stretch = ledger.mark(name)
                ledger.attention = ledger.waits = 0
                one_pass()
                found |= {f"{name}/kernels": stretch.kernels, f"{name}/attention": ledger.attention}
                found[f"{name}/waits"] = ledger.waits
    return found


def counted(args: argparse.Namespace, config: Config) -> dict[str, float]:
    """Return what one rollout costs in an iteration of a configuration."""
    config = as_on_gpus(config)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config_tree(args.geometry)))
        hf = read_hf_config(Path(directory))
    lengths = Lengths(args.prompt_tokens, args.response_tokens, picture_of(args.picture_tokens))

    def traces(asked: Sequence[Asked]) -> list[Counts]:
        return [counts(*each, lengths, args.groups) for each in asked]

    (found,) = told(traces, config, hf, [0])
    plan, steps = PassPlan.of(config.objective), config.rollout.rollout_batch_size // config.training.global_batch_size
    sweeps = sum(plan.count_at_start(number) for number in range(steps)) / steps + plan.count_of_steps - 1
    rollouts = args.groups * config.rollout.group_size
    return {
        what: (sweeps * found[f"sweep/{what}"] + found[f"update/{what}"]) / rollouts
        for what in ("kernels", "attention", "waits")
    }


class TimedIteration:
    """An iteration of STEPS steps of a random model in one process on this machine."""

    def __init__(self, directory: Path, hf_dir: Path, args: argparse.Namespace, layout: str, shape: Shape):
        task, of_preset = Task(directory, "cpu", True), load_config(args.config)
        objective = of_preset.objective
        changes = [
            *shape.changes,
            f"rollout.group_size={of_preset.rollout.group_size}",
            f"rollout.rollout_batch_size={shape.groups}",
            f"training.global_batch_size={shape.groups // STEPS}",
            f"training.layout={layout}",
            f"training.max_tokens_per_micro_batch={of_preset.training.max_tokens_per_micro_batch}",
            f"training.micro_batch_size={of_preset.training.micro_batch_size}",
            f"training.log_prob_micro_batch_size={of_preset.training.log_prob_micro_batch_size}",
            f"objective.average={objective.average}",
            f"objective.masked_branch={objective.masked_branch}",
            f"model.recompute={of_preset.model.recompute}",
        ]
        self.config, hf = task.config("float32", changes), read_hf_config(hf_dir)
        self.directory, self.hf = directory / "pictures", hf
        self.rows: list[TrainingRollout] = task.rows(hf, self.config, self.directory, shape)
        self.policy = Policy(self.config, hf)
        self.policy.make_random()

    def run(self) -> None:
        """Make the sweeps and the updates, with a collator of their own, as an iteration has."""
        from megatron_papo.training.collator import Collator

        config, policy = self.config, self.policy
        collator = Collator(
            config, self.hf, self.directory, with_pixels=True, device=process_groups.device(), dtype=policy.dtype
        )
        steps = split_into_steps(self.rows, config, 0, 1)
        passes = Passes(config, self.hf, steps, PassPlan.of(config.objective), collator, lambda rollouts: None)
        of_reference = passes.sweep_reference(policy)
        of_policy, _ = passes.sweep_policy(policy.model)
        recipe = loss_recipe(config.objective, 0)
        for step, reference, constants in zip(steps, of_reference, of_policy, strict=True):
            passes.update(policy, step, reference | constants, recipe, 1e-6)


@contextmanager
def prepared_pictures(prepared: list[str]) -> Iterator[None]:
    """Note the name of each picture that is opened while entered."""
    before = preprocess.open_image

    def noted(root: Path, name: str, transparency: Transparency = "white") -> Image.Image:
        prepared.append(name)
        return before(root, name, transparency)

    preprocess.open_image = noted
    yield
    preprocess.open_image = before


def timed(args: argparse.Namespace, sizes: dict[str, Any], shape: Shape) -> tuple[dict[str, float], int, int]:
    """Return the seconds of an iteration in each layout, and in the group layout how often pictures were prepared and
    for how many distinct ones (masked ones are others)."""
    from megatron_papo.synthetic.tiny_model import TinySizes, make_tiny_model

    prepared: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        make_tiny_model(Path(name) / "hf", seed=1, sizes=TinySizes(**sizes))
        iterations = {}
        process_groups.initialize(load_config(DEMO_CONFIG, [*ONE_PROCESS, "parallel.sequence_parallel=false"]).parallel)
        for layout in LAYOUTS:
            iterations[layout] = TimedIteration(Path(name), Path(name) / "hf", args, layout, shape)
        functions = {layout: iteration.run for layout, iteration in iterations.items()}
        seconds = seconds_in_turns(functions, args.repeat, min, shared_machine_clock())
        with prepared_pictures(prepared):
            iterations["group"].run()
    process_groups.destroy()
    return seconds, len(prepared), 2 * len(set(prepared))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return all numbers, by name."""
    found: dict[str, Any] = {}
    for layout in LAYOUTS:
        of_layout = counted(args, load_config(args.config, [f"training.layout={layout}"]))
        found |= {f"{what}_{layout}": number for what, number in of_layout.items()}
    if args.repeat:
        tree = config_tree(args.geometry)
        vision = tree["vision_config"]
        layers = dict(
            num_layers=tree["num_hidden_layers"],
            vision_depth=vision["depth"],
            full_attention_layers=tuple(vision["fullatt_block_indexes"]),
        )
        groups = STEPS * GROUPS_OF_STEP
        rollouts = groups * load_config(args.config).rollout.group_size
        seconds, _, _ = timed(args, layers, Shape(groups, 60, 20))
        found |= {f"host_seconds_{layout}": value / rollouts for layout, value in seconds.items()}
        seconds, times, distinct = timed(args, {}, Shape(groups, args.prompt_tokens, args.response_tokens))
        found |= {f"iteration_seconds_{layout}": value for layout, value in seconds.items()}
        found |= {"pictures_prepared": times, "pictures_distinct": distinct}
    names = [name.removesuffix("_plain") for name in found if name.endswith("_plain") and "waits" not in name]
    return found | {f"{name}_ratio": found[f"{name}_plain"] / found[f"{name}_group"] for name in names}


def show(found: dict[str, Any]) -> None:
    what = {
        "kernels": "kernels per rollout",
        "attention": "of these attention",
        "waits": "waits for the GPU per rollout",
        "host_seconds": "CPU seconds of launching per rollout",
        "iteration_seconds": "seconds of an iteration of a tiny model",
    }
    for name, title in what.items():
        if f"{name}_plain" in found:
            plain, group = found[f"{name}_plain"], found[f"{name}_group"]
            ratio = f", ratio {found[f'{name}_ratio']:.2f}" if f"{name}_ratio" in found else ""
            print(f"{title}: plain {plain:.4g}, group {group:.4g}{ratio}")
    if "pictures_prepared" in found:
        print(f"pictures prepared: {found['pictures_prepared']} times, {found['pictures_distinct']} distinct ones")


def main() -> None:
    args = parse()
    found = measure(args)
    if not args.json:
        show(found)
    print(json.dumps(found))


if __name__ == "__main__":
    run(main)

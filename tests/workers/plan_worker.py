"""Plans and real steps of the same small models, in one process: `plan_worker.py OUTPUT [true_width | CASE ...]` writes
JSON.

The real step is counted by torch's profiler, which reports every allocation and release of the CPU's allocator: it
knows nothing of the plan's ledger. What a CPU does otherwise than a GPU is set to what a GPU does: the chunks of
logits, and AdamW's kernels for many tensors at once.
"""

import json
import sys
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from megatron_papo.config_files import load_config
from megatron_papo.distributed import process_groups
from megatron_papo.model import log_probs
from megatron_papo.model.hf_config import read_hf_config
from megatron_papo.plan.fit import least_bytes
from megatron_papo.plan.layers import told
from megatron_papo.plan.plan import as_on_gpus
from megatron_papo.plan.trace import constants_of, make_moments, trace, work_of
from megatron_papo.training.collator import Collator
from megatron_papo.training.loss_recipe import loss_recipe
from megatron_papo.training.passes import Passes, PassPlan
from megatron_papo.training.policy import Policy
from tests.helpers import DEMO_CONFIG
from tools.benchmark.measure import peak_bytes
from tools.convert.geometry import config_tree

ONE = ["parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1",
       "parallel.sequence_parallel=false", "model.dtype=bfloat16", "model.recompute=full",
       "data.min_pixels=784"]  # fmt: skip
LAYERS = dict(num_hidden_layers=6, depth=6, fullatt_block_indexes=[2, 5])
LENGTHS = ["data.max_prompt_tokens=200", "data.max_pixels=78400", "rollout.max_response_tokens=60"]
GROUP = ["training.layout=group", "training.max_tokens_per_micro_batch=1024"]
BOTH = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2",
        "parallel.sequence_parallel=true"]  # fmt: skip
CASES = {
    # name: (rank, settings)
    "plain": (0, []),
    "group": (0, GROUP),
    "no recompute": (0, ["model.recompute=none"]),
    "first stage": (1, [*BOTH, *GROUP]),
    "last stage": (3, BOTH),
    "spread": (0, ["parallel.tensor_model_parallel_size=2", "parallel.vision_tower=spread"]),
    "two replicas": (1, ["parallel.data_parallel_size=2"]),
}


def model_of(name, **sizes):
    tree = config_tree(name)
    vision = {key: sizes.pop(key) for key in ("depth", "fullatt_block_indexes") if key in sizes}
    with TemporaryDirectory() as directory:
        text = json.dumps({**tree, **sizes, "vision_config": tree["vision_config"] | vision})
        (Path(directory) / "config.json").write_text(text)
        return read_hf_config(Path(directory))


def config_of(*changes):
    return as_on_gpus(load_config(DEMO_CONFIG, [*ONE, *LENGTHS, *changes]))


class RealCollator(Collator):
    """Makes micro-batches of pictures that are no files."""

    shape: tuple[int, int]
    """Patches, and values in each."""

    def _patches(self, rollout, kind):
        return [torch.zeros(1, self.shape[1], dtype=torch.uint8).expand(self.shape) for _ in rollout.images]

    def expect(self, parts, pictures):
        pass


def measured(config, hf):
    """Return the most bytes that a real sweep and a real step hold on top of what is resident, and those of that."""
    process_groups.initialize(config.parallel)
    log_probs.CPU_CHUNK_ELEMENTS = log_probs.CHUNK_ELEMENTS
    policy = Policy(config, hf)
    policy.make_random()
    make_moments(policy)
    work = work_of(config, hf, 0, 0)
    several = config.rollout.rollout_batch_size > config.training.global_batch_size
    plan = PassPlan.of(config.objective)
    collator = RealCollator(config, hf, Path(), with_pixels=True, device=process_groups.device(), dtype=policy.dtype)
    picture = work.updated.own[-1].grids[0]
    collator.shape = (picture[1] * picture[2], hf.vision.patch_values // 2)
    constants = constants_of(config, plan, several, work.updated.own)

    def passes(*steps):
        return Passes(config, hf, list(steps), plan, collator, lambda rollouts: None)

    recipe = loss_recipe(config.objective, 0)
    update = partial(passes(work.updated).update, policy, work.updated, constants, recipe, 1e-6)
    found = {
        "sweep_policy": peak_bytes(lambda: passes(*[work.swept] * (2 if several else 1)).sweep_policy(policy.model)),
        "update": peak_bytes(update),
    }
    process_groups.shutdown()
    return found


def traces(asked):
    return [trace(*each) for each in asked]


def whole(numbers, phases):
    """Return the highest peak of some phases, without what is resident."""
    peaks = [value for name, value in numbers.items() if name.endswith("/peak") and name.partition("/")[0] in phases]
    return max(peaks) - numbers["resident/all/live"]


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if "true_width" in sys.argv:
        settings = [
            "data.max_prompt_tokens=400",
            "data.max_pixels=235200",
            "rollout.max_response_tokens=100",
            "training.layout=plain",
            "training.micro_batch_size=2",
            "training.log_prob_micro_batch_size=2",
        ]
        config = config_of(*settings)
        hf = model_of("3b", num_hidden_layers=3, vocab_size=8192, image_token_id=8000, video_token_id=8001,
                      depth=3, fullatt_block_indexes=[2])  # fmt: skip
        cases = {}
    else:
        config, cases = config_of("training.layout=plain"), {name: CASES[name] for name in sys.argv[2:]}
        hf = model_of("tiny", **LAYERS)
    numbers = trace(config, hf, 0)
    found = {
        "planned": {name: whole(numbers, phases) for name, phases in
                    {"sweep_policy": ["sweep_policy"], "update": ["update", "optimizer"]}.items()},
        "resident": numbers["resident/all/live"],
        "parameters": numbers["parameters"],
        "cases": {},
    }  # fmt: skip
    for name, (rank, changes) in cases.items():
        of_case = config_of(*changes)
        found["cases"][name] = {
            "exact": told(traces, of_case, hf, [rank], exact=True)[0],
            "told": told(traces, of_case, hf, [rank])[0],
            "least": least_bytes(of_case, hf),
        }
    found["measured"] = measured(config, hf)
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

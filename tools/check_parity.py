"""Does an SGLang server give a token the log-prob that Megatron gives it? Asked of one checkpoint in both formats, with
pictures.

    .venv/bin/python -m tools.check_parity --hf DIR --megatron DIR [--server DIR|URL] [--prompts FILE] [--config FILE]
    [--controls]

The server samples responses; Megatron computes the log-probs of the same tokens over the same allowed tokens, at the
same temperature. Passed: |difference| is below a limit on average and at most, and the tokens are no less surprising
than samples of that distribution are (top_p below 1, top_k or min_p show there and nowhere else, because SGLang's
log-probs are from before them).

--server    a running server (key: $SGLANG_API_KEY), which must hold the weights already: it is looked at, not changed,
            unless --load is given; or a server directory. Without it a server is started for the check and stopped
            again.
--prompts   prompts.jsonl of stage 1, or lines {"problem": ..., "images": [paths from the file's directory]}. Default:
            twelve prompts with pictures of odd sizes, two pictures, or none, made from the checkpoint's own tokenizer
            and chat template.
--config    dtype, pixel limits, temperature, top_p and the server section (default: configs/demo.yaml, in the
            checkpoint's own dtype).
--controls  afterwards do four things wrong on purpose (pictures resized otherwise, text positions for pictures, weights
            of an update ago, top_p 0.9): each must be noticed, else the check has no teeth and fails.

The last line is a JSON object: max_abs_difference, mean_abs_difference, tokens, passed, and more. Exit status 0 if
passed, 1 if not, 2 if it could not be checked. One process: a model must fit one device.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_papo.checkpoint.model_files import model_fingerprint
from megatron_papo.config import Config, ParallelConfig
from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from megatron_papo.run.records import Prompt, Rollout
    from megatron_papo.sglang.answers import Sample
    from megatron_papo.sglang.server_record import Server
    from megatron_papo.training.rows import TrainingRollout

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
LIMITS = {"float32": (1e-4, 1e-3), "bfloat16": (0.05, 1.5)}
"""Mean and largest |difference| in nats. float32: attention and sums in another order (measured 1e-6 and 1e-5).
bfloat16: the logits of a trained model move by about 0.02 with the order of summation, single tokens by more."""
BIAS_ERRORS = 5.0
"""Standard errors by which the tokens may be too unsurprising."""
SAMPLES_PER_PROMPT, RESPONSE_TOKENS, ROLLOUTS_PER_BATCH = 8, 48, 32
PICTURES = ((84, 56), (301, 200), (30, 61), (224, 224), (140, 392), (63, 63))
QUESTIONS = ("How many squares are there?", "What is shown here? Think step by step.")


@dataclass(frozen=True)
class Outcome:
    """How one set of rollouts compares."""

    tokens: int
    mean: float
    maximum: float
    sampling_bias: float
    sampling_bias_error: float
    worst: list[str]

    def problems(self, mean_limit: float, max_limit: float) -> list[str]:
        found = []
        if not self.mean <= mean_limit:
            found.append(f"log-probs differ by {self.mean:.3g} nats on average, limit {mean_limit:g}")
        if not self.maximum <= max_limit:
            found.append(f"log-probs differ by {self.maximum:.3g} nats at most, limit {max_limit:g}")
        if self.sampling_bias < -BIAS_ERRORS * self.sampling_bias_error:
            found.append(
                f"sampled tokens are {-self.sampling_bias:.4f} +- {self.sampling_bias_error:.4f} nats less surprising"
                " than samples of the"
                " policy: top_p, top_k or min_p cut off its tail"
            )
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint")
    parser.add_argument(
        "--megatron", type=Path, required=True, metavar="DIR", help="the same checkpoint in Megatron's format"
    )
    parser.add_argument(
        "--server", metavar="DIR|URL", help="server directory, or http://... of a running server (default: start one)"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSONL prompts with pictures (default: a small set is made)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration (default: configs/demo.yaml)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--load", action="store_true", help="load --hf into the server that --server names by its URL")
    parser.add_argument(
        "--controls", action="store_true", help="also check that four faults made on purpose are noticed"
    )
    parser.add_argument(
        "--max-mean-difference", type=float, metavar="NATS", help="default: 1e-4 in float32, 0.05 in bfloat16"
    )
    parser.add_argument(
        "--max-difference", type=float, metavar="NATS", help="default: 1e-3 in float32, 1.5 in bfloat16"
    )
    arguments = parser.parse_args()
    config = configuration(arguments)
    mean_limit, largest_limit = LIMITS[config.model.dtype]
    limits = arguments.max_mean_difference or mean_limit, arguments.max_difference or largest_limit
    with tempfile.TemporaryDirectory(prefix="check_parity_") as work:
        answer = check(arguments, config, limits, Path(work))
    print(json.dumps(answer), flush=True)
    sys.exit(0 if answer["passed"] else 1)


def configuration(arguments: argparse.Namespace) -> Config:
    """The configuration with, unless --config or --set says otherwise, the dtype of the checkpoint."""
    from megatron_papo.model.hf_config import read_hf_config

    read_hf_config(arguments.hf)
    overrides = list(arguments.overrides)
    if arguments.config is None:
        tree = json.loads((arguments.hf / "config.json").read_text())
        text = tree.get("text_config") or {}
        dtype = (
            tree.get("torch_dtype") or tree.get("dtype") or text.get("torch_dtype") or text.get("dtype") or "bfloat16"
        )
        overrides = [f"model.dtype={dtype}", f"rollout.max_response_tokens={RESPONSE_TOKENS}", *overrides]
    return load_config(arguments.config or DEFAULT_CONFIG, overrides)


def check(arguments: argparse.Namespace, config: Config, limits: tuple[float, float], work: Path) -> dict:
    from megatron_papo.model.hf_config import read_hf_config
    from megatron_papo.sglang import server as sglang_server

    read_hf_config(arguments.megatron)
    root, prompts = (
        read_prompts(arguments.prompts, arguments.hf, config)
        if arguments.prompts
        else made_prompts(arguments.hf, config, work)
    )
    where = arguments.server or str(work / "server")
    try:
        servers = sglang_server.open_servers(where, arguments.hf, config.server, config.model.dtype)
        server = Side(arguments.hf, servers, config, root, load=arguments.load or not sglang_server.urls_of(where))
        sampled = server.sample(prompts, config.rollout.top_p)
        wrong_pictures, cut_off = [], []
        if arguments.controls:
            wrong_pictures = server.sample(prompts, config.rollout.top_p, nearest)
            cut_off = server.sample(prompts, 0.9)
    finally:
        if not arguments.server:
            sglang_server.stop_all(work / "server")
    with Megatron(arguments.megatron, config, root, server.tokens.forbidden, arguments.hf) as megatron:
        outcome = megatron.compare(sampled)
        controls = {}
        if arguments.controls:
            controls["resize"] = megatron.compare(wrong_pictures)
            controls["top_p"] = megatron.compare(cut_off)
            controls["position_ids"] = megatron.compare(sampled, text_positions)
            megatron.move_weights()
            controls["stale_weights"] = megatron.compare(sampled)
    return report(outcome, controls, limits, server)


def report(outcome: Outcome, controls: dict[str, Outcome], limits: tuple[float, float], server: "Side") -> dict:
    """Prints for people, and gives the JSON object."""
    problems = outcome.problems(*limits)
    missed = [name for name, control in controls.items() if not control.problems(*limits)]
    for name, control in controls.items():
        print(f"control {name}: {'; '.join(control.problems(*limits)) or 'NOT NOTICED'}")
    print(
        f"{outcome.tokens} tokens: |log-prob by SGLang - by Megatron| mean {outcome.mean:.3g}, largest"
        f" {outcome.maximum:.3g} nats. Worst:"
    )
    for line in outcome.worst:
        print(f"  {line}")
    for line in [
        *problems,
        *(f"the fault {name} was not noticed: give more prompts, or tighter limits" for name in missed),
    ]:
        print(f"failed: {line}")
    answer = {
        "max_abs_difference": outcome.maximum,
        "mean_abs_difference": outcome.mean,
        "tokens": outcome.tokens,
        "passed": not problems and not missed,
        "limits": {"mean": limits[0], "max": limits[1]},
        "sampling_bias": outcome.sampling_bias,
        "sampling_bias_error": outcome.sampling_bias_error,
        "weight_version": server.version,
    }
    if controls:
        noticed = {name: name not in missed for name in controls}
        answer["controls"] = {
            name: {"noticed": noticed[name], "mean_abs_difference": one.mean, "sampling_bias": one.sampling_bias}
            for name, one in controls.items()
        }
    return answer


def made_prompts(hf: Path, config: Config, work: Path) -> tuple[Path, list]:
    """Where the pictures are, and prompts: each picture with each question but the last, which has two pictures or
    none."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(7)
    rows = []
    for number, (width, height) in enumerate(PICTURES):
        name = f"picture_{number}.png"
        coarse = random.integers(0, 256, (-(-height // 7), -(-width // 7), 3), dtype=np.uint8)
        Image.fromarray(coarse.repeat(7, 0).repeat(7, 1)[:height, :width]).save(work / name)
        rows.append({"problem": QUESTIONS[0], "images": [name]})
        rows.append({"problem": QUESTIONS[1], "images": [name, "picture_0.png"] if number % 2 else []})
    return work, [prompt_of(row, f"made_{number}", hf, work, config) for number, row in enumerate(rows)]


def read_prompts(file: Path, hf: Path, config: Config) -> tuple[Path, list]:
    """Where the pictures are, and the prompts of stage 1's file or of lines with a problem and pictures."""
    from megatron_papo.run.records import Prompt, read_jsonl

    try:
        first = json.loads(file.read_text().partition("\n")[0] or "{}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot be read as JSONL ({error}): give prompts.jsonl of stage 1, or lines with problem and"
            " images"
        )
    if "token_ids" in first:
        return file.parent, read_jsonl(file, Prompt)
    prompts = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            prompts.append(
                prompt_of(
                    {"problem": row["problem"], "images": row.get("images", [])},
                    f"line_{number}",
                    hf,
                    file.parent,
                    config,
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}:{number}: expected an object with `problem` and `images` ({error!r})")
    return file.parent, prompts


def prompt_of(row: dict, name: str, hf: Path, root: Path, config: Config) -> "Prompt":
    from megatron_papo.data.chat import ChatFormat, RenderSettings
    from megatron_papo.pictures.preprocess import PictureSettings, grid_of_file, num_image_tokens
    from megatron_papo.run.records import Prompt

    chat = ChatFormat(hf, RenderSettings.of(config.data))
    ids = chat.encode_prompt(row["problem"], len(row["images"]))
    grids = [grid_of_file(root, image, PictureSettings.of(config.data)) for image in row["images"]]
    length = len(ids) + sum(num_image_tokens(grid) - 1 for grid in grids)
    return Prompt(id=name, problem=row["problem"], answer="", token_ids=ids, num_tokens=length, images=row["images"])


class Side:
    """The server's side."""

    def __init__(self, hf: Path, servers: Sequence["Server"], config: Config, root: Path, *, load: bool):
        """
        Args:
            hf: the checkpoint.
            servers: running ones, which hold its weights already unless `load`.
            config: pixel limits and sampling.
            root: the directory that the pictures' paths start from.
            load: whether to load it into the servers.
        """
        from tokenizers import Tokenizer

        from megatron_papo.data.response_tokens import response_tokens
        from megatron_papo.rollout.sample_and_grade import WEIGHT_VERSION_CHARACTERS
        from megatron_papo.run.stage_output import input_made_or_from_outside
        from megatron_papo.sglang.client import SglangClient

        self.config, self.root = config, root
        self.tokens = response_tokens(
            hf, Tokenizer.from_file(str(hf / "tokenizer.json")).get_vocab(with_added_tokens=True)
        )
        self.client = SglangClient(servers, min(config.rollout.concurrency, 64), config.rollout.request_timeout_seconds)
        if load:
            fingerprint = input_made_or_from_outside(
                hf, "give --hf a checkpoint directory", model_fingerprint
            ).fingerprint
            self.client.update_weights(hf, fingerprint[:WEIGHT_VERSION_CHARACTERS])
        versions = set(self.client.weight_versions())
        if len(versions) > 1:
            raise UserError(
                f"the servers hold different weights, {', '.join(sorted(versions))}: give --load to load {hf} into all"
                " of them"
            )
        [self.version] = versions

    def sample(
        self,
        prompts: Sequence["Prompt"],
        top_p: float,
        picture: Callable | None = None,
        per_prompt: int = SAMPLES_PER_PROMPT,
    ) -> list["Rollout"]:
        """Return rollout records of responses to each prompt, `per_prompt` of them. picture: makes the pictures that
        are sent."""
        from megatron_papo.pictures.preprocess import PictureSettings, load_images, open_image, to_data_uri
        from megatron_papo.sglang.requests import Request, Sampling

        settings = PictureSettings.of(self.config.data)

        def pictures(prompt: "Prompt") -> list[str]:
            resized = load_images(self.root, prompt.images, settings)
            if picture is not None:
                resized = [
                    picture(open_image(self.root, name, settings.transparency), right.size)
                    for name, right in zip(prompt.images, resized, strict=True)
                ]
            return [to_data_uri(image) for image in resized]

        jobs = [(prompt, sample) for prompt in prompts for sample in range(per_prompt)]
        requests = [
            Request(prompt, seed, partial(pictures, prompt), prompt.id) for seed, (prompt, _) in enumerate(jobs)
        ]
        rollout, tokens = self.config.rollout, min(RESPONSE_TOKENS, self.config.rollout.max_response_tokens)
        sampling = Sampling(rollout.temperature, top_p, -1, tokens, self.tokens)
        samples = [sample for sample in self.client.sample(requests, sampling, self.version) if sample is not None]
        return [self._record(prompt, number, sample) for (prompt, number), sample in zip(jobs, samples, strict=True)]

    def _record(self, prompt: "Prompt", number: int, sample: "Sample") -> "Rollout":
        from megatron_papo.run.records import Rewards, Rollout

        return Rollout(
            prompt_id=prompt.id,
            iteration=0,
            epoch=0,
            group=0,
            sample=number,
            answer="",
            prompt_token_ids=prompt.token_ids,
            prompt_num_tokens=prompt.num_tokens,
            images=prompt.images,
            response_token_ids=sample.token_ids,
            rollout_log_probs=sample.log_probs,
            text="",
            finish_reason=sample.finish_reason,
            rewards=Rewards(overall=0.0, accuracy=0.0, format=0.0),
            temperature=self.config.rollout.temperature,
            top_p=self.config.rollout.top_p,
            sampling_seed=0,
            masked_image_seed=0,
            weight_version=sample.weight_version,
        )


class Megatron:
    """Megatron's side, in this process."""

    def __init__(self, checkpoint: Path, config: Config, root: Path, forbidden: Sequence[int], hf: Path):
        from tokenizers import Tokenizer

        from megatron_papo.model.hf_config import read_hf_config

        self.checkpoint, self.root, self.forbidden = checkpoint, root, forbidden
        objective = config.objective.model_copy(update={"kl_prcp_coef": 0.0, "masked_image_entropy_coef": 0.0})
        self.config = config.model_copy(update={"parallel": ParallelConfig(), "objective": objective})
        self.hf = read_hf_config(checkpoint)
        self.decode = Tokenizer.from_file(str(hf / "tokenizer.json")).decode

    def __enter__(self) -> "Megatron":
        import torch

        from megatron_papo.checkpoint import megatron_files
        from megatron_papo.distributed import process_groups
        from megatron_papo.model.qwen2_5_vl import build_model

        process_groups.initialize(ParallelConfig())
        self.dtype = getattr(torch, self.config.model.dtype)
        self.model = build_model(self.hf, dtype=self.dtype, sequence_parallel=False, recompute="none")
        megatron_files.load_weights(self.checkpoint, self.model)
        return self

    def __exit__(self, *_: object) -> None:
        from megatron_papo.distributed import process_groups

        process_groups.shutdown()

    def compare(self, rollouts: list, rotary_positions: Callable | None = None) -> Outcome:
        """Compare the rollouts' log-probs. rotary_positions: what the model gets as positions instead of its own."""
        from megatron_papo.distributed import process_groups
        from megatron_papo.training.collator import Collator
        from megatron_papo.training.forward_step import PassSettings, sweep
        from megatron_papo.training.rows import make_rows

        rows = make_rows(rollouts, [0.0] * len(rollouts), self.root, self.config, self.hf, Path("rollouts"))
        collator = Collator(
            self.config,
            self.hf,
            self.root,
            with_pixels=True,
            device=process_groups.device(),
            dtype=self.dtype,
            rotary_positions=rotary_positions,
        )
        settings = PassSettings(ROLLOUTS_PER_BATCH, self.config.rollout.temperature)
        seen = sweep(self.model, collator, rows, settings, forbidden=self.forbidden)["original"]
        if self.forbidden:
            by_rollout, entropies = seen.allowed_log_probs, seen.allowed_entropy
        else:
            by_rollout, entropies = seen.log_probs, seen.entropy
        return outcome_of(rows, by_rollout, entropies, self.decode)

    def move_weights(self) -> None:
        """By 3 % each, as far as an update might: the server is then one behind."""
        import torch

        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.mul_(1 + 0.03 * noise)


def outcome_of(
    rows: Sequence["TrainingRollout"],
    log_probs: Sequence["torch.Tensor"],
    entropies: Sequence["torch.Tensor"],
    decode: Callable[[list[int]], str],
    judge: str = "Megatron",
) -> Outcome:
    """Compare the server's log-probs in some rollouts with another program's.

    Args:
        rows: the rollouts.
        log_probs: of each one's response tokens by that program, [tokens].
        entropies: of its distributions over the tokens that may be sampled, [tokens].
        decode: token ids to text.
        judge: what that program is called.
    """
    import torch

    from megatron_papo.objective.rollout_mismatch import sampling_bias_metrics, sampling_bias_sums
    from megatron_papo.training.rollout_checks import worst_tokens

    ours = torch.cat([values.cpu() for values in log_probs])
    theirs = torch.tensor([value for row in rows for value in row.rollout.rollout_log_probs])
    difference = (ours.double() - theirs.double()).abs()
    bias = sampling_bias_metrics(sampling_bias_sums(ours, torch.cat([values.cpu() for values in entropies])))
    worst = [one.in_context(decode, judge) for one in worst_tokens(rows, log_probs)]
    return Outcome(
        len(difference),
        difference.mean().item(),
        difference.max().item(),
        bias["sampling_bias"],
        bias["sampling_bias_error"],
        worst,
    )


def nearest(native: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    """A picture resized to the right size the wrong way; one that had it already, moved by a patch's half."""
    from PIL import Image, ImageChops

    return native.resize(size, Image.Resampling.NEAREST) if native.size != size else ImageChops.offset(native, 7, 0)


def text_positions(token_ids: Sequence[int], grids: Sequence) -> "torch.Tensor":
    """Return the rotary positions that the row would have if its image tokens were text."""
    import torch

    return torch.arange(len(token_ids)).expand(3, -1)


if __name__ == "__main__":
    run(main)

"""Is this SGLang server right? Asked of any server of a Qwen2.5-VL, whoever started it, and of the checkpoint that it
should hold.

    .venv/bin/python -m tools.check_server --server URL --hf DIR [--key-file FILE] [--probe-update] [--json]

1. Its log-probs are those of the checkpoint: it samples responses to a dozen prompts with a made picture, two or
   none; transformers, in float32, computes the log-probs of the same tokens. Checked are the difference, on average and
   at most, and that the tokens are no less surprising than samples of that distribution.
2. Its version, and those of its settings that change numbers.
3. With --probe-update, that its pictures follow a weight update. SGLang keeps what the vision tower made of a picture,
   and a server that was not told otherwise (SGLANG_VLM_CACHE_SIZE_MB=0) goes on using it after an update: errors of
   nats, only on pictures seen before. The probe asks about a picture, loads a checkpoint whose vision tower differs
   (DIR with the sign of one matrix changed), asks again, and loads DIR back, also when it is interrupted. Use it on a
   server that nobody else uses meanwhile.

The server must be able to read DIR, and what the probe writes to --scratch, under the same paths; it is asked for DIR
first. 1 changes nothing in the server. One that computes in bfloat16 or float16 is allowed 0.05 nats on average and 1.5
at most, in float32 1e-4 and 1e-3.

Exit status 0: right; 1: not; 2: could not be checked. With --json, stdout is one JSON object.
"""

import argparse
import json
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_papo.errors import UserError
from megatron_papo.reading import read_text, shown
from megatron_papo.run.command_line import run
from megatron_papo.sglang.answers import Answer
from tools.check_parity import DEFAULT_CONFIG, LIMITS, RESPONSE_TOKENS, Outcome, Side, made_prompts, outcome_of

if TYPE_CHECKING:
    from megatron_papo.config import Config
    from megatron_papo.run.records import Prompt, Rollout
    from megatron_papo.sglang.server_record import Server
    from tools.reference import Reference

SAMPLES = 2
"""Responses to each prompt."""
PROBED_PROMPTS = 3
CLEARLY = 4.0
"""The log-probs of one set of weights are so many times nearer to the server's than those of the other."""
REQUEST_SECONDS = 600.0
Verdict = Literal["follow", "stale", "unclear"]
"""Of pictures, after an update: those of the new weights, those of the old ones, neither."""


class Settings(Answer):
    """/server_info: what changes numbers, and the version. None: this version of SGLang does not say."""

    version: str = "does not say"
    dtype: str = "auto"
    tp_size: int | None = None
    attention_backend: str | None = None
    mm_attention_backend: str | None = None
    kv_cache_dtype: str | None = None
    quantization: str | None = None
    speculative_algorithm: str | None = None
    enable_deterministic_inference: bool | None = None
    disable_radix_cache: bool | None = None
    chunked_prefill_size: int | None = None

    def remarks(self) -> list[str]:
        """Return what a user of these settings should know, one line each."""
        lines = []
        if not self.enable_deterministic_inference:
            lines.append("without --enable-deterministic-inference it ignores seeds: rollouts cannot be made again")
        if self.quantization is not None:
            lines.append(f"its weights are quantized ({shown(self.quantization)}): it is another policy than trains")
        if self.speculative_algorithm is not None:
            lines.append(f"speculative decoding ({shown(self.speculative_algorithm)}): not tried with this pipeline")
        if self.kv_cache_dtype not in (None, "auto", "bfloat16", "bf16"):
            lines.append(f"its KV cache is {shown(self.kv_cache_dtype)}: log-probs move by what that rounds away")
        return lines


class Model(Answer):
    """/model_info."""

    model_path: str
    weight_version: str
    model_type: str | None = None
    has_image_understanding: bool | None = None


@dataclass
class Probe:
    """What --probe-update found. Differences are means over the text tokens after a picture, in nats."""

    verdict: Verdict
    from_new_weights: float
    """Between the server's log-probs after the update and transformers' with the new weights."""
    from_old_weights: float
    """The same, with the old weights."""
    weights_move: float
    """Between transformers' log-probs with the old weights and with the new."""
    restored: bool
    """Whether the server then gave the log-probs of before again."""


@dataclass
class Answers:
    """All that was found, as --json prints it."""

    server: str
    hf: str
    passed: bool
    problems: list[str]
    remarks: list[str]
    settings: dict[str, Any]
    model_path: str
    weight_version: str
    limits: dict[str, float]
    log_probs: dict[str, Any]
    probe: dict[str, Any] | None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=".venv/bin/python -m tools.check_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--server", required=True, metavar="URL", help="http://HOST:PORT of a running server")
    add("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint that it should hold")
    add("--key-file", type=Path, metavar="FILE", help="file with the server's API key (default: $SGLANG_API_KEY)")
    add("--probe-update", action="store_true", help="also load other weights, and these back: see above")
    scratch_help = "where --probe-update puts a checkpoint that the server can read (default: the temporary directory)"
    add("--scratch", type=Path, metavar="DIR", help=scratch_help)
    device_help = "where transformers computes (default: a GPU where the checkpoint in float32 fits, else the CPU)"
    add("--device", metavar="NAME", help=device_help)
    add("--json", action="store_true", help="print one JSON object, and the rest on stderr")
    arguments = parser.parse_args()
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        answers = check(arguments)
    if arguments.json:
        print(json.dumps(asdict(answers)), flush=True)
    sys.exit(0 if answers.passed else 1)


def check(arguments: argparse.Namespace) -> Answers:
    """Return what was found. Raises UserError where the server cannot be checked."""
    hf_dir = arguments.hf.expanduser().resolve()
    if arguments.scratch is not None and not arguments.scratch.is_dir():
        raise UserError(f"--scratch {arguments.scratch}: no directory: make it, where the server can read it")
    server = server_of(arguments.server, arguments.key_file)
    settings, model = ask(server)
    require_model(server, model, hf_dir)
    config = configuration(hf_dir, settings)
    limits = LIMITS["float32" if config.model.dtype == "float32" else "bfloat16"]
    with tempfile.TemporaryDirectory(prefix="check_server_", dir=arguments.scratch) as work:
        root, prompts = made_prompts(hf_dir, config, Path(work))
        side = Side(hf_dir, [server], config, root, load=False)
        rollouts = side.sample(prompts, 1.0, per_prompt=SAMPLES)
        judge = judge_of(hf_dir, arguments.device)
        outcome = compare(judge, rollouts, config, root, side.tokens.forbidden)
        problems = outcome.problems(*limits)
        probe = None
        show(server, settings, model, outcome, limits, problems)
        if arguments.probe_update:
            if problems:
                raise UserError(
                    f"{server.url}: does not hold {hf_dir}, so its weights could not be put back: load them first, or"
                    " leave out --probe-update"
                )
            probe = probe_update(server, hf_dir, model.weight_version, side, judge, prompts, Path(work))
            problems += problems_of(probe, server, hf_dir)
    for problem in problems:
        print(f"failed: {problem}")
    print("failed" if problems else "passed")
    return Answers(
        server=server.url,
        hf=str(hf_dir),
        passed=not problems,
        problems=problems,
        remarks=settings.remarks(),
        settings=settings.model_dump(),
        model_path=model.model_path,
        weight_version=model.weight_version,
        limits={"mean": limits[0], "max": limits[1]},
        log_probs=asdict(outcome),
        probe=None if probe is None else asdict(probe),
    )


def server_of(url: str, key_file: Path | None) -> "Server":
    """Return the server. Raises UserError where none answers, or it wants another key."""
    from megatron_papo.sglang.server import urls_of
    from megatron_papo.sglang.server_health import problem_of
    from megatron_papo.sglang.server_record import Server

    urls = urls_of(url) or []
    if len(urls) != 1:
        raise UserError(f"--server {shown(url)}: expected the URL of one server, http://HOST:PORT")
    key = os.environ.get("SGLANG_API_KEY")
    if key_file is not None:
        key = read_text(key_file, "give --key-file a file that holds the server's key").strip()
    server = Server(urls[0], key or None)
    problem = problem_of(server)
    if problem is not None:
        raise UserError(f"{server.url}: {problem}: start SGLang there; its key goes into --key-file or $SGLANG_API_KEY")
    return server


def ask(server: "Server") -> tuple[Settings, Model]:
    """Return what a server says of itself. Raises UserError for what is no answer of SGLang."""
    from megatron_papo.sglang.answers import reader
    from megatron_papo.sglang.http import Fault, Http, Refused, at_once
    from megatron_papo.sglang.server_health import HEALTH_TIMEOUT_SECONDS

    async def both(http: Http) -> tuple[Settings, Model]:
        return (
            await http.call(server, "/server_info", believe=reader(Settings), timeout_seconds=HEALTH_TIMEOUT_SECONDS),
            await http.call(server, "/model_info", believe=reader(Model), timeout_seconds=HEALTH_TIMEOUT_SECONDS),
        )

    try:
        return at_once(both)
    except (Fault, Refused) as problem:
        raise UserError(f"{server.url}: is no SGLang server, or one of another age than 0.5.21 ({problem})")


def require_model(server: "Server", model: Model, hf_dir: Path) -> None:
    """Raise UserError for a server of something else than the checkpoint's model."""
    from megatron_papo.model.hf_config import read_hf_config

    read_hf_config(hf_dir)
    if model.model_type not in (None, "qwen2_5_vl") or model.has_image_understanding is False:
        what = f"a {shown(model.model_type)}" if model.model_type != "qwen2_5_vl" else "its text part alone"
        raise UserError(f"{server.url}: serves {what} ({shown(model.model_path)}), {hf_dir} is a Qwen2.5-VL")


def configuration(hf_dir: Path, settings: Settings) -> "Config":
    """Return a configuration with the dtype in which the server computes: temperature 1, nothing cut off."""
    from megatron_papo.config_files import load_config
    from megatron_papo.reading import read_json

    dtype = settings.dtype.removeprefix("torch.")
    if dtype in ("auto", "half", "float16"):
        tree = read_json(hf_dir / "config.json", "copy the checkpoint again")
        dtype = "float32" if dtype == "auto" and tree.get("torch_dtype", tree.get("dtype")) == "float32" else "bfloat16"
    if dtype not in LIMITS:
        raise UserError(f"the server computes in {shown(dtype)}: start it with --dtype bfloat16, or float32")
    no_second_pass = ["objective.kl_prcp_coef=0", "objective.masked_image_entropy_coef=0"]
    return load_config(
        DEFAULT_CONFIG,
        [f"model.dtype={dtype}", f"rollout.max_response_tokens={RESPONSE_TOKENS}", *no_second_pass],
    )


def judge_of(hf_dir: Path, device: str | None) -> "Reference":
    """Return the checkpoint in transformers, in float32. Raises UserError where it does not fit."""
    import torch

    from tools.reference import Reference, bytes_of

    chosen = device or "cpu"
    if device is None and torch.cuda.is_available():
        chosen = "cuda" if 1.2 * bytes_of(hf_dir, torch.float32) < torch.cuda.mem_get_info()[0] else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # matrix products have it off already
    try:
        place = torch.device(chosen)
    except RuntimeError:
        raise UserError(f"--device {shown(chosen)}: no device of torch: cpu, cuda or cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {shown(chosen)}: torch sees no such GPU: give another, or cpu")
    return Reference(hf_dir, torch.float32, place)


def compare(
    judge: "Reference", rollouts: Sequence["Rollout"], config: "Config", root: Path, forbidden: Sequence[int]
) -> Outcome:
    """Compare a server's log-probs with transformers'.

    Args:
        judge: the checkpoint.
        rollouts: what the server sampled.
        config: pixel limits.
        root: the directory that the pictures' paths start from.
        forbidden: token ids that the server was told never to sample.
    """
    from tokenizers import Tokenizer

    from megatron_papo.pictures.preprocess import PictureSettings
    from megatron_papo.training.rows import make_rows

    rows = make_rows(rollouts, [0.0] * len(rollouts), root, config, judge.hf, Path("rollouts"))
    settings = PictureSettings.of(config.data)
    said = [judge.statistics(row, root, settings, forbidden) for row in rows]
    log_probs, entropies = zip(*said, strict=True)
    decode = Tokenizer.from_file(str(judge.directory / "tokenizer.json")).decode
    return outcome_of(rows, log_probs, entropies, decode, "transformers")


def show(
    server: "Server",
    settings: Settings,
    model: Model,
    outcome: Outcome,
    limits: tuple[float, float],
    problems: Sequence[str],
) -> None:
    """Print what was found about the log-probs, and what the server says of itself, for people."""
    print(f"{server.url}: SGLang {shown(settings.version)}, weights {shown(model.weight_version)} of ", end="")
    print(shown(model.model_path))
    said = {name: value for name, value in settings.model_dump(exclude={"version"}).items() if value is not None}
    print("settings: " + ", ".join(f"{name} {shown(value)}" for name, value in said.items()))
    for remark in settings.remarks():
        print(f"remark: {remark}")
    print(
        f"{outcome.tokens} tokens: |log-prob by SGLang - by transformers in float32| mean {outcome.mean:.3g} (limit"
        f" {limits[0]:g}), largest {outcome.maximum:.3g} nats (limit {limits[1]:g})"
    )
    for line in outcome.worst if problems else []:
        print(f"  {line}")


def probe_update(
    server: "Server",
    hf_dir: Path,
    version: str,
    side: Side,
    judge: "Reference",
    prompts: Sequence["Prompt"],
    work: Path,
) -> Probe:
    """Ask about pictures before and after an update of the weights, and put the weights back.

    Args:
        server: which.
        hf_dir: the checkpoint that it holds.
        version: what it calls its weights; afterwards it calls them so again.
        side: the server's side of the comparison.
        judge: the checkpoint in transformers; its weights are changed, and changed back.
        prompts: those with one picture are used.
        work: a directory that the server can read.

    Raises UserError where the server cannot load a checkpoint.
    """
    from tools.reference import write_negated

    chosen = [prompt for prompt in prompts if len(prompt.images) == 1][:PROBED_PROMPTS]
    moved = work / "moved"
    moved.mkdir()
    write_negated(hf_dir, moved)
    for directory in (work, moved):
        directory.chmod(0o755)  # the server may be another user's
    name = f"check_server-{secrets.token_hex(4)}"
    load(server, hf_dir, f"{name}-same", "the server must be able to read that path, to have its weights put back")
    with weights_put_back(lambda: load(server, hf_dir, version, "load it by hand: its weights are not its own now")):
        print(
            f"loading other weights into {server.url}; were this killed, its own would have to be loaded again:"
            f" {hf_dir}",
            flush=True,
        )
        old_expected = expected_of(judge, chosen, side)
        old = log_probs_of(server, chosen, side, judge)
        load(server, moved, name, "the server must be able to read that path: give --scratch a shared directory")
        new = log_probs_of(server, chosen, side, judge)
    again = log_probs_of(server, chosen, side, judge)
    judge.negate_merger()
    new_expected = expected_of(judge, chosen, side)
    judge.negate_merger()
    to_new, to_old = mean_difference(new, new_expected), mean_difference(new, old_expected)
    move = mean_difference(old_expected, new_expected)
    verdict: Verdict = "unclear"
    if CLEARLY * to_new < move and CLEARLY * to_new < to_old:
        verdict = "follow"
    elif CLEARLY * to_old < move and CLEARLY * to_old < to_new:
        verdict = "stale"
    restored = CLEARLY * mean_difference(again, old) < move
    print(
        f"after the update: {to_new:.3g} nats from the new weights, {to_old:.3g} from the old ones, which are"
        f" {move:.3g} apart; its weights were put back"
    )
    return Probe(verdict, to_new, to_old, move, restored)


def problems_of(probe: Probe, server: "Server", hf_dir: Path) -> list[str]:
    """Return what a probe found wrong, one line each, with what to do."""
    problems = []
    if probe.verdict == "stale":
        problems.append(
            "after a weight update its pictures are still those of the old weights: start it with"
            " SGLANG_VLM_CACHE_SIZE_MB=0 in its environment"
        )
    elif probe.verdict == "unclear":
        problems.append(
            f"after a weight update its log-probs are neither those of the new weights ({probe.from_new_weights:.3g}"
            f" nats away) nor those of the old ones ({probe.from_old_weights:.3g})"
        )
    if not probe.restored:
        problems.append(f"its log-probs are not what they were before the probe: load {hf_dir} into {server.url} again")
    return problems


@contextmanager
def weights_put_back(put_back: Callable[[], None]) -> Iterator[None]:
    """Call put_back at the end, also after an error or a signal that ends the program, and let no signal interrupt
    it."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        try:
            put_back()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def load(server: "Server", hf_dir: Path, version: str, cure: str) -> None:
    """Load a checkpoint into a server, as a training program does. Raises UserError with the cure at its end."""
    from megatron_papo.sglang.control import Control
    from megatron_papo.sglang.http import at_once

    try:
        at_once(lambda http: Control(http, REQUEST_SECONDS).load(server, hf_dir, version))
    except UserError as error:
        raise UserError(f"{error}: {cure}")


def log_probs_of(server: "Server", prompts: Sequence["Prompt"], side: Side, judge: "Reference") -> list[list[float]]:
    """Return a server's log-probs of the text after the picture of each prompt.

    Asked as any program would: without what keeps this pipeline's own requests away from what SGLang has kept.
    """
    from megatron_papo.pictures.preprocess import PictureSettings, load_images, to_data_uri
    from megatron_papo.sglang.answers import read_probe
    from megatron_papo.sglang.control import BYTES_PER_TOKEN
    from megatron_papo.sglang.http import CONTROL_BYTES, Fault, Http, Refused, at_once
    from megatron_papo.sglang.requests import Request, encode, probe_request

    settings = PictureSettings.of(side.config.data)

    async def ask_all(http: Http) -> list[list[float]]:
        answers = []
        for prompt in prompts:
            images = [to_data_uri(image) for image in load_images(side.root, prompt.images, settings)]
            body = probe_request(Request(prompt, 0, lambda: []), images, "")
            for ours_alone in ("extra_key", "mm_hashes"):
                del body[ours_alone]
            rid = f"check-{secrets.token_hex(4)}"
            values = await http.call(
                server,
                "/generate",
                encode({**body, "rid": rid}),
                believe=partial(read_probe, rid=rid),
                timeout_seconds=REQUEST_SECONDS,
                most_bytes=CONTROL_BYTES + BYTES_PER_TOKEN * prompt.num_tokens,
            )
            answers.append(values[-len(text_after_picture(prompt, judge)) :])
        return answers

    try:
        return at_once(ask_all)
    except (Fault, Refused) as problem:
        raise UserError(f"{server.url}: no log-probs of a prompt ({problem})")


def text_after_picture(prompt: "Prompt", judge: "Reference") -> list[int]:
    """Return the ids of the tokens behind the picture and the token that closes it."""
    return prompt.token_ids[prompt.token_ids.index(judge.hf.image_token_id) + 2 :]


def expected_of(judge: "Reference", prompts: Sequence["Prompt"], side: Side) -> list[list[float]]:
    """Return transformers' log-probs of what log_probs_of asks a server for."""
    import torch

    from megatron_papo.data.chat import expand_image_pads
    from megatron_papo.pictures.preprocess import PictureSettings, grid_of, load_images, to_patches

    expected = []
    for prompt in prompts:
        pictures = load_images(side.root, prompt.images, PictureSettings.of(side.config.data))
        grids = [grid_of(picture) for picture in pictures]
        ids = expand_image_pads(prompt.token_ids, judge.hf.image_token_id, grids)
        pixels = torch.cat([torch.from_numpy(to_patches(picture)) for picture in pictures])
        text = text_after_picture(prompt, judge)
        with torch.no_grad():
            logits = judge.response_logits(ids[: -len(text)], text, pixels, grids)
        chosen = torch.log_softmax(logits.double(), -1).gather(-1, torch.tensor(text, device=logits.device)[:, None])
        expected.append(chosen[:, 0].tolist())
    return expected


def mean_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Return the mean of |a - b| over two lists of the same lengths, in nats."""
    pairs = [pair for ours, theirs in zip(first, second, strict=True) for pair in zip(ours, theirs, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


if __name__ == "__main__":
    run(main)

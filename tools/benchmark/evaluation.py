"""What an evaluation costs beside the server: responses graded a second, and the memory of records.

    python -m tools.benchmark.evaluation --prompts 20000 --samples 8 --tokens 300

Grading: ordinary responses by two processes, alone and with one in twenty hostile (tools/benchmark/grading.py has the
kinds), and what it costs the process that samples. Bookkeeping: what else that process does for a response, which is
to make the request, read and compare the answer, and keep the sample. Records: predictions.jsonl of all prompts is
written; held, as stage 7 holds its responses while it samples; read into scores; and for comparison read as a whole:
each in a process of its own, whose peak of memory is taken. Times on a machine that does other work say little; seconds
of the processors and ratios do. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_papo.config import RewardConfig
from megatron_papo.data.response_tokens import ResponseTokens
from megatron_papo.evaluation.scores import answer_of, collect_answers, set_scores
from megatron_papo.rollout.groups import Graded
from megatron_papo.run.command_line import run
from megatron_papo.run.records import Prediction, Prompt, Rewards, read_jsonl, stream_jsonl, write_jsonl
from megatron_papo.sglang.answers import Sample, read_generated, sample_of
from megatron_papo.sglang.requests import Request, Sampling, build_request
from megatron_papo.sglang.sample_store import SampleStore
from tools.benchmark.grading import Pair, graded, hostile, ordinary

VOCABULARY = 151_936
END = 151_645
"""Ends a turn of Qwen2.5-VL."""
CHARACTERS_PER_TOKEN = 4
PICTURE_CHARACTERS = 300_000


def predictions(prompts: int, samples: int, tokens: int) -> Iterator[Prediction]:
    """Yield the predictions of an evaluation, of `tokens` tokens each."""
    draw = random.Random(1)
    text = "<think>" + "a" * CHARACTERS_PER_TOKEN * tokens + "</think>\\boxed{3}"
    for prompt in range(prompts):
        for sample in range(samples):
            right = float(draw.random() < 0.5)
            yield Prediction(
                prompt_id=f"{prompt:08d}",
                problem_id=f"set/{prompt}",
                sample=sample,
                image="original",
                answer="3",
                text=text,
                response_token_ids=[draw.randrange(VOCABULARY) for _ in range(tokens)],
                finish_reason="stop",
                rewards=Rewards(overall=0.9 * right + 0.1, accuracy=right, format=1.0),
                sampling_seed=prompt * samples + sample,
                masked_image_seed=None,
            )


def write(path: Path, args: argparse.Namespace) -> float:
    """Write the records, as stage 7 does."""
    return float(write_jsonl(path, predictions(args.prompts, args.samples, args.tokens)))


def hold(path: Path, args: argparse.Namespace) -> float:
    """Hold the responses until the last of them is graded, as stage 7 does."""
    held = [
        Graded(
            Sample.of(one.response_token_ids, [-1.5] * len(one.response_token_ids), one.finish_reason, "v"),
            one.text,
            one.rewards,
        )
        for one in stream_jsonl(path, Prediction)
    ]
    return sum(one.rewards.accuracy for one in held) / len(held)


def score(path: Path, args: argparse.Namespace) -> float:
    """Return avg@k of the records, as tools.compare reads them."""
    return set_scores(collect_answers(map(answer_of, stream_jsonl(path, Prediction)), "set", path)).avg


def read_all(path: Path, args: argparse.Namespace) -> float:
    """Return avg@k of the records, held all at once."""
    records = read_jsonl(path, Prediction)
    return sum(record.rewards.accuracy for record in records) / len(records)


def alone(work: Callable[[Path, argparse.Namespace], float], path: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run something in a process of its own. Return its result, seconds of the processor, and the most memory that it
    took beyond the imports, in MB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measured, (work, path, args))


def _measured(
    work: Callable[[Path, argparse.Namespace], float], path: Path, args: argparse.Namespace
) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what the process has
    before, begun = _peak_mb(), time.process_time()
    result = work(path, args)
    return {"result": result, "processor_seconds": time.process_time() - begun, "memory_mb": _peak_mb() - before}


def _peak_mb() -> float:
    """Return the most memory that this process has had."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def grading(responses: int, workers: int) -> dict[str, float]:
    """Return responses graded a second, ordinary and with one in twenty hostile, and milliseconds of the process that
    hands them out for each."""
    draw, config = random.Random(1), RewardConfig(workers=workers)
    normal: list[Pair] = [ordinary(number, draw) for number in range(responses)]
    mixed = [hostile(number // 20) if number % 20 == 0 else pair for number, pair in enumerate(normal)]
    before = time.process_time()
    seconds, work, _ = graded(normal, config)
    own = time.process_time() - before
    among_seconds, among_work, _ = graded(mixed, config)
    return {
        "responses": responses,
        "workers": workers,
        "per_second": responses / seconds,
        "per_second_among_hostile": responses / among_seconds,
        "processor_ms": 1000 * work / responses,
        "processor_ms_among_hostile": 1000 * among_work / responses,
        "own_processor_ms": 1000 * own / responses,
    }


def bookkeeping(responses: int, tokens: int) -> dict[str, float]:
    """Return the milliseconds of the processor for each response of `tokens` tokens, graders and HTTP left out."""
    draw = random.Random(1)
    sampling = Sampling(1.0, 1.0, 50, tokens, ResponseTokens(VOCABULARY, (VOCABULARY - 1,), frozenset({END})))
    prompt = Prompt(id="p", problem="?", answer="3", token_ids=[*range(200)], num_tokens=500, images=["a.png"])
    picture = "data:image/png;base64," + "A" * PICTURE_CHARACTERS
    answers = [
        _answer(f"r{number}", [draw.randrange(END) for _ in range(tokens - 1)] + [END]) for number in range(responses)
    ]
    with tempfile.TemporaryDirectory() as directory, SampleStore(Path(directory) / "samples", "bfloat16") as store:
        begun = time.process_time()
        for number, answer in enumerate(answers):
            request = Request(prompt, number, lambda: [picture])
            key = store.key(request, build_request(request, [picture], sampling, "v"))
            store.add(key, sample_of(read_generated(answer, f"r{number}"), request, sampling, "v"))
        seconds = time.process_time() - begun
    return {"responses": responses, "tokens": tokens, "processor_ms": 1000 * seconds / responses}


def _answer(rid: str, ids: list[int]) -> bytes:
    """Return what SGLang answers."""
    info = {
        "id": rid,
        "finish_reason": {"type": "stop", "matched": END},
        "prompt_tokens": 500,
        "completion_tokens": len(ids),
        "cached_tokens": 0,
        "weight_version": "v",
        "output_token_logprobs": [[-1.2345678, token, None] for token in ids],
    }
    return json.dumps({"text": "a" * CHARACTERS_PER_TOKEN * len(ids), "output_ids": ids, "meta_info": info}).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20_000, help="records: prompts (default 20000)")
    parser.add_argument("--samples", type=int, default=8, help="records: responses to each (default 8)")
    parser.add_argument("--tokens", type=int, default=300, help="records: tokens of a response (default 300)")
    parser.add_argument("--responses", type=int, default=4000, help="to grade (default 4000)")
    parser.add_argument("--workers", type=int, default=2, help="processes that grade (default 2)")
    parser.add_argument("--directory", type=Path, help="where records are written for a while (default: temporary)")
    args = parser.parse_args()
    report: dict[str, object] = {"grading": (rates := grading(args.responses, args.workers))}
    print(
        f"grading, {args.workers} processes: {rates['per_second']:.0f} responses/s, with one in twenty hostile"
        f" {rates['per_second_among_hostile']:.0f}; {rates['own_processor_ms']:.2f} ms each of the process that"
        " samples",
        flush=True,
    )
    report["bookkeeping"] = book = bookkeeping(args.responses, args.tokens)
    print(f"bookkeeping: {book['processor_ms']:.2f} ms for each response of {args.tokens} tokens", flush=True)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        path = Path(directory) / "predictions.jsonl"
        records = {work.__name__: alone(work, path, args) for work in (write, hold, score, read_all)}
        size = path.stat().st_size / 2**20
    ratio = records["read_all"]["memory_mb"] / records["score"]["memory_mb"]
    memory = {name: record["memory_mb"] for name, record in records.items()}
    print(
        f"records of {args.prompts} prompts x {args.samples}, {size:.0f} MB: held by stage 7 in {memory['hold']:.0f} MB"
        f" of memory, written in {memory['write']:.0f}, scored in {memory['score']:.0f}; read at once they take"
        f" {memory['read_all']:.0f}, {ratio:.1f} times as much",
        flush=True,
    )
    report |= {"records": records | {"file_mb": size, "ratio": ratio}}
    print(json.dumps(report))


if __name__ == "__main__":
    run(main)

"""An evaluation in the files that lmms-eval leaves: DATE_results.json, and DATE_samples_SET.jsonl with a line a prompt.

As lmms-eval 0.7.3 writes them (its loggers/evaluation_tracker.py and evaluator.py). `score` is avg@k of the prompt, the
name under which its `--baseline` looks first; of each response `resps` has the text, `filtered_resps` the content of
its last box. `doc` and `arguments`, which 0.7.3 leaves out and others have, are there as well.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from megatron_papo.errors import UserError
from megatron_papo.evaluation.outputs import PREDICTIONS, EvaluatedSet, Evaluation
from megatron_papo.evaluation.scores import SuiteScores, suite_scores
from megatron_papo.reading import shown
from megatron_papo.rollout.rewards import boxed_answer
from megatron_papo.run.records import Prediction, Prompt, read_jsonl, stream_jsonl
from megatron_papo.run.stage_output import partial_of, read_manifest, require_place

Json = dict[str, object]
SCORE = "score"
FILTER = "none"
"""Of lmms-eval: what was done to the responses before they were graded, part of the name of a metric."""


def write_lmms_eval_files(evaluation: Evaluation, output: Path, data: Path | None = None) -> list[Path]:
    """Write an evaluation as lmms-eval does and return the files. Raises UserError, with nothing left behind.

    Args:
        evaluation: its responses to the original pictures are written.
        output: directory to make.
        data: the prompts of the only set; None: where its manifest says they were.
    """
    output = require_place(output)
    if output.exists():
        raise UserError(f"{shown(output)}: is there already: choose another --output")
    if data is not None and len(evaluation.sets) > 1:
        raise UserError(f"--data {shown(data)}: the evaluation has {len(evaluation.sets)} sets: name one of them")
    prompts = {name: _prompts_of(one, data) for name, one in evaluation.sets.items()}
    partial = partial_of(output)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        date = _date_of(evaluation)
        hashes = {
            name: _write_samples(partial / f"{date}_samples_{name}.jsonl", one, prompts[name])
            for name, one in evaluation.sets.items()
        }
        results = _results(evaluation, hashes, date)
        text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
        (partial / f"{date}_results.json").write_text(text, encoding="utf-8")
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(output.iterdir())


def _prompts_of(one: EvaluatedSet, data: Path | None) -> list[Prompt]:
    """Return the prompts of a set. Raises UserError where they are gone, or other ones."""
    manifest = read_manifest(one.directory)
    place = data or (Path(manifest.inputs["data"]) if manifest and "data" in manifest.inputs else None)
    if place is None or not (place / "prompts.jsonl").is_file():
        where = "" if place is None else f" in {shown(place)}"
        raise UserError(f"{shown(one.directory)}: its prompts are not{where}: say where, --data DIR (stage 1's output)")
    prompts = read_jsonl(place / "prompts.jsonl", Prompt)
    if [prompt.id for prompt in prompts] != one.answers["original"].prompt_ids:
        raise UserError(f"{shown(place)}: not the prompts that {shown(one.directory)} answers: give those, --data DIR")
    return prompts


def _date_of(evaluation: Evaluation) -> str:
    """Return when the last set was finished, as lmms-eval names its files."""
    last = max((one.directory / PREDICTIONS).stat().st_mtime for one in evaluation.sets.values())
    return datetime.fromtimestamp(int(last), UTC).strftime("%Y%m%d_%H%M%S")


def _write_samples(path: Path, one: EvaluatedSet, prompts: list[Prompt]) -> str:
    """Write the file of a set, a prompt at a time; return lmms-eval's hash of its documents."""
    originals = (
        prediction
        for prediction in stream_jsonl(one.directory / PREDICTIONS, Prediction)
        if prediction.image == "original"
    )
    hashes = []
    with open(path, "w", encoding="utf-8") as stream:
        for number, (_, group) in enumerate(groupby(originals, key=lambda prediction: prediction.prompt_id)):
            sample = sample_of(number, prompts[number], list(group))
            hashes.append(f"sample_{number}{sample['doc_hash']}")
            stream.write(json.dumps(sample, ensure_ascii=False, allow_nan=False) + "\n")
    return _hash("".join(hashes))


def sample_of(number: int, prompt: Prompt, predictions: list[Prediction]) -> Json:
    """Return the line of one prompt.

    Args:
        number: of the prompt in its set, from 0.
        prompt: the prompt.
        predictions: all samples of it.
    """
    doc: Json = {
        "id": prompt.id,
        "problem_id": prompt.problem_id or "",
        "problem": prompt.problem,
        "answer": prompt.answer,
        "options": prompt.options,
    }
    texts = [[prediction.text] for prediction in predictions]
    contents = [boxed_answer(prediction.text) or "" for prediction in predictions]
    return {
        "doc_id": number,
        "doc": doc,
        "target": prompt.answer,
        "arguments": [prompt.problem],
        "filtered_resps": contents if len(contents) > 1 else contents[0],
        "token_counts": [{"output_tokens": len(prediction.response_token_ids)} for prediction in predictions],
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        SCORE: _mean(prediction.rewards.accuracy for prediction in predictions),
        "format": _mean(prediction.rewards.format for prediction in predictions),
        "cut_off": _mean(float(prediction.finish_reason == "length") for prediction in predictions),
        "timed_out": _mean(float(prediction.rewards.timed_out) for prediction in predictions),
        "input": prompt.problem,
        "resps": texts if len(texts) > 1 else texts[0],
    }


def _results(evaluation: Evaluation, hashes: dict[str, str], date: str) -> Json:
    """Return DATE_results.json."""
    sets = {name: one.answers["original"] for name, one in evaluation.sets.items()}
    scores: SuiteScores = suite_scores(sets, {name: one.protocol.groups for name, one in evaluation.sets.items()})
    first = next(iter(evaluation.sets.values())).protocol
    return {
        "results": {
            name: {
                "alias": name,
                f"{SCORE},{FILTER}": of_set.avg,
                f"{SCORE}_stderr_clustered,{FILTER}": "N/A" if of_set.standard_error is None else of_set.standard_error,
            }
            for name, of_set in scores.sets.items()
        },
        "configs": {
            name: {
                "task": name,
                "score_key": SCORE,
                "repeats": scores.sets[name].samples_per_prompt,
                **one.protocol.protocol,
            }
            for name, one in evaluation.sets.items()
        },
        "versions": dict.fromkeys(scores.sets, 1),
        "n-shot": dict.fromkeys(scores.sets, 0),
        "higher_is_better": {name: {SCORE: True} for name in scores.sets},
        "n-samples": {name: {"original": one.prompts, "effective": one.prompts} for name, one in scores.sets.items()},
        "config": {"model": "sglang", "model_args": f"pretrained={first.hf}", "checkpoint": first.checkpoint},
        "date": date,
        "task_hashes": hashes,
        "model_source": "sglang",
        "model_name": first.hf,
        "model_name_sanitized": first.hf.strip("/").replace("/", "__"),
    }


def _mean(values: Iterator[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

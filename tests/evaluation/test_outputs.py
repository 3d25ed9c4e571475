"""Predictions are read in bounded memory."""

import gc
import tracemalloc

from megatron_papo.evaluation.outputs import read_evaluated_set
from megatron_papo.run.records import Prediction, Protocol, Rewards, read_jsonl, write_jsonl


def peak_of(read):
    """Return the most memory in bytes that was taken at once, and the result."""
    gc.collect()
    tracemalloc.start()
    try:
        result = read()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_responses(tmp_path):
    """100 prompts x 8 of 20,000 characters: a small part of the file's size; control: all records at once take more."""
    ids, text = [1, 2], "word " * 4000 + "\\boxed{7}"
    predictions = (
        Prediction(
            prompt_id=f"p{number}",
            problem_id=f"set/{number}",
            sample=sample,
            image="original",
            answer="7",
            text=text,
            response_token_ids=ids,
            finish_reason="stop",
            rewards=Rewards(overall=1.0, accuracy=1.0, format=0.0),
            sampling_seed=sample,
            masked_image_seed=None,
        )
        for number in range(100)
        for sample in range(8)
    )
    file = tmp_path / "predictions.jsonl"
    assert write_jsonl(file, predictions) == 800
    written = Protocol(
        set="set", groups=[], problems_of="set", checkpoint="c", hf="h", data="d", protocol={}, chosen_on=False
    )
    (tmp_path / "protocol.json").write_text(written.model_dump_json())
    size = file.stat().st_size
    read_evaluated_set(tmp_path)  # what is imported and cached once is no part of it
    peak, found = peak_of(lambda: read_evaluated_set(tmp_path))
    assert found.answers["original"].right.shape == (100, 8) and found.answers["original"].right.all()
    assert peak < size / 10
    at_once, _ = peak_of(lambda: read_jsonl(file, Prediction))
    assert at_once > size / 2

"""Files of predictions that tests write: PAPO-Eval's, and those of stage 7."""

import json
from pathlib import Path

from megatron_papo.run.records import Prediction, Protocol, Rewards


def row(prompt, label="3", predict="<think>a</think>\\boxed{3}", **more) -> dict:
    """Return a line of PAPO-Eval."""
    return {"prompt": prompt, "predict": predict, "label": f"{label}\n", **more}


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rows))
    return path


ONCE = [row("p1"), row("p2"), row("p3", "4")]


PROTOCOL = Protocol(
    set="geo",
    groups=["general"],
    problems_of="geo",
    checkpoint="c1",
    hf="runs/a/hf",
    data="d1",
    protocol={"temperature": 1.0, "grading": "mathruler"},
    chosen_on=False,
)


def prediction(prompt_id, sample, seed, answer, image, text) -> Prediction:
    return Prediction(
        prompt_id=prompt_id,
        problem_id=f"geo/{prompt_id}",
        sample=sample,
        image=image,
        answer=answer,
        text=text,
        response_token_ids=[1, 2],
        finish_reason="stop",
        rewards=Rewards(overall=0.9, accuracy=1.0, format=0.0),
        sampling_seed=seed * 100 + sample,
        masked_image_seed=1 if image == "masked" else None,
    )


def evaluated(directory: Path, seed=0, prompts="ab", answer="3", text="\\boxed{3}", **changes) -> Path:
    """Write the output of stage 7 for one set, two samples of each prompt, all recorded as right; return its directory.

    Args:
        directory: to make.
        seed: of the evaluation; other seeds, other samples.
        prompts: a letter each, their ids.
        answer: of the data.
        text: of every response.
        changes: to its protocol.json.
    """
    lines = [
        prediction(name, sample, seed, answer, image, text)
        for image in ("original", "masked")
        for name in prompts
        for sample in (0, 1)
    ]
    write(directory / "predictions.jsonl", [json.loads(line.model_dump_json()) for line in lines])
    (directory / "protocol.json").write_text(PROTOCOL.model_copy(update=changes).model_dump_json())
    return directory

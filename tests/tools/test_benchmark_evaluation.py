"""The benchmark of what an evaluation costs beside the server: it measures what it says. Its times are not judged."""

import json

from tests.helpers import run_module


def test_records_are_scored_without_being_held():
    done = run_module("tools.benchmark.evaluation", "--prompts", 400, "--tokens", 400, "--responses", 60)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    records, grading = report["records"], report["grading"]
    assert records["write"]["result"] == 400 * 8
    assert records["score"]["result"] == records["hold"]["result"] == records["read_all"]["result"]
    assert (
        0 < records["score"]["memory_mb"] < records["file_mb"] / 2
    )  # the control: read at once it takes several times
    assert records["read_all"]["memory_mb"] > 2 * records["file_mb"] and records["ratio"] > 5
    assert records["hold"]["memory_mb"] < records["read_all"]["memory_mb"]
    assert report["bookkeeping"]["processor_ms"] > 0
    assert grading["per_second"] > 0 and 0 < grading["own_processor_ms"] < grading["processor_ms"]

"""Samples that are finished, in a file beside the output that is made from them.

A stage that is killed, or gives up on a request, has lost nothing that was finished: run again, it finds those samples
and asks for the others only. A sample is known by its whole request: prompt and pictures, seed, sampling settings and
weights; not by how many are wanted, so that more samples per prompt ask for the additional ones. What is published is
made from the store or from the server's answer alike, and has the same bytes.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from megatron_papo.errors import UserError
from megatron_papo.reading import reading
from megatron_papo.run.records import Record
from megatron_papo.sglang.answers import Sample, problem_of_sample
from megatron_papo.sglang.requests import Request, Sampling


class StoredSample(Record):
    """One line of the file."""

    key: str
    token_ids: list[int]
    log_probs: list[float]
    finish_reason: Literal["stop", "length"]
    weight_version: str


_UNFINISHED = re.compile(rb'\{"key":"[0-9a-f]{64}"')
"""How the first line begins, where a process was killed while it wrote that."""


def require_store(path: Path) -> None:
    """Raise UserError where a file is somebody's own: it has content, and no sample in it."""
    with reading(path, "make it readable and writable, or remove it"):
        if not os.path.lexists(path):
            return
        if not path.is_file():
            raise UserError(f"{path}: a directory, or another thing that is no file: move it")
        with open(path, "rb") as stream:
            if not _is_store(stream):
                raise UserError(
                    f"{path}: is in the way, and not of this pipeline's making (no sample is in it): choose another"
                    " --output, or move it"
                )


def remove_store(path: Path) -> None:
    """Remove the file of an output that is published; somebody's own stays."""
    with suppress(OSError, UserError):
        require_store(path)
        path.unlink(missing_ok=True)


def _is_store(lines: Iterable[bytes]) -> bool:
    first = b""
    for line in lines:
        first = first or line
        if line.endswith(b"\n") and _stored(line) is not None:
            return True
    return not first or (not first.endswith(b"\n") and _UNFINISHED.match(first) is not None)


def _stored(line: bytes) -> StoredSample | None:
    try:
        return StoredSample.model_validate_json(line)
    except ValueError:
        return None


class SampleStore:
    """The samples of one output. One process has it open at a time: the one that holds the output's lock."""

    def __init__(self, path: Path, dtype: str):
        """Open a file and read what an attempt before has left there; a line that it did not finish is cut off.

        Args:
            path: of the file, which is made if it is not there.
            dtype: in which the servers compute.

        Raises UserError if the file cannot be read or written, or is somebody's own.
        """
        require_store(path)
        self.path, self.dtype = path, dtype
        with reading(path, "make it readable and writable, or remove it"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(path, "a+b")
            self._stream.seek(0)
            self._samples: dict[str, Sample] = {}
            whole = 0
            for line in self._stream:
                if line.endswith(b"\n"):
                    whole += len(line)
                    self._take(line)
            self._stream.truncate(whole)

    def _take(self, line: bytes) -> None:
        """Remember the sample of a line; a damaged line is none, and is asked for again."""
        stored = _stored(line)
        if stored is None:
            return
        with suppress(OverflowError):
            sample = Sample.of(stored.token_ids, stored.log_probs, stored.finish_reason, stored.weight_version)
            self._samples[stored.key] = sample

    @property
    def count(self) -> int:
        """How many samples an attempt before has left, or were added since."""
        return len(self._samples)

    def key(self, request: Request, body: dict) -> str:
        """Return what tells the sample of a request from all others.

        Args:
            request: whose prompt it is for.
            body: what build_request made of it: pictures and weights are in it as hashes.
        """
        asked = {name: value for name, value in body.items() if name != "image_data"}
        return hashlib.sha256(json.dumps([self.dtype, request.prompt.id, asked]).encode()).hexdigest()

    def find(self, key: str, sampling: Sampling, weight_version: str) -> Sample | None:
        """Return the sample of a request; None if there is none that can be believed."""
        sample = self._samples.get(key)
        believed = sample is not None and problem_of_sample(sample, sampling, weight_version) is None
        return sample if believed else None

    def add(self, key: str, sample: Sample) -> None:
        """Keep a sample: in the file before this returns. Raises UserError if it cannot be written."""
        stored = StoredSample(
            key=key,
            token_ids=sample.token_ids,
            log_probs=sample.log_probs,
            finish_reason=sample.finish_reason,
            weight_version=sample.weight_version,
        )
        try:
            self._stream.write(stored.model_dump_json().encode() + b"\n")
            self._stream.flush()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({os.strerror(error.errno or 0)}): free space and run the stage again:"
                f" it goes on with the {len(self._samples)} samples that it has"
            )
        self._samples[key] = sample

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._stream.close()
        except OSError:  # the disk is full, which add() has said
            pass

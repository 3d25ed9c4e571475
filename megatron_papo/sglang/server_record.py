"""A server as the pipeline knows it: where it answers, and server.json, the record of one that the pipeline started."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from megatron_papo.reading import reading, shown

LOG_LINES = 30
TAIL_BYTES = 65536
Record = TypeVar("Record", bound=BaseModel)


@dataclass(frozen=True)
class Server:
    """A server that answers at `url`."""

    url: str
    api_key: str | None = None

    @property
    def name(self) -> str:
        """What lines call it."""
        return self.url

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(frozen=True)
class OwnedServer(Server):
    """A server that the pipeline started."""

    directory: Path = field(kw_only=True)
    """Where server.json and server.log are."""
    replica: int = 0
    """Number among the servers of its machine with the same weights, from 0."""
    node: str | None = None
    """The node on which SERVER_LAUNCHER started it (nodes.py); None: this machine."""

    @property
    def name(self) -> str:
        return self.url if self.node is None else f"{self.url} on node {self.node}"


class ServerRecord(BaseModel):
    """server.json: a server that the pipeline started, and what it was started with."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    url: str
    api_key: str
    pid: Annotated[int, Field(gt=0, lt=1 << 31)]
    process: str
    """What tells this process from another one that gets the same number later: see server_process.identity_of."""
    create_time: float
    """In seconds since 1970, for people: the clock may have been set since."""
    ready: bool = False
    """Whether it has answered."""
    released: bool = False
    """Whether it has given up its GPU memory."""
    releasing: bool = False
    """Whether it was asked to, and nobody has seen it answer: it may or may not have."""
    lost: bool = False
    """Whether a stage has given it up: the keeper of its node starts another one in its place."""
    model: str
    """The checkpoint that it was started with."""
    settings: dict[str, JsonValue]
    """What must be the same for a server to be used again: model.dtype and most of the section server."""
    command: list[str]
    temporary: str
    """The directory of its sockets and temporary files, which goes when it has ended."""
    shared_memory: list[str] = []
    """Files in /dev/shm that it has made."""

    def server(self, directory: Path, replica: int, node: str | None = None) -> OwnedServer:
        """Return the server that this record, in `directory`, is about."""
        return OwnedServer(self.url, self.api_key, directory=directory, replica=replica, node=node)

    def but(self, **changes: object) -> "ServerRecord":
        """Return the record with some fields changed."""
        return self.model_copy(update=changes)


def replica_dir(server_dir: Path, number: int) -> Path:
    """Return the directory of the replica with this number, from 0."""
    return server_dir if number == 0 else server_dir / f"replica_{number}"


def read_record(server_dir: Path) -> ServerRecord | None:
    """Return the record of a server directory; None if there is none.

    Raises UserError if server.json cannot be read or is not such a record.
    """
    return read_typed(
        server_dir / "server.json", ServerRecord, "stop its server by hand if one runs, and remove the file"
    )


def read_typed(path: Path, model: type[Record], cure: str) -> Record | None:
    """Return what a JSON file records; None if there is no such file. Raises UserError, which ends with `cure`."""
    with reading(path, cure):
        try:
            return model.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None


def write_record(server_dir: Path, record: ServerRecord) -> None:
    """Write server.json in one step, readable by the owner only: it holds the key. Raises UserError."""
    write_private(server_dir / "server.json", record)


def write_private(path: Path, record: BaseModel) -> None:
    """Write a record as JSON in one step, readable by the owner only. Raises UserError."""
    temporary = path.with_name(f"{path.name}.new")
    with reading(temporary, "make room, or choose another --server"):
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(record.model_dump_json(indent=1))
        os.replace(temporary, path)


def log_tail(server_dir: Path, lines: int = LOG_LINES) -> list[str]:
    """Return the last lines of server.log as they can be printed; none if there is no log."""
    return tail_of(server_dir / "server.log", lines)


def tail_of(path: Path, lines: int) -> list[str]:
    """Return the last lines of a log as they can be printed; none if it is not there."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    return [shown(line, limit=400) for line in text.splitlines() if line.strip()][-lines:]


def last_words(server_dir: Path) -> str:
    """Return where a server's log is and how it ends, for the end of an error message."""
    return last_line(server_dir / "server.log")


def last_line(path: Path) -> str:
    """Return where a log is and how it ends, for the end of an error message."""
    tail = tail_of(path, 1)
    return f"{shown(path)} ends: {tail[0].strip()}" if tail else shown(path)

"""A server as the pipeline knows it: where it answers, and server.json, the record of one that the pipeline started."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megatron_papo.errors import UserError

LOG_LINES = 30
TAIL_BYTES = 65536


@dataclass(frozen=True)
class Server:
    """A server that answers at `url`."""

    url: str
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(frozen=True)
class OwnedServer(Server):
    """A server that the pipeline started."""

    directory: Path = field(kw_only=True)
    """Where server.json and server.log are."""
    replica: int = 0
    """Number among the servers with the same weights, from 0."""


@dataclass(frozen=True, kw_only=True)
class ServerRecord:
    """server.json: a server that the pipeline started, and what it was started with."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    url: str
    api_key: str
    pid: Annotated[int, Field(gt=0, lt=1 << 31)]
    create_time: float
    """Of the process, in seconds since 1970: another process may get the same number later."""
    ready: bool = False
    """Whether it has answered."""
    released: bool = False
    """Whether it has given up its GPU memory, or may have."""
    model: str
    """The checkpoint that it was started with."""
    settings: Mapping[str, object]
    """What must be the same for a server to be used again: model.dtype and most of the section server."""
    command: list[str]

    def server(self, directory: Path, replica: int) -> OwnedServer:
        """Return the server that this record, in `directory`, is about."""
        return OwnedServer(self.url, self.api_key, directory=directory, replica=replica)


_RECORD = TypeAdapter(ServerRecord)


def read_record(server_dir: Path) -> ServerRecord | None:
    """Return the record of a server directory; None if there is none.

    Raises UserError if server.json cannot be read or is not such a record.
    """
    path = server_dir / "server.json"
    try:
        return _RECORD.validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        problem = f"{key}: {first['msg']}" if key else first["msg"]
    except OSError as error:
        problem = str(error.strerror)
    raise UserError(f"{path}: damaged ({problem}): stop its server by hand if one runs, and remove the file")


def write_record(server_dir: Path, record: ServerRecord) -> None:
    """Write server.json in one step, readable by the owner only: it holds the key."""
    temporary = server_dir / "server.json.new"
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600), "w") as stream:
        json.dump(asdict(record), stream, indent=1)
    os.replace(temporary, server_dir / "server.json")


def log_tail(server_dir: Path, lines: int = LOG_LINES) -> str:
    """Return the last lines of server.log, indented; an empty string if there is none."""
    try:
        text = (server_dir / "server.log").read_bytes()[-TAIL_BYTES:].decode(errors="replace")
    except OSError:
        return ""
    return "\n".join("  " + line for line in text.splitlines()[-lines:])

"""The real server and the checkpoints of tests/sglang, for tools.check_parity."""

from tests.sglang.conftest import checkpoints, client, server, server_dir

__all__ = ["checkpoints", "client", "server", "server_dir"]

"""A server for a measurement: nothing of it is left afterwards, and an interrupted run does not wait for answers that nobody reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sun_client.server import Ports, Server


@contextmanager
def running(root: Path, ports: Ports) -> Iterator[Server]:
    """A ready server inside the ``with``. Raises ServerError if it does not start, RuntimeError if it leaves something behind."""
    with Server(root, ports) as server:
        try:
            yield server
        except BaseException:
            server.stop(drain_s=0)
            raise
    if left := server.leftovers():
        raise RuntimeError(f"the server left {', '.join(left)} behind")


def url(server: Server) -> str:
    """host:port of its gRPC endpoint."""
    return f"{server.host}:{server.ports.grpc}"

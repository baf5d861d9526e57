"""A server on the repository's own tasks, for a measurement beside whatever else runs: log, control, ports and shared memory of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sun.handoff.shm import default_root
from sun_client.server import Ports, Server, interruptible

ROOT = Path(__file__).parents[2]


@contextmanager
def own_server(port: int, changing: bool = False) -> Iterator[Server]:
    """A ready server on the first of three free ports; nothing of it is left after the ``with``, which an interrupt or SIGTERM ends.

    changing: on a copy of the model repository, whose tasks and settings may be changed.
    """
    with interruptible(), tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name in ("model_repository", "backends", "build"):
            if changing and name == "model_repository":
                shutil.copytree(ROOT / name, root / name)
            else:
                (root / name).symlink_to(ROOT / name)
        os.environ["SUN_SHM"] = f"{default_root()}-{secrets.token_hex(8)}"
        with Server(root, Ports(port, port + 1, port + 2)) as server:
            try:
                yield server
            finally:
                server.stop(drain_s=0)

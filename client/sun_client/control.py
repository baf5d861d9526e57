"""Control of a running server's models, for those who may read its key."""

from __future__ import annotations

import contextlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

from sun.key import LEAVE
from sun_client import shm
from sun_client.direct import urlopen
from sun_client.errors import TRACEBACK, ServerError

if TYPE_CHECKING:
    from sun.messages import Ack, Reply, Request, Stats

HEADER = "sun-admin"
"""The key's name in an HTTP header; in gRPC's metadata it is `triton-grpc-protocol-sun-admin`."""
RESTRICTED = "model-repository,logging,shared-memory,trace"
"""Triton's protocols that need the key: who has them can load models, read and write memory and files."""
LOAD_S = 300.0
ANSWER_S = 30.0
"""For a worker, which answers at once."""


@dataclass(frozen=True)
class Control:
    """A running server: its pid, where its HTTP endpoint is, and its key."""

    pid: int
    host: str
    http_port: int
    key: str

    @staticmethod
    def options(key: str) -> list[str]:
        """The command line options that make a tritonserver ask for the key."""
        return [f"--http-restricted-api={RESTRICTED}:{HEADER}={key}", f"--grpc-restricted-protocol={RESTRICTED}:{HEADER}={key}"]

    @classmethod
    def running(cls, root: Path) -> Iterator[Control]:
        """The servers of a root that run now and let themselves be controlled."""
        for path in sorted((root / ".run").glob("control*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError):
                control = cls(**json.loads(path.read_text()))
                os.kill(control.pid, 0)
                yield control

    def write(self, path: Path) -> None:
        """Leave it for others of the same user."""
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(self), file)

    def load(self, *models: str) -> None:
        """Load models, or load them anew if their files changed; the old ones serve until the new ones can. Raises ServerError."""
        self._call("load_model", models)
        shm.keep_private(shm.session_files(self.pid))

    def unload(self, *models: str) -> None:
        """Unload models; what they have begun they finish. Raises ServerError."""
        self._call("unload_model", models)

    def drain(self, worker: str, on: bool = True, evict: bool = False) -> Ack:
        """See `sun.messages.Drain`. Raises ServerError."""
        from sun.messages import Drain

        return self._ask(worker, Drain(key=self.key, on=on, evict=evict))

    def leave(self) -> int:
        """Have the router take no more requests; how many it still has. Raises ServerError."""
        return int(self._generate("sun", {"text_input": "", LEAVE: self.key})["text_output"])

    def stats(self, worker: str) -> Stats:
        """A decode worker's state, without steps. Raises ServerError."""
        from sun.messages import NO_STEPS, GetStats

        return self._ask(worker, GetStats(after=NO_STEPS))

    def _ask(self, worker: str, message: Request) -> Reply:
        from sun.messages import decode_reply, encode

        return decode_reply(self._generate(worker, {"message": encode(message).decode()})["reply"].encode())

    def _generate(self, model: str, body: dict) -> dict:
        request = urllib.request.Request(f"http://{self.host}:{self.http_port}/v2/models/{model}/generate", json.dumps(body).encode())
        try:
            with urlopen(request, timeout=ANSWER_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ServerError(f"{model}: {error.read(1000).decode(errors='replace')}") from error
        except (HTTPException, OSError) as error:
            raise ServerError(f"{model}: {error}") from error

    def _call(self, what: str, models: tuple[str, ...]) -> None:
        # Here, because it brings gevent, and every command that shows progress comes by this file.
        import tritonclient.http
        from tritonclient.utils import InferenceServerException

        with tritonclient.http.InferenceServerClient(f"{self.host}:{self.http_port}", network_timeout=LOAD_S, connection_timeout=LOAD_S) as client:
            for model in models:
                try:
                    getattr(client, what)(model, headers={HEADER: self.key})
                except (InferenceServerException, HTTPException, OSError) as error:
                    raise ServerError(f"{model}: {str(error).partition(TRACEBACK)[0]}") from error

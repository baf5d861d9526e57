"""SUN on Triton: a real tritonserver, asked over gRPC streams, with the settings that the repository ships."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from sun_build.tasks import add_task
from sun_client.client import SunClient
from sun_client.root import Root
from sun_client.server import Ports, Server
from sun_perf.peers.prompts import TASKS, Ask
from sun_perf.peers.system import Place, StreamSystem

MODELS = ("sun", "tokenize", "decode_0", "decode_1")
SCHEME = 'parameters {{ key: "scheme" value {{ string_value: "{scheme}" }} }}\n'


class Ours(StreamSystem):
    """The four tasks on one pool of decode workers. scheme: of the decode module's weights."""

    def __init__(self, place: Place, scheme: str):
        super().__init__(place)
        self.scheme = scheme
        self.settings = {"decode_scheme": scheme, "tasks": f"{len(TASKS)} prefill modules, one decode pool", "interface": "gRPC streams"}
        self._server: Server | None = None
        self._client: SunClient | None = None

    def start(self) -> None:
        """Lay a repository root out under ``runs`` and serve it."""
        root = self._root()
        port = self.place.port
        self._server = Server(root.path, Ports(port, port + 1, port + 2))
        self._server.start()
        self._client = SunClient(f"{self._server.host}:{port + 1}")

    def stop(self) -> None:
        """Stop the server."""
        if self._client is not None:
            self._client.close()
        if self._server is not None:
            self.thaw()
            self._server.stop()

    def sessions(self) -> list[int]:
        """The server's."""
        return [self._server.pid] if self._server is not None and self._server.pid else []

    def stream(self, ask: Ask, tokens: int) -> Iterator[int]:
        """One answer over a stream of its own."""
        sampling = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
        for piece in self._client.stream(ask.task, ask.text, sampling=sampling):
            yield len(piece.token_ids)

    def _root(self) -> Root:
        place = Root(self.place.runs / f"sun-{self.scheme}")
        shutil.rmtree(place.path, ignore_errors=True)
        (place.path / "build").mkdir(parents=True)
        place.base.symlink_to(self.place.root.base)
        (place.path / "backends").symlink_to(self.place.root.path / "backends")
        for name in MODELS:
            shutil.copytree(self.place.root.models / name, place.models / name)
            if name.startswith("decode_"):
                with (place.models / name / "config.pbtxt").open("a") as config:
                    config.write(SCHEME.format(scheme=self.scheme))
        for task in TASKS:
            add_task(place.models, place.base, task, self.place.adapter(task))
        return place

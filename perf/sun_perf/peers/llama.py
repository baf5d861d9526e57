"""llama.cpp's server: a model a task, or one model with adapters that requests ask for, or (not the same service) one model for all."""

from __future__ import annotations

import math
from pathlib import Path

from sun_build.base import embedded_gguf
from sun_client.errors import SunError
from sun_perf.peers.gguf_files import PRECISIONS, write_adapter, write_model
from sun_perf.peers.http_server import HttpSystem
from sun_perf.peers.prompts import TASKS
from sun_perf.peers.system import CONTEXT, Place

MODES = ("models", "lora", "one")
SERVE = Path(__file__).with_name("llama_serve.py")
PORT = 3
"""Offset of its first port: ours has those below."""


class Llama(HttpSystem):
    """mode: one of `MODES`. precision: of its GGUF."""

    peer = "llama"

    def __init__(self, place: Place, mode: str, precision: str):
        super().__init__(place)
        if mode not in MODES or precision not in PRECISIONS:
            raise ValueError(f"mode {mode!r}, precision {precision!r}: expected {', '.join(MODES)} and {', '.join(PRECISIONS)}")
        self.mode, self.precision = mode, precision
        servers = len(TASKS) if mode == "models" else 1
        # A model a task: more threads than CPUs would wait for each other, spinning. Each task gets an equal share of the requests.
        self.threads = max(1, place.threads // servers) if mode == "models" else place.threads
        self.slots = math.ceil(place.most / servers)
        self.settings = {
            "engine": self.environment.pins[0], "gguf": precision, "servers": servers, "threads_each": self.threads, "slots_each": self.slots,
            "tasks": {"models": "merged weights, a server a task", "lora": "one server, an adapter a request", "one": "the base for every task"}[mode]}

    def start(self) -> None:
        """Convert the weights if need be, and serve."""
        try:
            source = embedded_gguf()
        except FileNotFoundError as error:
            raise SunError(str(error)) from error
        files = self.folder / "gguf"
        if self.mode == "models":
            models = [write_model(source, files / f"{task}-{self.precision}.gguf", self.precision, self.place.adapter(task)) for task in TASKS]
            self.serve([self._server(model, [], i) for i, model in enumerate(models)])
            return
        model = write_model(source, files / f"chat-{self.precision}.gguf", self.precision)
        adapters = []
        if self.mode == "lora":
            adapters = [write_adapter(source, files / f"{task}-lora.gguf", self.place.adapter(task)) for task in self._adapted()]
        self.serve([self._server(model, adapters, 0)])

    def route(self, task: str) -> tuple[int, dict]:
        """A task's own server, or the one there is with the task's adapter."""
        port = self.place.port + PORT
        if self.mode == "models":
            return port + TASKS.index(task), {}
        if self.mode == "lora":
            adapted = self._adapted()
            return port, {"lora": [{"id": adapted.index(task), "scale": 1.0}] if task in adapted else []}
        return port, {}

    def _adapted(self) -> list[str]:
        return [task for task in TASKS if self.place.adapter(task)]

    def _server(self, model: Path, adapters: list[Path], number: int) -> tuple[list[str], int]:
        port = self.place.port + PORT + number
        command = [
            self.environment.python, str(SERVE), "--model", str(model), "--port", str(port), "--slots", str(self.slots),
            "--context", str(CONTEXT), "--threads", str(self.threads)]
        for adapter in adapters:
            command += ["--lora", str(adapter)]
        return command, port

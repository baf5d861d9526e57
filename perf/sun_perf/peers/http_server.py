"""A peer that serves the OpenAI protocol on one or several ports: llama.cpp, vLLM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

from sun_perf.peers import completions
from sun_perf.peers.child import Child
from sun_perf.peers.environment import Environment
from sun_perf.peers.prompts import Ask
from sun_perf.peers.system import Place, StreamSystem

START_S = 600.0


class HttpSystem(StreamSystem):
    """Subclasses start servers with `serve` and say with `route` which one answers a task.

    Prompts go as token ids, so that no side can differ in the text that it makes of a conversation.
    """

    peer: str

    def __init__(self, place: Place):
        super().__init__(place)
        self.environment = Environment(self.peer, place.runs)
        self.folder: Path = place.runs / self.peer
        self._prompts = place.prompts()
        self._children: list[Child] = []

    def serve(self, servers: list[tuple[list[str], int]], env: dict[str, str] | None = None) -> None:
        """Start commands, each with the port that it listens on, and wait for all of them."""
        for command, port in servers:
            self._children.append(Child(command, self.folder / f"server-{port}.log", env))
        for child, (_, port) in zip(self._children, servers, strict=True):
            child.wait_healthy(port, START_S)

    @abstractmethod
    def route(self, task: str) -> tuple[int, dict]:
        """Port and further request fields for a task."""

    def stop(self) -> None:
        """Stop the servers."""
        for child in self._children:
            child.stop()

    def sessions(self) -> list[int]:
        """The servers'."""
        return [child.process.pid for child in self._children]

    def stream(self, ask: Ask, tokens: int) -> Iterator[int]:
        """One answer over a connection of its own."""
        port, more = self.route(ask.task)
        return completions.stream(port, self._prompts.encode([{"role": "user", "content": ask.text}]), tokens, **more)

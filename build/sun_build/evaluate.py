"""Score a task on chat JSONL through the very engine that serves, without a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sun.local import LocalFleet
from sun.model.manifest import BaseManifest
from sun.router.active import Piece
from sun.router.errors import RequestError
from sun.router.policy import LeastTokens
from sun.router.request import GenerateRequest
from sun.router.router import Limits, Router
from sun.router.tasks import TaskRegistry
from sun.text.prompt import PromptFormat
from sun_build.metrics import METRICS
from sun_build.tune.data import read_conversations


@dataclass(frozen=True)
class Scored:
    """One example: the model's answer against the reference."""

    prompt: str
    answer: str
    reference: str
    right: bool


class Waiting:
    """A router client that keeps the answer until it is asked for."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.text, self.error = "", None

    def send(self, piece: Piece) -> None:
        """Keep the text."""
        self.text += piece.text
        if piece.finish_reason:
            self.done.set()

    def fail(self, error: RequestError) -> None:
        """Keep the error."""
        self.error = error
        self.done.set()

    def cancelled(self) -> bool:
        """Never."""
        return False

    def answer(self) -> str:
        """Wait for the whole text; raises the request's error."""
        self.done.wait()
        if self.error is not None:
            raise self.error
        return self.text


def evaluate(repository: Path, base_dir: Path, task: str, data: Path, metric: str, limit: int | None = None, batch: int = 32,
             max_tokens: int = 96, report: Callable[[int, int], None] = lambda done, total: None) -> list[Scored]:
    """Greedy answers to the last turn of every conversation in ``data`` (the first ``limit``), scored by ``metric``.

    batch: sequences decoded at once. report(done, total) is called after each answer.
    Raises ValueError naming a metric or a line of the data that does not fit.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}, expected one of {', '.join(METRICS)}")
    conversations = read_conversations(data)[:limit]
    base = BaseManifest.load(base_dir)
    fleet = LocalFleet(base_dir, {task: repository / f"prefill_{task}" / "1"}, max_batch=batch)
    router = Router(
        fleet, list(fleet.decodes), TaskRegistry(repository), PromptFormat.load(base_dir, base.prompt), LeastTokens(), [],
        Limits(max_inflight=len(conversations) + 1, deadline_s=86400.0))
    try:
        clients = []
        for messages in conversations:
            clients.append(Waiting())
            sampling = {"temperature": 0, "max_tokens": max_tokens}
            router.submit(GenerateRequest(messages=messages[:-1], sampling=sampling, task=task), clients[-1])
        scored = []
        for messages, client in zip(conversations, clients, strict=True):
            answer, reference = client.answer(), messages[-1]["content"]
            scored.append(Scored(messages[-2]["content"], answer, reference, METRICS[metric](answer, reference)))
            report(len(scored), len(conversations))
        return scored
    finally:
        router.close()
        fleet.close()

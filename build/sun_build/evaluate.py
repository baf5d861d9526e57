"""Score answers on test conversations; get them from the very engine that serves, without a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np

from sun.local import LocalFleet
from sun.model.manifest import BaseManifest
from sun.model.quantise import FULL
from sun.router.active import Piece
from sun.router.errors import RequestError
from sun.router.fair_queue import Bounds
from sun.router.policy import LeastTokens
from sun.router.request import GenerateRequest
from sun.router.router import Limits, Router
from sun.router.tasks import TaskRegistry
from sun.text.prompt import PromptFormat
from sun_build.contestants import Contestant, staged
from sun_build.metrics import METRICS, check
from sun_build.tune.data import Conversation, read_conversations

GREEDY = {"temperature": 0.0}
ALL_MAY_WAIT = Bounds(1 << 62, 1 << 62)
"""A server refuses what it could not serve soon; here everything is asked at once, and there is time."""


@dataclass(frozen=True)
class Scored:
    """One example: the model's answer against the reference."""

    prompt: str
    answer: str
    reference: str
    right: bool


@dataclass(frozen=True)
class Score:
    """A share of right answers with the 95 % interval of its bootstrap, of ``n`` examples."""

    score: float
    ci_low: float
    ci_high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """As it is written to JSON."""
        return asdict(self)


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


def test_set(data: Path, metric: str, limit: int | None = None) -> list[Conversation]:
    """The first ``limit`` conversations of ``data``. Raises ValueError naming a metric or a line of the data that does not fit."""
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}, expected one of {', '.join(METRICS)}")
    conversations = read_conversations(data)[:limit]
    for conversation in conversations:
        try:
            check(metric, conversation.messages[conversation.last_turn]["content"], conversation.row)
        except ValueError as error:
            raise ValueError(f"{conversation.where}: {error}") from error
    return conversations


@dataclass(frozen=True)
class Reference:
    """The longest one of a test set: where it was read, and its tokens with the end of turn."""

    where: str
    tokens: int


def longest_reference(conversations: list[Conversation], base_dir: Path) -> Reference:
    """An answer cut short of it cannot be right."""
    tokenizer = PromptFormat.load(base_dir, BaseManifest.load(base_dir).prompt).tokenizer
    references = [Reference(c.where, len(tokenizer.encode(c.messages[c.last_turn]["content"], add_special_tokens=False)) + 1) for c in conversations]
    return max(references, key=lambda reference: reference.tokens)


def engine_answers(base_dir: Path, who: Contestant, conversations: list[Conversation], task: str = "task", max_tokens: int = 96,
                   batch: int = 32, report: Callable[[int, int], None] = lambda done, total: None, prefill_scheme: str = FULL) -> list[str]:
    """Greedy answers to the last assistant turn of every conversation, through router, prefill, handoff and decode engine.

    batch: sequences decoded at once. prefill_scheme: see `load_prefill`. report(done, total) is called after each answer.
    Raises ValueError naming the conversation that the router refuses.
    """
    base = BaseManifest.load(base_dir)
    with staged(base_dir, task, who.prefill) as repository:
        fleet = LocalFleet(
            base_dir, {task: repository / f"prefill_{task}" / "1"}, max_batch=batch, scheme=who.scheme, own=who.own, prefill_scheme=prefill_scheme)
        router = Router(
            fleet, list(fleet.decodes), TaskRegistry(repository), PromptFormat.load(base_dir, base.prompt), LeastTokens(), [],
            Limits(max_inflight=len(conversations) + 1, deadline_s=86400.0, queue=ALL_MAY_WAIT))
        try:
            clients = []
            for conversation in conversations:
                clients.append(Waiting())
                messages = conversation.messages[: conversation.last_turn]
                router.submit(GenerateRequest(messages=messages, sampling={**GREEDY, "max_tokens": max_tokens}, task=task), clients[-1])
            answers = []
            for client, conversation in zip(clients, conversations, strict=True):
                try:
                    answers.append(client.answer())
                except RequestError as error:
                    raise ValueError(f"{conversation.where}: {error}") from error
                report(len(answers), len(clients))
            return answers
        finally:
            router.close()
            fleet.close()


def score(conversations: list[Conversation], answers: list[str], metric: str) -> list[Scored]:
    """Each answer against its conversation's last assistant turn."""
    scored = []
    for conversation, answer in zip(conversations, answers, strict=True):
        turn = conversation.last_turn
        prompt, reference = (conversation.messages[i]["content"] for i in (turn - 1, turn))
        scored.append(Scored(prompt, answer, reference, METRICS[metric](answer, reference, conversation.row)))
    return scored


def summary(scored: list[Scored]) -> Score:
    """The share that is right, with its interval."""
    right = np.array([s.right for s in scored], dtype=float)
    low, high = interval(right)
    return Score(float(right.mean()), low, high, len(right))


def interval(values: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of values [n] (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = np.concatenate([values[rng.integers(0, len(values), (1000, len(values)))].mean(axis=1) for _ in range(resamples // 1000)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def write_scored(path: Path, scored: list[Scored]) -> None:
    """One JSON line per example."""
    path.write_bytes(b"".join(msgspec.json.encode(s) + b"\n" for s in scored))
